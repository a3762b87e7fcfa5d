"""Collectives of ranks on one machine through shared memory: no sockets, no threads, no names.

A round is: write your slot of a bank, raise your sequence number, wait for everybody's, read. Rounds alternate between two banks,
which makes a second barrier needless: who raises round s + 1 has finished reading round s, so bank s may be overwritten in round
s + 2. Sums are taken in rank order on every rank, which gives all of them the same bits.

``send`` and ``receive`` leave the rounds alone: a sender puts bytes into its outbox, which is a ring, and counts them, the receiver
counts what it took. A message to another rank than the one before waits until that has been taken, one to the same rank for room only;
so ``send_nowait`` is ``send``. Both ends cut a message alike: no part leaves its half of the outbox, so that one is written while the
other is read, and messages begin at multiples of 64 bytes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import torch

from ...errors import ConfigError
from ...topology import AxisGroup
from .arguments import HALF_DTYPES
from .communicator import Communicator
from .setup import CommunicatorSetup
from .shared_region import OUTBOX_BYTES, SLOT_BYTES, SharedRegion, make_region_file, map_region

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
_ALIGNMENT_BYTES = 64  # of messages in an outbox
_MAX_VIEWS = 256  # sizes whose views of the slots are kept: making them takes longer than a small sum


class SharedMemoryCommunicator(Communicator):
    """Collectives for CPU tensors over an anonymous file that the ranks of one machine map.

    Nothing is left behind, however a rank ends: the file has no name and lives as long as a rank maps it. A rank that waits for
    a dead one raises PeerLostError within about 0.1 s; one that waits longer than ``timeout_s`` raises it too.
    """

    def __init__(self, group: AxisGroup, memory: mmap.mmap, *, timeout_s: float) -> None:
        super().__init__(group)
        self._region = region = SharedRegion(group, memory, timeout_s=timeout_s)
        self._words = region.words
        self._own_place = region.seq_places[self.rank]
        self._peer_places = [(place, peer) for peer, place in enumerate(region.seq_places) if peer != self.rank]
        self._views: dict[tuple[int, int, torch.dtype], list[torch.Tensor]] = {}
        self._seq = 0
        self._last_receiver = self.rank  # none yet

    def _barrier(self) -> None:
        self._meet()

    def _close(self) -> None:
        """Let go of the memory: it goes with the last rank that maps it. Who still waits for this rank is told."""
        self._region.leave()
        del self._region, self._words, self._views

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        for part in torch.split(tensor.view(-1), SLOT_BYTES // tensor.element_size()):
            shares = self._slot_views(part.numel(), part.dtype)
            shares[self.rank].copy_(part)
            self._meet()
            _reduce(shares, op, part)

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        for part, targets in zip(torch.split(own, SLOT_BYTES), torch.split(rows, SLOT_BYTES, dim=1)):
            bank = self._next_bank()
            bank[self.rank, : part.numel()].copy_(part)
            self._meet()
            targets.copy_(bank[:, : part.numel()])

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        num_columns = SLOT_BYTES // self.size // tensor.element_size()
        for target, part in zip(torch.split(reduced.view(-1), num_columns), torch.split(tensor.view(self.size, -1), num_columns, dim=1)):
            shares = [slot.view(self.size, -1) for slot in self._slot_views(part.numel(), part.dtype)]
            shares[self.rank].copy_(part)
            self._meet()
            _reduce([share[self.rank] for share in shares], op, target)

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        for part in torch.split(data, SLOT_BYTES):
            slot = self._next_bank()[src, : part.numel()]
            if self.rank == src:
                slot.copy_(part)
            self._meet()
            if self.rank != src:
                part.copy_(slot)

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        """Give each rank a section of the own slot. How many rounds it takes, each rank says beside its slot."""
        section = SLOT_BYTES // self.size
        outgoing, incoming = torch.split(data, send_sizes), torch.split(received, receive_sizes)
        own_rounds = max(1, -(-max(send_sizes) // section))
        num_rounds = own_rounds
        done = 0
        while done < num_rounds:
            bank_number = (self._seq + 1) & 1
            sections = self._region.banks[bank_number][:, : self.size * section].view(self.size, self.size, section)
            for peer, piece in enumerate(outgoing):
                part = piece[done * section : (done + 1) * section]
                sections[self.rank, peer, : part.numel()].copy_(part)
            self._words[self._region.spare_place(self.rank, bank_number)] = own_rounds
            self._meet()
            num_rounds = max(self._words[self._region.spare_place(peer, bank_number)] for peer in range(self.size))
            for peer, piece in enumerate(incoming):
                part = piece[done * section : (done + 1) * section]
                part.copy_(sections[peer, self.rank, : part.numel()])
            done += 1

    def _send(self, data: torch.Tensor, dst: int) -> None:
        region, words = self._region, self._words
        if dst != self._last_receiver != self.rank:
            last = region.pair_place(self.rank, self._last_receiver)
            region.wait(last + 1, words[last], self._last_receiver, "received byte")
        self._last_receiver = dst
        place, outbox = region.pair_place(self.rank, dst), region.outboxes[self.rank]
        for part, start, end in _cut(data, words[place]):
            if end > OUTBOX_BYTES:
                region.wait(place + 1, end - OUTBOX_BYTES, dst, "received byte")
            outbox[start : start + part.numel()].copy_(part)
            words[place] = end

    def _receive(self, data: torch.Tensor, src: int) -> None:
        region, words = self._region, self._words
        place, outbox = region.pair_place(src, self.rank), region.outboxes[src]
        for part, start, end in _cut(data, words[place + 1]):
            region.wait(place, end, src, "sent byte")
            part.copy_(outbox[start : start + part.numel()])
            words[place + 1] = end

    def _next_bank(self) -> torch.Tensor:
        """Return the bank of the next round: to write to before ``_meet``, and to read until this rank's next round but one."""
        return self._region.banks[(self._seq + 1) & 1]

    def _slot_views(self, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the first elements of each rank's slot of the next round's bank."""
        key = ((self._seq + 1) & 1, numel, dtype)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            with torch.inference_mode(False):  # views made inside such a block could not be written to outside of it
                views = self._views[key] = [slot[: numel * dtype.itemsize].view(dtype) for slot in self._next_bank()]
        return views

    def _meet(self) -> None:
        """Show what was written and wait until every rank has done so: one round."""
        self._seq = seq = self._seq + 1
        words = self._words
        words[self._own_place] = seq
        for place, peer in self._peer_places:
            if words[place] < seq:
                self._region.wait(place, seq, peer, "entered collective")


def create_shared_memory(setup: CommunicatorSetup) -> SharedMemoryCommunicator:
    """Return shared-memory collectives for a group whose ranks are all on this machine; every rank of it must call this.

    Raises:
        ConfigError: the ranks are on several machines, or in containers that hide their processes.
        ResourceError: there is not enough memory.
        CoordinatorTimeoutError: a rank of the group did not come within ``timeout_s``.
        PeerLostError: one ended after it had come.
    """
    group = setup.group
    fd = -1
    try:
        if group.is_first:
            fd = make_region_file(group)
        path = setup.meet(f"/proc/{os.getpid()}/fd/{fd}".encode()).decode()
        if not group.is_first:
            fd = _open_file(path, group)
        communicator = SharedMemoryCommunicator(group, map_region(fd, group), timeout_s=setup.timeout_s)
        communicator.barrier()  # everybody has opened the file: its first descriptor may go
        return communicator
    finally:
        if fd >= 0:
            os.close(fd)


def _open_file(path: str, group: AxisGroup) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot map the memory of rank {group.ranks[0]} ({error}); use gloo between machines and containers") from error


def _cut(data: torch.Tensor, position: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield the parts of a message that begins behind ``position`` bytes of others: bytes, their start in the outbox, the position then."""
    done, size = 0, data.numel()
    while done < size:
        start = position % OUTBOX_BYTES
        count = min(size - done, SLOT_BYTES - start % SLOT_BYTES)
        position += -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        yield data[done : done + count], start, position
        done += count


def _reduce(shares: list[torch.Tensor], op: str, out: torch.Tensor) -> None:
    """Combine the ranks' shares in rank order; halves in float32, rounded once at the end."""
    combine, is_half = _COMBINE[op], out.dtype in HALF_DTYPES
    total = combine(shares[0].float(), shares[1]) if is_half else combine(shares[0], shares[1], out=out)
    for share in shares[2:]:
        combine(total, share, out=total)
    if op == "mean":
        total.div_(len(shares))
    if is_half:
        out.copy_(total)
