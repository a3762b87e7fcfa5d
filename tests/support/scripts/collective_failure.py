"""The last rank raises while the others wait for it in a collective."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


def load_shard() -> None:
    raise ValueError("shard 3 of the data is empty")


def main() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == dist.get_world_size() - 1:
        load_shard()
    dist.all_reduce(torch.zeros(1))


(record(main) if "record" in sys.argv else main)()
