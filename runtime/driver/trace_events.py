"""From what driver and ranks have written down to events of the trace-event format, which Perfetto and chrome://tracing read.

One process row for the driver and one for each rank, all on the driver's clock. What one thread did is complete events ("X"), which nest;
what overlaps by nature, or by chance, is async events ("b", "e"); a message is an arrow ("s", "f") from the span that sent it to the span
that it began. docs/tracing.md says what each means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...transport.trace_buffer import TraceKind, TraceRecords
from .events import GroupEvent

Event = dict[str, Any]
DRIVER_ROW = 1
_FIRST_RANK_ROW = 2
_STEPS = (TraceKind.STEP, TraceKind.CALL)
_ASKED = (TraceKind.ASKED_STEP, TraceKind.ASKED_CALL)


@dataclass(frozen=True)
class TracedProcess:
    """What one process has written down.

    Attributes:
        rank: -1 for the driver.
        name: of its row.
        num_dropped: records that were overwritten by later ones.
        offset_ns: by how much its clock is ahead of the driver's, to within ``error_s``; infinite where nobody has measured.
    """

    rank: int
    name: str
    pid: int | None
    records: TraceRecords
    num_dropped: int
    offset_ns: int = 0
    error_s: float = 0.0


@dataclass(frozen=True)
class TracedLaunch:
    """One launch of a trace: its driver, its ranks in order, and what happened to the group.

    Attributes:
        number: from 1, where the ranks of one trace are replaced.
        first_row: the process id of rank 0's row.
    """

    number: int
    first_row: int
    driver: TracedProcess
    ranks: Sequence[TracedProcess]
    events: Sequence[GroupEvent]


@dataclass
class _Asked:
    """A step or call as the driver saw it, on its clock."""

    args: Event
    asked_ns: int
    encoded_ns: int
    published_ns: int
    answered_ns: dict[int, tuple[int, int]] = field(default_factory=dict)  # by rank


class LaunchTimeline:
    """Makes the events of one launch; times are microseconds since ``base_ns`` of the driver's monotonic clock."""

    def __init__(self, launch: TracedLaunch, base_ns: int) -> None:
        self._launch = launch
        self._base_ns = base_ns
        self._asked = _read_asked(launch.driver.records)
        self.ranks = [process if process.error_s == 0 else self._on_time(process) for process in launch.ranks]
        self._end_ns = max([_last_moment(process) for process in (launch.driver, *self.ranks)] + [_at_ns(e) for e in launch.events])
        self._exits = {event.rank: _at_ns(event) for event in launch.events if event.kind == "exited"}

    def events(self) -> Iterator[Event]:
        """Yield every event, in no order."""
        yield from self._driver_events()
        for process in self.ranks:
            yield from self._rank_events(process)

    def _on_time(self, process: TracedProcess) -> TracedProcess:
        """Return a process of another node with its clock set by what no measurement can outweigh: nothing arrives before it was sent."""
        lowest_ns, highest_ns = -(1 << 62), 1 << 62
        for kind, _, _, _, seq, received_ns, done_ns, *_ in process.records.table.tolist():
            asked = self._asked.get(seq) if kind in _STEPS else None
            if asked is not None:
                highest_ns = min(highest_ns, received_ns - asked.encoded_ns)
                if done_ns and process.rank in asked.answered_ns:
                    lowest_ns = max(lowest_ns, done_ns - asked.answered_ns[process.rank][0])
        if lowest_ns > highest_ns:  # the clocks have run apart meanwhile: no single offset is right
            return process
        return replace(process, offset_ns=min(max(process.offset_ns, lowest_ns), highest_ns))

    def _driver_events(self) -> Iterator[Event]:
        process = self._launch.driver
        lanes = _Lanes(DRIVER_ROW, process, self._base_ns, self._launch.number)
        yield from lanes.named("event loop")
        for event in self._launch.events:
            args = {"detail": event.detail} if event.rank is None else {"detail": event.detail, "rank": event.rank}
            yield {"ph": "i", "s": "p", "pid": DRIVER_ROW, "tid": 1, "ts": lanes.ts(_at_ns(event)), "name": event.kind, "args": args}
        for seq, asked in self._asked.items():
            lanes.span(0, "encode", "wire", asked.asked_ns, asked.encoded_ns, asked.args)
            lanes.span(0, "publish", "wire", asked.encoded_ns, asked.published_ns, asked.args)
            for rank, (begun_ns, done_ns) in asked.answered_ns.items():
                lanes.span(0, "collect", "wire", begun_ns, done_ns, {**asked.args, "rank": rank})
            is_open = len(asked.answered_ns) < len(self._launch.ranks)
            end_ns = self._end_ns if is_open else max(done_ns for _, done_ns in asked.answered_ns.values())
            args = {**asked.args, "unfinished": True} if is_open else asked.args
            yield from lanes.overlapping("in flight", "step", f"{self._launch.number}.{seq}", asked.asked_ns, end_ns, args)
        yield from lanes.plain(process, self._end_ns, {})
        yield from lanes.nested()

    def _rank_events(self, process: TracedProcess) -> Iterator[Event]:
        lanes = _Lanes(self._launch.first_row + process.rank, process, self._base_ns, self._launch.number)
        yield from lanes.named("steps")
        end_ns = self._exits.get(process.rank, self._end_ns) + process.offset_ns
        frames: dict[int, Event] = {}
        for kind, _, _, detail, seq, received, done, waiting, answered in process.records.table.tolist():
            if kind in _STEPS:
                asked = self._asked.get(seq)
                args = {"step": detail, "seq": seq} if kind == TraceKind.STEP else asked.args if asked is not None else {"seq": seq}
                frames[seq] = args
                name = "step" if kind == TraceKind.STEP else "call"
                name = args.get("call", name)
                lanes.span(0, "wait", "wait", waiting, received, args)
                lanes.span(0, name, "step", received, done or end_ns, args if done else {**args, "unfinished": True})
                if done:
                    lanes.span(0, "push", "wire", done, answered, args)
                if asked is not None:
                    yield from self._arrows(lanes, process.rank, seq, asked, received, done)
        yield from lanes.plain(process, end_ns, frames)
        yield from lanes.nested()

    def _arrows(self, lanes: _Lanes, rank: int, seq: int, asked: _Asked, received_ns: int, done_ns: int) -> Iterator[Event]:
        """Yield the way of one step to a rank and back. An arrow leaves 1 ns after its span began, inside it and before it can arrive."""
        driver = _Lanes(DRIVER_ROW, self._launch.driver, self._base_ns, self._launch.number)
        flow_id = f"{self._launch.number}.{seq}.{rank}"
        published_ns, offset_ns = asked.encoded_ns, lanes.offset_ns
        yield from lanes.overlapping("transit", "transit", flow_id, published_ns + offset_ns, received_ns, asked.args)
        yield driver.flow("s", "publish", flow_id, published_ns + 1)
        yield lanes.flow("f", "publish", flow_id, received_ns + 1)
        if done_ns and rank in asked.answered_ns:
            yield lanes.flow("s", "answer", flow_id, done_ns + 1)
            yield driver.flow("f", "answer", flow_id, asked.answered_ns[rank][0] + 1)


