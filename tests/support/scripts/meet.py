"""Meets the other ranks by ``init_process_group`` with nothing but the environment, and says where rank 0's store listens."""

import os

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
print(int(value.item()), os.environ["MASTER_PORT"], flush=True)
dist.destroy_process_group()
