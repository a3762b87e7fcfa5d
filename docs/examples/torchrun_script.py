"""Data-parallel training as people write it for torchrun: there is no zspmd in it, and nothing needs to change.

Run it: zspmd-run -n 2 docs/examples/torchrun_script.py
or:     torchrun --nproc-per-node 2 docs/examples/torchrun_script.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()

    dist.init_process_group("gloo")  # rank, world size and rendezvous come from the environment
    rank = int(os.environ["RANK"])

    torch.manual_seed(0)
    inputs = torch.randn(512, 4)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + 0.1
    dataset = TensorDataset(inputs, targets)
    sampler = DistributedSampler(dataset, seed=0)  # each rank gets its share of every epoch
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for batch, target in loader:
            loss = nn.functional.mse_loss(model(batch), target)
            optimizer.zero_grad()
            loss.backward()  # DDP averages the gradients over the ranks here
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch}: loss {total.item() / (len(loader) * dist.get_world_size()):.6f}", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
