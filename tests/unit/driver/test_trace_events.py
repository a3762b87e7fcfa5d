"""From records to the trace-event format, without a launch: what cannot be had at will from one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.traces import Trace, check_events, read_trace

from zspmd.config import TraceConfig
from zspmd.errors import ConfigError
from zspmd.runtime.driver.events import GroupEvent
from zspmd.runtime.driver.trace_events import LaunchTimeline, TracedLaunch, TracedProcess
from zspmd.runtime.driver.trace_file import TraceFile, check_trace_path
from zspmd.transport.trace_buffer import TraceBuffer, TraceKind, record_head

US = 1000
AHEAD_NS = 5_000_000
FULL_DISK = """
import resource, sys
from zspmd.runtime.driver.trace_file import TraceFile
file = TraceFile(sys.argv[1])
file.create()
event = {"ph": "M", "pid": 1, "tid": 1, "ts": 0, "name": "process_name", "args": {"name": "driver"}}
file.append([event], {"launch_id": "first"})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
file.append([event] * 10_000, {"launch_id": "second"})
file.append([event], {"launch_id": "third"})
"""


def process(rank: int, buffer: TraceBuffer, **facts: float) -> TracedProcess:
    name = "driver" if rank < 0 else f"rank {rank}"
    return TracedProcess(rank, name, 1, buffer.read(), 0, int(facts.get("offset_ns", 0)), facts.get("error_s", 0.0))


def timeline(driver: TraceBuffer, rank: TracedProcess, *events: GroupEvent) -> Trace:
    line = LaunchTimeline(TracedLaunch(1, 2, process(-1, driver), [rank], events), 0)
    found = list(line.events())
    check_events(found)
    return Trace({"traceEvents": found, "otherData": {"launches": []}})


def one_step(*, ahead_ns: int) -> tuple[TraceBuffer, TraceBuffer]:
    """Return a step that is published at 20 us, received at 30 us, done at 50 us, and collected at 60 us, by a clock that is ahead."""
    driver, rank = TraceBuffer.in_memory(64), TraceBuffer.in_memory(64)
    driver.add(record_head(TraceKind.ASKED_STEP), 1, 10 * US, 20 * US, 25 * US)
    driver.add(record_head(TraceKind.ANSWERED), 1, 60 * US, 65 * US)
    rank.add(record_head(TraceKind.STEP), 1, *(ahead_ns + at * US for at in (30, 50, 15, 55)))
    return driver, rank


def test_spans_that_overlap_without_nesting_are_async() -> None:
    driver, rank = TraceBuffer.in_memory(64), TraceBuffer.in_memory(64)
    for name, begun, done in (("outer", 1, 9), ("inner", 2, 5), ("crossing", 4, 12), ("after", 9, 10)):
        driver.add(record_head(TraceKind.SPAN, driver.name_number(name)), -1, begun * US, done * US)
    trace = timeline(driver, process(0, rank))
    assert [span["name"] for span in trace.spans("driver")] == ["outer", "inner", "after"]
    assert [e["name"] for e in trace.events if e["ph"] == "b"] == ["crossing"]


@pytest.mark.parametrize(
    ("measured_us", "received_us"),
    [(0, 30), (-40, 40), (40, 20)],
    ids=["right", "an answer after it was taken", "a step before it was published"],
)
def test_a_clock_is_set_by_what_messages_prove(measured_us: int, received_us: int) -> None:
    driver, rank = one_step(ahead_ns=AHEAD_NS)
    far = process(0, rank, offset_ns=AHEAD_NS + measured_us * US, error_s=50e-6)
    (step,) = timeline(driver, far).spans("rank 0", "step")
    assert step["ts"] == received_us


def test_what_did_not_end_lasts_until_its_process_did() -> None:
    driver, rank = one_step(ahead_ns=0)
    rank.add(record_head(TraceKind.STEP, 0, 1), 2, 70 * US, 0, 55 * US)
    rank.add(record_head(TraceKind.SPAN, rank.name_number("forward")), 2, 71 * US)
    ends = [GroupEvent("exited", 0, "killed", at=100e-6), GroupEvent("closing", at=300e-6)]
    trace = timeline(driver, process(0, rank), *ends)
    last, span = trace.spans("rank 0", "step")[-1], trace.spans("rank 0", "forward")[0]
    assert last["args"] == {"step": 1, "seq": 2, "unfinished": True}
    assert (last["ts"] + last["dur"], span["ts"] + span["dur"]) == (100, 100)


def test_arrows_are_only_where_both_ends_are_known() -> None:
    driver, rank = one_step(ahead_ns=0)
    lost = TraceBuffer.in_memory(64)
    assert [e for e in timeline(lost, process(0, rank)).events if e["ph"] in "sf"] == []
    assert [e for e in timeline(driver, process(0, lost)).events if e["ph"] in "sf"] == []
    assert len([e for e in timeline(driver, process(0, rank)).events if e["ph"] in "sf"]) == 4


def test_a_record_of_no_known_kind_or_name_harms_nothing() -> None:
    driver, rank = one_step(ahead_ns=0)
    rank.add(200, 1, 1, 2)
    rank.add(record_head(TraceKind.SPAN, 999), 1, 35 * US, 36 * US)
    assert [s["name"] for s in timeline(driver, process(0, rank)).spans("rank 0")] == ["wait", "step", "name 999", "push"]


def test_a_file_is_valid_from_its_creation_on(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    file = TraceFile(str(path))
    file.create()
    assert read_trace(path).events == []
    for number in range(3):
        event = {"ph": "M", "pid": 1, "tid": 1, "ts": 0, "name": "process_name", "args": {"name": f'"{number}"\n'}}
        file.append([event] * 1500, {"launch_id": str(number), "processes": []})
        trace = read_trace(path)
        assert (len(trace.events), [launch["launch_id"] for launch in trace.launches][-1]) == (1500 * (number + 1), str(number))


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert f"zspmd: the trace {path} ends before second: " in done.stderr
    assert [launch["launch_id"] for launch in read_trace(path).launches] == ["first"]
    assert len(json.loads(path.read_text())["traceEvents"]) == 1


def test_a_path_is_checked_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory that can be written; make it first"):
        check_trace_path(tmp_path / "absent" / "t.json")
    with pytest.raises(ConfigError, match="give the path of a file"):
        check_trace_path(tmp_path)
    assert check_trace_path(tmp_path / "t.json") == str(tmp_path / "t.json")


@pytest.mark.parametrize("value", [0, 63, (1 << 24) + 1, True, 1.5])
def test_the_limit_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="max_events is"):
        TraceConfig("t.json", max_events=value)  # type: ignore[arg-type]  # that is the point
    assert TraceConfig("t.json", max_events=65).capacity == 128
