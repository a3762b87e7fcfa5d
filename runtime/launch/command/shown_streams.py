"""Which ranks' lines ``zspmd-run`` shows; the others go to their files alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ....errors import ConfigError
from ..agent_protocol import MAX_RANKS

OUT, ERR = 1, 2  # the bits of torchrun's --redirects and --tee
TAIL_LINES = 10
_STREAMS = ((OUT, "out"), (ERR, "err"))
_CONSOLES = ("all", "failed", "none")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", re.ASCII)


@dataclass(frozen=True)
class ShownStreams:
    """What ``--console``, ``--local-ranks-filter``, ``--redirects`` and ``--tee`` say, as they were written.

    How many ranks there are may be known only when all nodes have answered; until then only the notation can be checked.
    """

    console: str = "all"
    ranks: str | None = None
    redirects: str | None = None
    tee: str | None = None

    @property
    def is_failed(self) -> bool:
        """Whether a rank's last lines are shown once it has failed, and nothing of it before."""
        return self.console == "failed"

    def check(self, world_size: int | None) -> None:
        """Raise ConfigError for a notation that cannot be read, or a rank outside the world where its size is known."""
        if self != ShownStreams(self.console if self.console in _CONSOLES else "all"):
            self.hidden(world_size or MAX_RANKS)

    def hidden(self, world_size: int) -> frozenset[tuple[int, str]]:
        """Return the (rank, "out" or "err") that are not shown.

        Raises:
            ConfigError: a rank outside the world.
        """
        redirects = read_stream_bits("--redirects", self.redirects, world_size)
        tee = read_stream_bits("--tee", self.tee, world_size)
        shown = _read_ranks("--local-ranks-filter", self.ranks, world_size) & self._read_console(world_size)
        return frozenset(
            (rank, stream)
            for rank in range(world_size)
            for bit, stream in _STREAMS
            if rank not in shown or (redirects[rank] & bit and not tee[rank] & bit)
        )

    def _read_console(self, world_size: int) -> set[int]:
        if self.console in _CONSOLES:
            return set(range(world_size)) if self.console == "all" else set()
        return _read_ranks("--console", self.console, world_size, also="write all, failed or none, or ")


def read_stream_bits(option: str, text: str | None, world_size: int) -> list[int]:
    """Read torchrun's notation, "3" for all ranks or "0:1,1:3" for some; returns the bits by rank."""
    try:
        if text is None or text.isdecimal():
            places = dict.fromkeys(range(world_size), int(text or 0))
        else:
            places = {int(rank): int(bits) for rank, _, bits in (entry.partition(":") for entry in text.split(","))}
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; write 0, 1, 2 or 3, or pairs such as 0:1,1:3") from None
    for rank, bits in places.items():
        if not 0 <= rank < world_size:
            raise ConfigError(f"{option} is {text!r}; rank {rank} is outside the world of {world_size}")
        if not 0 <= bits <= (OUT | ERR):
            raise ConfigError(f"{option} is {text!r}; streams are 0 none, 1 stdout, 2 stderr, 3 both")
    return [places.get(rank, 0) for rank in range(world_size)]


def _read_ranks(option: str, text: str | None, world_size: int, *, also: str = "") -> set[int]:
    """Return the ranks that a list such as ``0,4-7`` names; all where it was not given."""
    if text is None:
        return set(range(world_size))
    ranks: set[int] = set()
    for entry in text.split(","):
        found = _RANGE.fullmatch(entry)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < world_size:
            raise ConfigError(f"{option} is {text!r}; {also}list ranks from 0 to {world_size - 1}, such as 0,1 or 0-1")
        ranks.update(range(first, last + 1))
    return ranks
