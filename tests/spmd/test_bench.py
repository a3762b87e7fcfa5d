"""``zspmd-run bench`` from the shell's side, with tiny numbers: what its tables and its JSON have, and that nothing is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.leaks import LeakCheck
from support.polling import block_until

from zspmd.errors import LaunchError
from zspmd.runtime.programs.bench.machine import installed_version
from zspmd.runtime.programs.bench.side_process import SideProcess

RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli"]
STEP = ["step", "--ranks", "2", "--payload", "64", "--steps", "5", "--turns", "2"]


def bench(tmp_path: Path, *arguments: str, launch: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a benchmark and return its JSON."""
    path = tmp_path / "out.json"
    argv = [*RUN, "-q", *launch, "bench", *arguments, "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told: dict[str, Any] = json.loads(path.read_text())
    assert "command: zspmd-run -q" in done.stdout
    assert all(row["samples"] > 0 for row in told["rows"])
    return told


def sides(told: dict[str, Any], **case: object) -> dict[str, dict[str, Any]]:
    """Return the rows of a case, by side."""
    return {row["side"]: row for row in told["rows"] if case.items() <= row["case"].items()}


def test_a_step_has_round_trips_and_a_pipeline_beside_raw_pyzmq(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, *STEP, "--rivals", "pipes")
    trips = sides(told, **{"ranks": 2, "payload": "64 B", "in flight": 1})
    assert list(trips) == ["zspmd", "raw pyzmq", "multiprocessing pipes"]
    assert [row["samples"] for row in trips.values()] == [10, 10, 10]
    assert (told["baseline"], trips["raw pyzmq"]["ratio"]) == ("raw pyzmq", None)
    assert trips["zspmd"]["ratio"]["lower"] <= trips["zspmd"]["ratio"]["median"] <= trips["zspmd"]["ratio"]["upper"]
    assert {"driver us", "all us", "wake-ups"} == trips["zspmd"]["facts"].keys()
    piped = sides(told, **{"ranks": 2, "payload": "64 B", "in flight": 4})
    assert list(piped) == ["zspmd", "raw pyzmq"]
    assert piped["zspmd"]["facts"]["x trips"] == pytest.approx(trips["zspmd"]["median"] / piped["zspmd"]["median"])


def test_a_step_over_tcp_with_one_reply_and_both_loops(leak_check: LeakCheck, tmp_path: Path) -> None:
    options = ["--rivals", "--transport", "tcp", "--replies", "one", "--loop", "uvloop", "asyncio", "--window", "1"]
    told = bench(tmp_path, "step", "--payload", "1K", "--steps", "5", "--turns", "1", *options, launch=("-n", "2"))
    assert list(sides(told, transport="tcp", ranks=2, replies="one", payload="1 KB")) == ["zspmd", "zspmd, asyncio", "raw pyzmq"]
    assert len(told["rows"]) == 3


def test_rivals_of_torch_do_the_same_step(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "step", "--ranks", "1", "--payload", "64", "--steps", "3", "--turns", "1", "--rivals", "gloo", "torch-rpc")
    assert {"gloo objects", "torch RPC"} <= sides(told, **{"in flight": 1}).keys()
    assert not told["notes"]


@pytest.mark.long
def test_ray_does_the_same_step(leak_check: LeakCheck, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    told = bench(tmp_path, "step", "--ranks", "2", "--payload", "64", "--steps", "3", "--turns", "1", "--rivals", "ray-graph", "ray-calls")
    assert {"Ray compiled graph", "Ray actor calls"} <= sides(told, **{"in flight": 1}).keys()
    assert not told["notes"]


def test_ray_is_named_where_it_is_not_installed(tmp_path: Path) -> None:
    if installed_version("ray") is not None:
        pytest.skip("ray is installed")
    told = bench(tmp_path, "step", "--ranks", "1", "--payload", "64", "--steps", "2", "--turns", "1", "--rivals", "ray-graph")
    assert told["notes"] == ["left out: Ray compiled graph: ray is not installed; pip install ray"]


def test_collectives_by_backend(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "collective", "--ranks", "2", "--size", "64", "4K", "--calls", "5", "--turns", "2")
    assert told["baseline"] == "shm"
    for operation in ("all-reduce", "all-gather"):
        for size in ("64 B", "4 KB"):
            case = sides(told, ranks=2, operation=operation, size=size)
            assert [(row["samples"] > 0, row["ratio"] is None) for row in case.values()] == [(True, True), (True, False)]


def test_the_wire_by_batch(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "wire", "--batch", "1", "256", "--calls", "5", "--turns", "2")
    bytes_of = {batch: sides(told, what="bytes", batch=batch)["zspmd"]["median"] for batch in (1, 256)}
    assert bytes_of == {1: 40, 256: 34 + 6 * 16}, "only new blocks weigh anything"
    times = sides(told, what="encode and decode", batch=256)
    assert list(times) == ["zspmd", "pickle, the same object", "pickle, requests by name"]
    assert times["zspmd"]["samples"] == 10


def test_an_idle_group_by_who_it_is(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "idle", "--ranks", "2", "--seconds", "0.4", "--turns", "2")
    rows = sides(told, ranks=2)
    assert [(side, row["samples"], row["unit"]) for side, row in rows.items()] == [
        ("rank", 4, "% of a core"),
        ("driver", 2, "% of a core"),
        ("supervision", 2, "% of a core"),
    ]


def test_the_scale_of_a_driver_with_a_curve(leak_check: LeakCheck, tmp_path: Path) -> None:
    options = ["--ranks", "2", "4", "8", "--per-node", "2", "--steps", "3", "--turns", "1"]
    told = bench(tmp_path, "scale", *options)
    for answers in ("publish", "all"):
        for ranks in (2, 4, 8):
            rows = sides(told, answers=answers, ranks=ranks)
            assert list(rows) == ["direct", "relayed"]
            assert rows["direct"]["facts"]["us a rank"] == pytest.approx(rows["direct"]["median"] / ranks)
    assert len(told["notes"]) == 4
    assert all("a fit through 2 to 8 ranks" in note and "drawn out, not measured" in note for note in told["notes"])


def test_ctrl_c_in_the_middle_leaves_nothing(leak_check: LeakCheck) -> None:
    endless = [*RUN, "bench", "step", "--ranks", "2", "--payload", "64", "--turns", "100000", "--rivals", "pipes"]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "64 B" not in process.stderr.readline():  # the turns have begun
            pass
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not told, "no case was whole"


async def test_a_side_that_fails_to_start_tells_why(leak_check: LeakCheck) -> None:
    with pytest.raises(LaunchError, match=r"a side ended with exit code 3; it wrote: no luck"):
        async with SideProcess("a side", ["-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"]):
            pass


async def test_a_side_takes_with_it_what_it_started_in_another_session(leak_check: LeakCheck) -> None:
    daemon = "import subprocess as s; s.Popen(['sleep', '600'], start_new_session=True); print('{}', flush=True); input()"
    async with SideProcess("a side", ["-c", daemon]):
        # its starter is told a moment before the kernel has put its arguments in place
        block_until(lambda: any("sleep 600" in argv for argv in leak_check.processes().values()))
    block_until(lambda: not leak_check.processes())
