"""Collectives of ranks on one machine through shared memory: no sockets, no threads, no names.

Each rank owns one slot of each of two banks. A round is: write your slot, raise your sequence number, wait for everybody's, read.
Rounds alternate between the banks, which makes a second barrier needless: who raises round s + 1 has finished reading round s, so
bank s may be overwritten in round s + 2.

    | 64 B line: u64 seq, u64 pid | ... a line for each rank | bank 0: slot of rank 0 | slot of rank 1 | ... | bank 1: ... |

Sequence numbers and data are plain stores: correct where stores become visible in program order, so that the driver chooses this
backend on x86-64 only. Sums are taken in rank order on every rank, which gives all of them the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator

import torch

from ...errors import PeerLostError
from ...topology import AxisGroup
from ..store_client import StoreClient
from .communicator import Communicator

SLOT_BYTES = 256 << 10
_LINE_BYTES = 64
_SPINS = 100  # reads before the first yield: a few microseconds
_YIELDS = 2000  # yields before sleeping: a few milliseconds
_SLEEP_S = 0.0005
_LIFE_CHECK_S = 0.1


class SharedMemoryCommunicator(Communicator):
    """Collectives for CPU tensors over an anonymous file that the ranks of one machine map.

    Nothing is left behind, however a rank ends: the file has no name and lives as long as a rank maps it. A rank that waits for
    a dead one raises PeerLostError within about 0.1 s; one that waits longer than ``timeout_s`` raises it too.
    """

    def __init__(self, group: AxisGroup, memory: mmap.mmap, *, timeout_s: float) -> None:
        super().__init__(group)
        self._timeout_s = timeout_s
        self._seq = 0
        words = ctypes.c_uint64 * (len(memory) // 8)
        self._words = words.from_buffer(memory)
        self._seq_places = [peer * _LINE_BYTES // 8 for peer in range(self.size)]
        self._words[self._seq_places[self.rank] + 1] = os.getpid()
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        slots = raw[self.size * _LINE_BYTES :].view(2, self.size, SLOT_BYTES)
        self._banks = [[slots[bank, peer] for peer in range(self.size)] for bank in range(2)]

    def barrier(self) -> None:
        self._exchange(None)

    def close(self) -> None:
        """Nothing to release: the memory goes with the last rank that maps it."""

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        dense = tensor.contiguous()
        for part in _parts(dense):
            shares = [slot[: part.nbytes].view(part.dtype) for slot in self._exchange(part)]
            if part.dtype in (torch.float16, torch.bfloat16):  # rounded once instead of at each rank
                part.copy_(sum((share.float() for share in shares[1:]), shares[0].float()))
            else:
                torch.add(shares[0], shares[1], out=part)
                for share in shares[2:]:
                    part.add_(share)
        if dense is not tensor:
            tensor.copy_(dense)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        rows = [_parts(gathered[peer]) for peer in range(self.size)]
        for part, *targets in zip(_parts(tensor.contiguous()), *rows):
            for target, slot in zip(targets, self._exchange(part)):
                target.copy_(slot[: part.nbytes].view(part.dtype))
        return gathered

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        dense = tensor.contiguous()
        for part in _parts(dense):
            slots = self._exchange(part if self.rank == source else None)
            if self.rank != source:
                part.copy_(slots[source][: part.nbytes].view(part.dtype))
        if dense is not tensor:
            tensor.copy_(dense)

    def _exchange(self, part: torch.Tensor | None) -> list[torch.Tensor]:
        """Do one round and return every rank's slot, valid until this rank's next round but one."""
        self._seq = seq = self._seq + 1
        slots = self._banks[seq & 1]
        if part is not None:
            slots[self.rank][: part.nbytes].view(part.dtype).copy_(part)
        self._words[self._seq_places[self.rank]] = seq
        for peer, place in enumerate(self._seq_places):
            if self._words[place] < seq:
                self._wait(peer, place, seq)
        return slots

    def _wait(self, peer: int, place: int, seq: int) -> None:
        words = self._words
        for _ in range(_SPINS):
            if words[place] >= seq:
                return
        for _ in range(_YIELDS):
            os.sched_yield()
            if words[place] >= seq:
                return
        deadline = time.monotonic() + self._timeout_s
        life_check_at = 0.0
        while words[place] < seq:
            now = time.monotonic()
            if now >= life_check_at:
                life_check_at = now + _LIFE_CHECK_S
                self._check_alive(peer, words[place + 1])
            if now > deadline:
                rank = self.group.ranks[peer]
                raise PeerLostError(
                    f"a peer is late: rank {rank} has not entered collective {seq} on axis {self.group.axis} within {self._timeout_s:g} s"
                )
            time.sleep(_SLEEP_S)

    def _check_alive(self, peer: int, pid: int) -> None:
        if pid and not os.path.exists(f"/proc/{pid}"):
            raise PeerLostError(f"a peer is gone: rank {self.group.ranks[peer]} (pid {pid}) ended before collective {self._seq}")


def create_shared_memory(group: AxisGroup, store: StoreClient, *, timeout_s: float) -> SharedMemoryCommunicator:
    """Return shared-memory collectives for an axis whose ranks are all on this machine; every rank of it must call this.

    Raises:
        StoreTimeoutError: a rank of the axis did not come within ``timeout_s``.
    """
    prefix = f"shm/{group.axis}/{group.ranks[0]}"
    size_bytes = group.size * (_LINE_BYTES + 2 * SLOT_BYTES)
    if group.is_first:
        fd = os.memfd_create("zspmd-collectives", os.MFD_CLOEXEC)
        os.posix_fallocate(fd, 0, size_bytes)  # so that a lack of memory is an error here, not a SIGBUS later
        store.set(f"{prefix}/file", f"/proc/{os.getpid()}/fd/{fd}".encode())
    else:
        fd = os.open(store.get(f"{prefix}/file", timeout_s).decode(), os.O_RDWR | os.O_CLOEXEC)
    try:
        communicator = SharedMemoryCommunicator(group, mmap.mmap(fd, size_bytes), timeout_s=timeout_s)
        communicator.barrier()  # everybody has opened the file: its first descriptor may go
        return communicator
    finally:
        os.close(fd)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a contiguous tensor's elements in flat pieces that fit a slot; views, so that writing to them changes the tensor."""
    if tensor.numel():
        yield from torch.split(tensor.view(-1), SLOT_BYTES // tensor.element_size())
