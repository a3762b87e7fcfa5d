"""The driver is killed at any moment of its life: within 5 s no process, file, lock, memory or port of its launch is left.

Ports and abstract sockets live in processes, so with none of these there is none of those; ``leak_check`` looks at the rest.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.latencies import Latencies
from support.leaks import LeakCheck
from support.mortal_driver import PHASES
from support.script_runs import RUN, script

TESTS = Path(__file__).parents[1]
END_S = 5.0
OPTIONS: tuple[list[str], ...] = ([], ["stopped", "tcp"], ["daemons"], ["stopped", "daemons"], ["tcp"])
ENDLESS = ["generate", "--ignore-eos", "--max-tokens", "500", *["zspmd is"] * 8]
COUNTS = pytest.mark.parametrize(
    ("num_groups", "num_programs"), [pytest.param(4, 1, id="quick"), pytest.param(200, 50, id="long", marks=pytest.mark.long)]
)


def begin(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def kill_and_wait(driver: subprocess.Popen[str], leak_check: LeakCheck, latencies: Latencies, run: object) -> None:
    """Kill the driver and time how long anything of it is left."""
    began = time.monotonic()
    driver.kill()
    driver.wait()
    try:
        leak_check.wait_gone(END_S)
    except TimeoutError as error:
        raise AssertionError(f"{error}, of {run}") from None
    latencies.add(time.monotonic() - began, run)


@COUNTS
def test_a_group_ends_with_its_driver(leak_check: LeakCheck, request: pytest.FixtureRequest, num_groups: int, num_programs: int) -> None:
    """Killed before and while it makes its launch, as its ranks load and work, and as it closes; with stopped ranks and daemons too."""
    latencies = Latencies("from the driver's death to nothing left", END_S)
    for seed in range(num_groups):
        chance = random.Random(seed)
        phase = ("start", *PHASES)[seed % 4]
        options = OPTIONS[(seed + seed // 4) % len(OPTIONS)]
        delay_s = chance.random() * {"start": 0.6, "load": 0.15, "steps": 0.1, "shutdown": 0.1}[phase]
        with begin([sys.executable, "-m", "support.mortal_driver", str(chance.randint(1, 3)), *options]) as driver:
            assert driver.stdout is not None
            assert phase == "start" or any(line.strip() == phase for line in driver.stdout), f"seed {seed} never came to its {phase}"
            time.sleep(delay_s)  # the moment of the kill, drawn from the seed
            kill_and_wait(driver, leak_check, latencies, f"seed {seed}: {delay_s:.3f} s into its {phase}, {options}")
    latencies.publish(request)


@COUNTS
@pytest.mark.parametrize("program", ["generate", "script"])
def test_a_program_ends_with_its_driver(
    leak_check: LeakCheck, request: pytest.FixtureRequest, program: str, num_groups: int, num_programs: int
) -> None:
    """``zspmd-run`` is killed while it imports, starts ranks, loads the model or generates."""
    latencies = Latencies(f"from the death of zspmd-run ({program}) to nothing left", END_S)
    arguments = ["--tp", "2", *ENDLESS] if program == "generate" else ["-n", "2", script("stubborn"), "child"]
    for seed in range(num_programs):
        delay_s = random.Random(f"{program}/{seed}").random() * (6.0 if program == "generate" else 1.5)
        with begin([*RUN, *arguments]) as driver:
            time.sleep(delay_s)  # likewise
            kill_and_wait(driver, leak_check, latencies, f"seed {seed}: after {delay_s:.3f} s")
    latencies.publish(request)


def test_a_driver_that_lives_leaves_nothing_either(leak_check: LeakCheck) -> None:
    """The driver that the other tests kill comes to its end when nobody does; so its phases are those that they mean."""
    with begin([sys.executable, "-m", "support.mortal_driver", "2", "daemons"]) as driver:
        told, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert list(dict.fromkeys(told.split())) == list(PHASES)
    leak_check.wait_gone()


@pytest.mark.parametrize("number", [signal.SIGSEGV], ids=["SIGSEGV"])
def test_a_driver_that_crashes_leaves_nothing(leak_check: LeakCheck, number: signal.Signals) -> None:
    with begin([sys.executable, "-m", "support.mortal_driver", "2"]) as driver:
        assert driver.stdout is not None
        assert any(line == "steps\n" for line in driver.stdout)
        driver.send_signal(number)
        assert driver.wait() == -number
        leak_check.wait_gone(END_S)
