"""Collectives by torch's process groups: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ...topology import AxisGroup
from .communicator import Communicator

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed exports it only at run time


class ProcessGroupCommunicator(Communicator):
    """Collectives of a torch process group, made directly: it touches no global state of torch.distributed."""

    def __init__(self, group: AxisGroup, process_group: Any) -> None:
        super().__init__(group)
        self._process_group = process_group

    def barrier(self) -> None:
        self._process_group.barrier().wait()

    def close(self) -> None:
        self._process_group = None

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.is_contiguous():
            self._process_group.allreduce([tensor]).wait()
        else:
            dense = tensor.contiguous()
            self._process_group.allreduce([dense]).wait()
            tensor.copy_(dense)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._process_group._allgather_base(gathered.view(-1), tensor.reshape(-1)).wait()
        return gathered

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        dense = tensor.contiguous()
        self._process_group.broadcast(dense, source).wait()
        if dense is not tensor:
            tensor.copy_(dense)


def create_gloo(group: AxisGroup, store: Store, *, address: str, timeout_s: float) -> ProcessGroupCommunicator:
    """Return gloo collectives for CPU tensors, listening on ``address`` only."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupCommunicator(group, dist.ProcessGroupGloo(store, group.index, group.size, options))


def create_nccl(group: AxisGroup, store: Store, *, device: str, timeout_s: float) -> ProcessGroupCommunicator:
    """Return NCCL collectives for tensors on ``device``."""
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupCommunicator(group, dist.ProcessGroupNCCL(store, group.index, group.size, options))
