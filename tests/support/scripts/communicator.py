"""RFC 3587's program: a coordinator, a communicator made with it, and an in-place sum. It forgets to close two of three."""

import torch

import zspmd

coordinator = zspmd.Coordinator.from_env(timeout_s=60)
communicator = zspmd.Communicator.create(coordinator)
data = torch.full((1024, 1024), coordinator.rank + 1.0)
communicator.all_reduce(data)
assert torch.equal(data, torch.full((1024, 1024), 3.0))

gloo = zspmd.Communicator.create(coordinator, backend="gloo", timeout_s=30)
assert gloo.all_gather(torch.tensor(coordinator.rank)).tolist() == [0, 1]
with zspmd.Communicator.create(coordinator) as third:
    third.barrier()
print(f"rank {coordinator.rank} has summed by {type(communicator).__name__} and {type(gloo).__name__}")
