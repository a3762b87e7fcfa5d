"""The driver against faults of every kind in virtual time: ``support/simulation`` has the runs and what must hold in them.

A seed that fails is printed with all that it stands for and the command that replays it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.simulation.options import AT_START, AT_STOP, DEADLY, ON_THE_WAY, OTHERS, PAUSES, STALLING, Options, draw_options
from support.simulation.run import simulate

from zspmd.runtime.driver import alarm, faults
from zspmd.runtime.driver.gate import WindowGate
from zspmd.runtime.driver.pending import PendingReply
from zspmd.runtime.driver.reply_deadlines import ReplyDeadlines
from zspmd.runtime.driver.step_stream import StepStream
from zspmd.runtime.driver.ticker import Ticker
from zspmd.transport import sockets
from zspmd.transport.frames import StepFrame
from zspmd.transport.window import CreditWindow

TESTS = Path(__file__).parent.parent
NUM_PROCESSES = 2
DIGESTED_SEEDS = 60
MAX_SEEDS_TO_FIND = 400

# Each must have happened in some run: what goes wrong, and every way in which it shows.
FAULTS = (*DEADLY, *STALLING, *AT_START, *AT_STOP, *PAUSES, *OTHERS, *(what for what in ON_THE_WAY if not what.startswith("frame_")))
FRAMES = (
    "message_lost",
    "message_doubled",
    "messages_reordered",
    "frame_garble",
    "frame_foreign",
    "frame_refused",
    "pipe_full",
)
SEEN = (
    *(f"group_fault_{name}" for name in ("WorkerExitedError", "WorkerRaisedError", "ProtocolError", "AnswerLostError", "NodeLostError")),
    *(f"request_{name}" for name in ("WorkerExitedError", "WorkerRaisedError", "WorkerStalledError", "BackpressureError", "ClosedError")),
    *(f"start_{name}" for name in ("WorkerExitedError", "WorkerRaisedError", "ReadyTimeoutError")),
    *(f"close_{name}" for name in ("WorkerExitedError", "WorkerRaisedError", "WorkerStalledError")),
    *(f"event_{kind}" for kind in ("replayed", "stalled", "exited", "failed", "silent", "heard", "closed")),
    *("request_done", "request_cancelled", "call_refused", "start_cancelled", "peer_lost", "ended_by_sigterm", "ended_by_sigkill"),
)


def sweep(first: int, end: int, *options: str, hash_seed: str = "0") -> subprocess.Popen[str]:
    """Run seeds in a process of their own, so that its clock is nobody else's."""
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "support.simulation", str(first), str(end), "--json", *options]
    return subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("first", "num_seeds"),
    [
        pytest.param(0, 20_000, id="20,000 seeds"),
        pytest.param(20_000, 1_000_000, id="1,000,000 seeds", marks=[pytest.mark.long, pytest.mark.timeout(3 * 3600)]),
    ],
)
def test_whatever_goes_wrong_every_await_ends_with_its_answer_or_the_true_cause(first: int, num_seeds: int) -> None:
    share = num_seeds // NUM_PROCESSES
    processes = [sweep(first + share * i, first + share * (i + 1)) for i in range(NUM_PROCESSES)]
    outcomes = [outcome(process) for process in processes]
    assert not [failure for found in outcomes for failure in found["failures"]], "\n".join(
        f for found in outcomes for f in found["failures"]
    )
    reached = sum((Counter(found["reached"]) for found in outcomes), Counter[str]())
    assert [counter for counter in (*FAULTS, *FRAMES, *SEEN) if not reached[counter]] == []


def test_a_seed_is_one_run_to_the_last_event() -> None:
    """In other processes, with other hashes, and beside other work."""
    processes = [sweep(0, DIGESTED_SEEDS, "--digest", hash_seed=hash_seed) for hash_seed in ("1", "2")]
    first, second = (outcome(process)["digest"] for process in processes)
    assert first == second


def take_whatever_comes(self: sockets.StepSubscriber, frame: StepFrame) -> None:
    self._held[self.next_seq] = frame


def do_nothing(self: object, *args: object) -> None:
    """Stands for a part that does not do what it is there for."""


def is_lossy(options: Options) -> bool:
    return options.lose > 0


def is_crowded(options: Options) -> bool:
    return options.window == 1 and len(options.callers) > 1


def has(*kinds: str) -> Callable[[Options], bool]:
    return lambda options: any(fault.what in kinds for fault in options.faults)


@pytest.mark.parametrize(
    ("owner", "name", "broken", "concerns"),
    [
        pytest.param(Ticker, "arm", do_nothing, is_lossy, id="a lost end of the stream is never told"),
        pytest.param(sockets.StepSubscriber, "_hold", take_whatever_comes, is_lossy, id="a rank goes on past a gap"),
        pytest.param(StepStream, "_replay", do_nothing, is_lossy, id="what was lost is not sent again"),
        pytest.param(sockets.StepPublisher, "forget", do_nothing, is_crowded, id="frames are kept for ever"),
        pytest.param(WindowGate, "grant", do_nothing, is_crowded, id="nobody who waits for room gets it"),
        pytest.param(WindowGate, "fail", do_nothing, has(*DEADLY), id="whoever waits for room is not told of a fault"),
        pytest.param(ReplyDeadlines, "watch", do_nothing, has(*STALLING), id="a step has no deadline"),
        pytest.param(PendingReply, "fail", do_nothing, has(*DEADLY), id="an await is not told of a fault"),
        pytest.param(faults, "_severity", lambda seen: 0, has(*DEADLY), id="who is heard of first is blamed"),
        pytest.param(CreditWindow, "due", lambda self, rank: 1 << 60, has("answer_lost"), id="a lost answer is not looked for"),
        pytest.param(alarm, "_NUM_SLICES", 1, has("driver_blocked", "driver_stopped"), id="a pause of the driver counts as time"),
    ],
)
def test_a_broken_part_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any, concerns: Callable[[Options], bool]
) -> None:
    """So that the runs above are known to be able to fail."""
    monkeypatch.setattr(owner, name, broken)
    relevant = (seed for seed in itertools.count() if concerns(draw_options(seed)))
    assert any(simulate(seed).violations for seed in itertools.islice(relevant, MAX_SEEDS_TO_FIND))
