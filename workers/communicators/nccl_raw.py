"""Collectives by the NCCL library itself, on the current CUDA stream: what a CUDA graph captures is NCCL's kernels and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ctypes import c_void_p

import torch

from ...topology import AxisGroup
from .communicator import Communicator
from .nccl_library import DATA_TYPES, REDUCTIONS, NcclLibrary
from .setup import CommunicatorSetup

_BYTE = DATA_TYPES[torch.uint8]


class NcclRawCommunicator(Communicator):
    """NCCL's collectives for tensors on one GPU a rank.

    They are enqueued and return at once, ordered with the current stream's other work; ``barrier`` alone waits. ``close`` is for all
    ranks to call at about the same time, as NCCL asks; leaving a ``with`` block by an exception aborts instead and waits for nobody.
    """

    def __init__(self, group: AxisGroup, library: NcclLibrary, comm: c_void_p, *, device: str) -> None:
        super().__init__(group, device=device)
        self._library = library
        self._comm = comm

    def _barrier(self) -> None:
        token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self._all_reduce(token, "sum")
        torch.cuda.current_stream(self.device).synchronize()

    def _close(self) -> None:
        self._library.call("ncclCommDestroy", self._comm)

    def _abort(self) -> None:
        self._library.call("ncclCommAbort", self._comm)

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        place = tensor.data_ptr()
        self._enqueue("ncclAllReduce", place, place, tensor.numel(), DATA_TYPES[tensor.dtype], REDUCTIONS[op])

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        self._enqueue("ncclAllGather", own.data_ptr(), rows.data_ptr(), own.numel(), _BYTE)

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        kind = DATA_TYPES[tensor.dtype]
        self._enqueue("ncclReduceScatter", tensor.data_ptr(), reduced.data_ptr(), reduced.numel(), kind, REDUCTIONS[op])

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        self._enqueue("ncclBroadcast", data.data_ptr(), data.data_ptr(), data.numel(), _BYTE, src)

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        with self._in_one_group():
            for peer, (incoming, outgoing) in enumerate(zip(torch.split(received, receive_sizes), torch.split(data, send_sizes))):
                if outgoing.numel():
                    self._send(outgoing, peer)
                if incoming.numel():
                    self._receive(incoming, peer)

    def _send(self, data: torch.Tensor, dst: int) -> None:
        self._enqueue("ncclSend", data.data_ptr(), data.numel(), _BYTE, dst)

    def _receive(self, data: torch.Tensor, src: int) -> None:
        self._enqueue("ncclRecv", data.data_ptr(), data.numel(), _BYTE, src)

    def _enqueue(self, function: str, *arguments: int) -> None:
        self._library.call(function, *arguments, self._comm, torch.cuda.current_stream(self.device).cuda_stream)

    @contextlib.contextmanager
    def _in_one_group(self) -> Iterator[None]:
        """Have NCCL start together what is enqueued inside: sends that wait for each other's receives."""
        self._library.call("ncclGroupStart")
        try:
            yield
        finally:
            self._library.call("ncclGroupEnd")


def create_nccl_raw(setup: CommunicatorSetup) -> NcclRawCommunicator:
    """Return NCCL collectives for tensors on the setup's device.

    Raises:
        ConfigError: no NCCL library, or one that is too old.
        CoordinatorTimeoutError: a rank of the group did not come within ``timeout_s``.
        TransportError: NCCL found no way between the ranks.
    """
    torch.cuda.set_device(setup.device)
    library = NcclLibrary()
    unique_id = setup.meet(library.create_unique_id() if setup.group.is_first else b"")  # NCCL waits for an absent rank without end
    comm = library.create_comm(unique_id, setup.group.index, setup.group.size)
    return NcclRawCommunicator(setup.group, library, comm, device=setup.device)
