"""A training as people write it for torchrun: a small network under DDP on the CPU. Rank 0 prints the losses in full."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert (rank, world_size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    torch.manual_seed(7)
    torch.set_num_threads(1)
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True).sin()
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs[rank::world_size]), targets[rank::world_size])
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(float(total).hex(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