class _Lanes:
    """The row of one process: its threads, each with spans of its own."""

    def __init__(self, row: int, process: TracedProcess, base_ns: int, launch_number: int) -> None:
        self.offset_ns = process.offset_ns
        self._row = row
        self._process = process
        self._base_ns = base_ns + process.offset_ns
        self._launch_number = launch_number
        self._spans: dict[int, list[tuple[int, int, Event]]] = {}
        self._num_async = 0

    def ts(self, at_ns: int) -> float:
        return round((at_ns - self._base_ns) / 1000, 3)

    def named(self, first_thread: str) -> Iterator[Event]:
        """Yield the names of the row and of its threads."""
        process = self._process
        threads = {0: first_thread}
        for kind, thread, name, *_ in process.records.table.tolist():
            if kind == TraceKind.THREAD:
                threads[thread] = _name(process.records, name)
            else:
                threads.setdefault(thread, f"thread {thread}")
        facts: dict[str, Event] = {"process_name": {"name": process.name}, "process_sort_index": {"sort_index": self._row}}
        if process.pid is not None:
            facts["process_labels"] = {"labels": f"pid {process.pid}"}
        for name, args in facts.items():
            yield {"ph": "M", "pid": self._row, "tid": 1, "ts": 0, "name": name, "args": args}
        for thread, name in threads.items():
            yield {"ph": "M", "pid": self._row, "tid": thread + 1, "ts": 0, "name": "thread_name", "args": {"name": name}}

    def span(self, thread: int, name: str, category: str, begun_ns: int, done_ns: int, args: Event) -> None:
        """Keep a span, for ``nested``."""
        event = {"ph": "X", "pid": self._row, "tid": thread + 1, "name": name, "cat": category, "args": args}
        self._spans.setdefault(thread, []).append((begun_ns, max(begun_ns, done_ns), event))

    def plain(self, process: TracedProcess, end_ns: int, frames: dict[int, Event]) -> Iterator[Event]:
        """Keep the spans that the process has named itself, and those of its collectives; yield its marks."""
        records = process.records
        for kind, thread, name, detail, seq, begun_ns, done_ns, size_bytes, _ in records.table.tolist():
            if kind not in (TraceKind.SPAN, TraceKind.COLLECTIVE, TraceKind.MARK):
                continue
            args = dict(frames.get(seq, {"seq": seq} if seq >= 0 else {}))
            if kind == TraceKind.MARK:
                at = {"pid": self._row, "tid": thread + 1, "ts": self.ts(begun_ns)}
                yield {"ph": "i", "s": "t", **at, "name": _name(records, name), "args": args}
                continue
            if kind == TraceKind.COLLECTIVE:
                args.update(axis=_name(records, detail), bytes=size_bytes)
            if not done_ns:
                args["unfinished"] = True
            category = "collective" if kind == TraceKind.COLLECTIVE else "span"
            self.span(thread, _name(records, name), category, begun_ns, done_ns or end_ns, args)

    def nested(self) -> Iterator[Event]:
        """Yield the spans that were kept: one that overlaps another of its thread without lying inside it as an async event."""
        for spans in self._spans.values():
            open_ends: list[int] = []
            for begun_ns, done_ns, event in sorted(spans, key=lambda span: (span[0], -span[1])):
                while open_ends and open_ends[-1] <= begun_ns:
                    open_ends.pop()
                if not open_ends or done_ns <= open_ends[-1]:
                    open_ends.append(done_ns)
                    yield {**event, "ts": self.ts(begun_ns), "dur": round((done_ns - begun_ns) / 1000, 3)}
                else:
                    self._num_async += 1
                    async_id = f"{self._launch_number}.{self._row}.{self._num_async}"
                    yield from self.overlapping(event["name"], event["cat"], async_id, begun_ns, done_ns, event["args"])

    def overlapping(self, name: str, category: str, async_id: str, begun_ns: int, done_ns: int, args: Event) -> Iterator[Event]:
        """Yield an async event, which may overlap others of its name."""
        common = {"pid": self._row, "tid": 1, "cat": category, "id": async_id, "name": name}
        yield {"ph": "b", **common, "ts": self.ts(begun_ns), "args": args}
        yield {"ph": "e", **common, "ts": self.ts(max(begun_ns, done_ns))}

    def flow(self, phase: str, name: str, flow_id: str, at_ns: int) -> Event:
        """Return one end of an arrow: "s" where it leaves, "f" where it arrives, at the span around that moment."""
        event = {"ph": phase, "pid": self._row, "tid": 1, "ts": self.ts(at_ns), "cat": name, "id": flow_id, "name": name}
        return {**event, "bp": "e"} if phase == "f" else event


