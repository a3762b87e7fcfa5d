"""The memory that the ranks of one machine share for their collectives: who writes what, and waiting for a word to rise.

    lines    a rank's: u64 seq, pid, start time, two spare, has left   | written by that rank
    pairs    of every two ranks: u64 bytes sent, bytes taken           | written by the sender, by the receiver
    banks    two, each with a slot for each rank                       | a rank's slot is written by that rank
    outboxes two slots for each rank, one ring of bytes                | written by that rank

Words and data are plain stores: correct where stores become visible in program order, as on x86-64.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time

import torch

from ...errors import PeerLostError, ResourceError
from ...topology import AxisGroup

SLOT_BYTES = 256 << 10
OUTBOX_BYTES = 2 * SLOT_BYTES
_LINE_BYTES = 64  # of a processor's cache: ranks that write to different lines do not slow each other
_LINE_WORDS = _LINE_BYTES // 8
_HAS_LEFT = 5  # the place of that word in a rank's line
_PAGE_BYTES = 4096
_SPINS = 100  # reads before the first yield: a few microseconds
_YIELDS = 2000  # yields before sleeping: a few milliseconds
_SLEEP_S = 0.0005
_LIFE_CHECK_S = 0.1


class SharedRegion:
    """One rank's view of the memory.

    Attributes:
        words: all of it as u64.
        seq_places: where in ``words`` each rank's sequence number is; the words behind it are that rank's too.
        banks: uint8 [size, SLOT_BYTES], two of them.
        outboxes: uint8 [size, OUTBOX_BYTES].
    """

    def __init__(self, group: AxisGroup, memory: mmap.mmap, *, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s
        size = group.size
        self.words = (ctypes.c_uint64 * (len(memory) // 8)).from_buffer(memory)
        self.seq_places = [peer * _LINE_WORDS for peer in range(size)]
        with torch.inference_mode(False):  # else a region made inside such a block could be written to inside such blocks only
            slots = torch.frombuffer(memory, dtype=torch.uint8)[_head_bytes(size) :].view(4 * size, SLOT_BYTES)
            self.banks = (slots[:size], slots[size : 2 * size])
            self.outboxes = slots[2 * size :].view(size, OUTBOX_BYTES)
        own = self.seq_places[group.index]
        pid = os.getpid()
        self.words[own + 2] = _start_time(pid)
        self.words[own + 1] = pid

    def spare_place(self, rank: int, bank: int) -> int:
        """Return the place of a word that the rank may write beside its slot of the bank."""
        return self.seq_places[rank] + 3 + bank

    def leave(self) -> None:
        """Tell who waits for this rank that it will do nothing more."""
        self.words[self.seq_places[self._group.index] + _HAS_LEFT] = 1

    def pair_place(self, sender: int, receiver: int) -> int:
        """Return the place of the number of bytes sent; that of those taken is the next."""
        return (self._group.size * (sender + 1) + receiver) * _LINE_WORDS

    def wait(self, place: int, value: int, peer: int, what: str) -> None:
        """Wait until the word at ``place``, which ``peer`` raises, is at least ``value``.

        Args:
            what: the peer is to do, for messages: "entered collective".

        Raises:
            PeerLostError: the peer has ended or closed its communicator, noticed within about 0.1 s, or the deadline has passed.
        """
        words = self.words
        for _ in range(_SPINS):
            if words[place] >= value:
                return
        for _ in range(_YIELDS):
            os.sched_yield()
            if words[place] >= value:
                return
        deadline = time.monotonic() + self._timeout_s
        life_check_at = 0.0
        while words[place] < value:
            now = time.monotonic()
            if now >= life_check_at:
                life_check_at = now + _LIFE_CHECK_S
                self._check_alive(place, value, peer, what)
            if now > deadline:
                rank = self._group.ranks[peer]
                raise PeerLostError(
                    f"a peer is late: rank {rank} has not {what} {value} on axis {self._group.axis} within {self._timeout_s:g} s"
                )
            time.sleep(_SLEEP_S)

    def _check_alive(self, place: int, value: int, peer: int, what: str) -> None:
        line = self.seq_places[peer]
        pid, has_left = self.words[line + 1], self.words[line + _HAS_LEFT]
        if not has_left and (not pid or is_alive(pid, self.words[line + 2])):
            return
        if self.words[place] < value:  # else it did what was asked, and ended after that
            rank, went = self._group.ranks[peer], "closed its communicator" if has_left else "ended"
            raise PeerLostError(f"a peer is gone: rank {rank} (pid {pid}) {went} and has not {what} {value} on axis {self._group.axis}")


def region_bytes(size: int) -> int:
    """Return the bytes of memory that ``size`` ranks share: about 1 MiB a rank."""
    return _head_bytes(size) + 4 * size * SLOT_BYTES


def make_region_file(group: AxisGroup) -> int:
    """Return a descriptor of a file without a name that has all the memory that the group shares.

    It is allocated here, since a page that is missing when it is first written to would be a SIGBUS.

    Raises:
        ResourceError: there is not that much memory.
    """
    size_bytes = region_bytes(group.size)
    fd = -1
    try:
        fd = os.memfd_create("zspmd-collectives", os.MFD_CLOEXEC)
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise _shortage(group, "allocate", error) from error
    return fd


def map_region(fd: int, group: AxisGroup) -> mmap.mmap:
    """Return the memory of ``make_region_file`` in this process; the descriptor may be closed.

    Raises:
        ResourceError: there is no room for it, as under ``ulimit -v``.
    """
    try:
        return mmap.mmap(fd, region_bytes(group.size))
    except OSError as error:
        raise _shortage(group, "map", error) from error


def is_alive(pid: int, start_time: int) -> bool:
    """Whether the process runs that had this id and start time; one that has ended and was not waited for does not."""
    try:
        state, found = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return found == start_time and state not in "ZX"


def _start_time(pid: int) -> int:
    return _read_stat(pid)[1]


def _read_stat(pid: int) -> tuple[str, int]:
    """Return a process's state and its start in ticks since boot."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])


def _shortage(group: AxisGroup, what: str, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot {what} the {region_bytes(group.size)} B of memory that the {group.size} ranks of axis {group.axis} share: {error}; "
        "give the ranks more memory (ulimit -v, -f and -n, the container's limit), or use gloo"
    )


def _head_bytes(size: int) -> int:
    lines = size * (size + 1) * _LINE_BYTES
    return -(-lines // _PAGE_BYTES) * _PAGE_BYTES
