"""The program that RFC 3587 of vLLM sketches: a coordinator, and a communicator that is made through it.

The launcher tells each process who it is; the coordinator shares files and bytes; the communicator moves tensors.

Run it: zspmd-run -n 2 docs/examples/rfc3587.py
"""

import torch

import zspmd


def main() -> None:
    coordinator = zspmd.Coordinator.from_env()
    print(f"rank {coordinator.rank} of {coordinator.world_size}, local rank {coordinator.local_rank}", flush=True)

    if coordinator.is_local_master:
        print(f"rank {coordinator.rank} prepares its node", flush=True)  # download a file, create a directory, ...
    coordinator.barrier()

    # Rank 0 makes the unique id of the group, and the coordinator broadcasts it: that much is inside.
    communicator = zspmd.Communicator.create(coordinator, backend="auto")

    data = torch.full((1024, 1024), coordinator.rank + 1.0, device=coordinator.facts.device)
    communicator.all_reduce(data)  # in place
    print(f"rank {coordinator.rank}: every element is {data.unique().tolist()}", flush=True)

    communicator.close()
    coordinator.close()


if __name__ == "__main__":
    main()
