"""Reads traces, and holds them to the rules of the trace-event format, by which every viewer reads them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

Event = dict[str, Any]
PHASES = {"X", "b", "e", "s", "f", "i", "M"}
NS = 1e-3  # a nanosecond, in the microseconds of the file
_METADATA = {"process_name", "process_sort_index", "process_labels", "thread_name"}


def read_trace(path: Path) -> Trace:
    """Read a file, which must keep every rule."""
    data = json.loads(path.read_text())
    assert data["zspmd_trace"] == 1
    check_events(data["traceEvents"])
    return Trace(data)


class Trace:
    """The events of a file by what they are, and what is known of its launches."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.events: list[Event] = data["traceEvents"]
        self.launches: list[dict[str, Any]] = data["otherData"]["launches"]
        self.rows = {e["args"]["name"]: e["pid"] for e in self.events if e["name"] == "process_name"}

    def spans(self, row: str, name: str | None = None) -> list[Event]:
        """Return the complete events of a row in the order of their beginning."""
        found = [e for e in self.events if e["ph"] == "X" and e["pid"] == self.rows[row] and name in (None, e["name"])]
        return sorted(found, key=lambda event: (event["ts"], -event["dur"]))

    def marks(self, row: str) -> list[str]:
        """Return the names of a row's moments, in order."""
        found = [e for e in self.events if e["ph"] == "i" and e["pid"] == self.rows[row]]
        return [e["name"] for e in sorted(found, key=lambda event: float(event["ts"]))]

    def process(self, name: str) -> dict[str, Any]:
        """Return what the file says of a process."""
        (process,) = (p for launch in self.launches for p in launch["processes"] if p["name"] == name)
        return dict(process)


def end_of(span: Event) -> float:
    return float(span["ts"] + span["dur"])


def check_events(events: list[Event]) -> None:
    """Check every event by itself, that spans of a thread nest, that async events and arrows have both their ends, at spans."""
    for event in events:
        assert event["ph"] in PHASES, event
        assert [type(event[key]) for key in ("pid", "tid", "name")] == [int, int, str], event
        assert isinstance(event["ts"], (int, float)), event
        assert event["ts"] >= 0, event
        assert event["ph"] != "X" or event["dur"] >= 0, event
        assert event["ph"] != "M" or event["name"] in _METADATA, event
        assert event["ph"] not in "besf" or (isinstance(event["id"], str) and event["cat"]), event
    _check_nesting(events)
    _check_async(events)
    _check_arrows(events)


def _check_nesting(events: list[Event]) -> None:
    threads: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for spans in threads.values():
        ends: list[float] = []
        for span in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= span["ts"] + NS / 2:
                ends.pop()
            assert not ends or end_of(span) <= ends[-1] + NS / 2, span
            ends.append(end_of(span))


def _check_async(events: list[Event]) -> None:
    begun = {_async_key(e): e["ts"] for e in events if e["ph"] == "b"}
    ended = {_async_key(e): e["ts"] for e in events if e["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert sum(Counter(e["ph"] for e in events)[phase] for phase in "be") == 2 * len(begun)
    assert all(begun[key] <= ended[key] for key in begun)


def _async_key(event: Event) -> tuple[Any, ...]:
    return event["pid"], event["cat"], event["name"], event["id"]


def _check_arrows(events: list[Event]) -> None:
    tails, tips = ([e for e in events if e["ph"] == phase] for phase in "sf")
    keys = [[(e["cat"], e["name"], e["id"]) for e in ends] for ends in (tails, tips)]
    assert len(set(keys[0])) == len(keys[0])
    assert sorted(keys[0]) == sorted(keys[1])
    left = {key: tail["ts"] for key, tail in zip(keys[0], tails)}
    assert all(left[key] <= tip["ts"] for key, tip in zip(keys[1], tips))
    assert all(tip["bp"] == "e" for tip in tips)
    spans: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] == "X" and event["tid"] == 1:
            spans.setdefault(event["pid"], []).append(event)
    for end in (*tails, *tips):
        assert any(s["ts"] <= end["ts"] <= end_of(s) + NS / 2 for s in spans[end["pid"]]), end
