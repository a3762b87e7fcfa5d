"""From the entries of a file or list to hosts: repeats are counted, what is excluded is taken out, every problem is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ....errors import ConfigError, HostfileError
from .host import MAX_HOSTS, Host
from .host_entries import HostEntry, read_entry
from .host_fields import shown

MAX_PROBLEMS = 100
_MAX_NAMED = 8
_WAYS = ("user", "port", "addr", "iface", "devices", "python", "max_slots")


@dataclass
class _Mentions:
    """One host and the places that name it; ``slots`` is None while it was named once, without a number."""

    first: HostEntry
    slots: int | None
    last: HostEntry


class HostCollector:
    """Gathers the entries of one source; ``finish`` tells what they come to.

    Args:
        path: the source's name in messages.
        is_list: all entries are on one line, as after --host; messages count its columns.
        is_adding: each mention of a host adds its slots, also where it has a number.
    """

    def __init__(self, path: str, *, is_list: bool = False, is_adding: bool = False) -> None:
        self._path = path
        self._is_list = is_list
        self._is_adding = is_adding
        self._problems: list[tuple[int, int, str]] = []
        self._entries: list[HostEntry] = []
        self._is_over = False

    def add(self, text: str, line: int, column: int = 1) -> None:
        """Take one entry, which is not blank and begins at ``column``."""
        if self._is_over or self._is_full(line, column):
            return
        where = self._path if self._is_list else f"{self._path}:{line}"
        entries, problems = read_entry(text, line=line, where=where, room=MAX_HOSTS - len(self._entries))
        self.refuse(*((line, column - 1 + place, rule) for place, rule in problems))
        self._entries += (replace(entry, column=column - 1 + entry.column) for entry in entries)

    def add_host(self, host: Host, line: int) -> None:
        """Take a host that a program has made."""
        if self._is_over or self._is_full(line, 1):
            return
        named = replace(host, slots=None, where=host.where or f"{self._path}:{line}")
        self._entries.append(HostEntry(named, host.slots, line, 1))

    def refuse(self, *problems: tuple[int, int, str]) -> None:
        """Keep problems: (line, column, rule)."""
        self._problems += problems
        self._is_over = self._is_over or len(self._problems) > MAX_PROBLEMS

    def finish(self, notes: list[str] | None = None) -> list[Host]:
        """Return the hosts in the order of their first mention, each once.

        Args:
            notes: gets a line of text for each thing that was done and may surprise.

        Raises:
            HostfileError: anything is wrong; it has all of it.
        """
        mentions = self._merged([entry for entry in self._entries if not entry.is_excluded])
        said = [*self._count(mentions), *self._exclude(mentions)]
        hosts = [host for mention in mentions.values() if (host := self._made(mention, said)) is not None]
        if not self._problems and not hosts:
            reason = "every host is left out, by having no slots or by '^'" if self._entries else "it names no host"
            self.refuse((0, 0, f"{reason}; name at least one to run on"))
        if self._problems:
            raise HostfileError(self._listed_problems(), path=self._path)
        if notes is not None:
            notes += said
        return hosts

    def _is_full(self, line: int, column: int) -> bool:
        if len(self._entries) >= MAX_HOSTS:
            self.refuse((line, column, f"more than {MAX_HOSTS} entries; what follows was not read"))
            self._is_over = True
        return self._is_over

    def _listed_problems(self) -> list[tuple[int, int, str]]:
        problems = sorted(self._problems)
        if len(problems) > MAX_PROBLEMS:
            line, column, _ = problems[MAX_PROBLEMS]
            problems[MAX_PROBLEMS:] = [(line, column, f"more than {MAX_PROBLEMS} problems; from here on none is listed")]
        return problems

    def _merged(self, entries: list[HostEntry]) -> dict[str, _Mentions]:
        mentions: dict[str, _Mentions] = {}
        for entry in entries:
            mention = mentions.setdefault(entry.host.key, _Mentions(entry, entry.slots, entry))
            if mention.first is not entry:
                self._repeat(mention, entry)
        return mentions

    def _repeat(self, mention: _Mentions, entry: HostEntry) -> None:
        """Add one more mention of a host, which is one slot unless it has a number."""
        first, name = mention.first, shown(entry.host.name)
        both = f"{self._place(first)} and on {self._place(entry)}"
        other = [way for way in _WAYS if getattr(entry.host, way) not in (None, getattr(first.host, way))]
        if not self._is_adding and (entry.slots is not None or first.slots is not None):
            advice = "keep one of them, or no number on any of its lines"
            self.refuse((entry.line, entry.column, f"{name} is on {both}, with a number of slots; {advice}"))
            return
        if other:
            advice = "give that once, where the host is named first"
            self.refuse((entry.line, entry.column, f"{name} is on {both}, with another {other[0]}; {advice}"))
        before = 1 if mention.slots is None else mention.slots
        mention.slots = before + (1 if entry.slots is None else entry.slots)
        mention.last = entry

    def _count(self, mentions: dict[str, _Mentions]) -> Iterator[str]:
        """Where a host is named again and again, each mention of any is one slot; return what there is to say of it."""
        if all(mention.first is mention.last for mention in mentions.values()):
            return
        for mention in mentions.values():
            if mention.slots is None:
                mention.slots = 1
        counts = [f"{mention.first.host.name} {mention.slots}" for mention in mentions.values()]
        named = ", ".join(counts[:_MAX_NAMED]) + (f" and {len(counts) - _MAX_NAMED} hosts more" if len(counts) > _MAX_NAMED else "")
        yield f"{self._path}: hosts are named repeatedly, so their slots add up, one for each mention without a number: {named}"

    def _exclude(self, mentions: dict[str, _Mentions]) -> Iterator[str]:
        excluded = {entry.host.key: entry for entry in self._entries if entry.is_excluded}
        for key, entry in excluded.items():
            if mentions.pop(key, None) is None:
                self.refuse((entry.line, entry.column, f"'^{entry.host.name}' excludes a host that is not named here"))
            else:
                yield f"{self._path}: {entry.host.name} is left out, as '^' on {self._place(entry)} says"

    def _made(self, mention: _Mentions, said: list[str]) -> Host | None:
        first = mention.first
        if mention.slots == 0:
            said.append(f"{self._path}: {first.host.name} is left out, as it has no slots on {self._place(first)}")
            return None
        try:
            return replace(first.host, slots=mention.slots)
        except ConfigError as error:
            self.refuse((first.line, first.column, f"{shown(first.host.name)}: {error}"))
            return None

    def _place(self, entry: HostEntry) -> str:
        return f"column {entry.column}" if self._is_list else f"line {entry.line}"