def row_of(launch: TracedLaunch, process: TracedProcess) -> int:
    """Return the process id of a process's row."""
    return DRIVER_ROW if process.rank < 0 else launch.first_row + process.rank


def next_first_row(launch: TracedLaunch | None) -> int:
    """Return the row of rank 0 in the launch after this one."""
    return _FIRST_RANK_ROW if launch is None else launch.first_row + len(launch.ranks)


def _read_asked(records: TraceRecords) -> dict[int, _Asked]:
    """Return what the driver asked, by frame, with when each rank's answer was taken."""
    asked: dict[int, _Asked] = {}
    for kind, _, name, detail, seq, t0, t1, t2, _ in records.table.tolist():
        if kind in _ASKED:
            args = {"step": detail, "seq": seq} if kind == TraceKind.ASKED_STEP else {"call": _name(records, name), "seq": seq}
            asked[seq] = _Asked(args, t0, t1, t2)
    for kind, _, _, detail, seq, t0, t1, *_ in records.table.tolist():
        if kind == TraceKind.ANSWERED and seq in asked:
            asked[seq].answered_ns[detail] = (t0, t1)
    return asked


def _name(records: TraceRecords, number: int) -> str:
    return records.names[number] if number < len(records.names) else f"name {number}"


def _at_ns(event: GroupEvent) -> int:
    return round(event.at * 1e9)


def _last_moment(process: TracedProcess) -> int:
    """Return the last moment that a process wrote down, on the driver's clock; 0 for none."""
    table = process.records.table
    if not len(table):
        return 0
    return max(int(table[name].max()) for name in ("t0", "t1")) - process.offset_ns
