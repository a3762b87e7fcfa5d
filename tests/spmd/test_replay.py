"""Recording launches of real ranks, and replaying them through the command line: all ranks, and each alone."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import complete_all
from support.groups import DEADLINES
from support.leaks import LeakCheck
from support.recorded_workers import DIFFER

import zspmd
from zspmd.runtime.engine.checkpoint import DEMO_MODEL
from zspmd.transport.recorded_launch import rank_path

RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli"]
SCRIPT = """
import asyncio, sys
import numpy as np
import zspmd

class Doubler(zspmd.Worker):
    def step(self, inputs):
        return inputs * 2

async def main():
    async with zspmd.launch(Doubler, world_size=2, preload=(), record=sys.argv[1]) as group:
        await group.step(np.arange(3.0))

if __name__ == "__main__":
    asyncio.run(main())
"""


def replay(path: Path, *arguments: str, differ: str = "", options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, DIFFER: differ}
    command = [*RUN, "-q", *options, "replay", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


def launch(worker: str, path: Path, **options: Any) -> zspmd.WorkerGroup:
    defaults: dict[str, Any] = {"world_size": 2, "output_ranks": "all", "deadlines": DEADLINES}
    return zspmd.launch(f"support.recorded_workers:{worker}", record=path, **{**defaults, **options})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record four steps, three of them in flight at once, a call of all ranks, and one of rank 1 that raises."""
    path = tmp_path_factory.mktemp("mixed") / "run.zsr"

    async def record() -> None:
        async with launch("Mixer", path, worker_args={"weight": np.arange(3000.0)}) as group:
            for number, size in enumerate([5, 100_000, 7]):
                await group.submit({"number": number, "x": np.arange(float(size))})
            await group.call("exchange", 1.5)
            with pytest.raises(zspmd.WorkerRaisedError, match="does not like 13"):
                await group.call("fail", 13, ranks=[1])
            await group.step({"number": 3, "x": np.full(4, np.nan)})

    asyncio.run(record())
    return path


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record two steps and a third, in which rank 1 raises and rank 0 waits for it."""
    path = tmp_path_factory.mktemp("failed") / "run.zsr"

    async def record() -> None:
        async with launch("Failing", path) as group:
            for number in range(2):
                await group.step({"number": number})
            with pytest.raises(zspmd.WorkerRaisedError, match="the third step goes wrong"):
                await group.step({"number": 2})

    asyncio.run(record())
    return path


def test_all_ranks_and_each_alone_answer_as_recorded(leak_check: LeakCheck, mixed: Path) -> None:
    assert sorted(mixed.parent.iterdir()) == [mixed, Path(rank_path(str(mixed), 0)), Path(rank_path(str(mixed), 1))]
    rows = ["0     4      1      5      none", "1     4      2      6      none"]
    done = replay(mixed)
    assert (done.returncode, done.stderr, done.stdout.split("\n")[1:]) == (0, "", [*rows, "equal", ""])
    for rank, row in enumerate(rows):
        alone = replay(mixed, "--rank", str(rank))
        assert (alone.returncode, alone.stderr, alone.stdout.split("\n")[1:]) == (0, "", [row, "equal", ""])


def test_the_first_difference_is_named(leak_check: LeakCheck, mixed: Path) -> None:
    where = 'step 2: answer["total"][3]: recorded 9.0, replayed 10.5 (1 of 7 differ)'
    done = replay(mixed, differ="value")
    rows = ["0     4      1      5      none", f"1     4      2      5      {where}"]
    assert (done.returncode, done.stdout.split("\n")[1:]) == (1, [*rows, "different", ""])
    alone = replay(mixed, "--rank", "1", differ="value")
    assert (alone.returncode, where in alone.stdout) == (1, True)


def test_another_collective_is_named_when_a_rank_is_alone(leak_check: LeakCheck, mixed: Path) -> None:
    done = replay(mixed, "--rank", "0", differ="collective")
    assert done.returncode == 1
    asked, recorded = "all_reduce(max) of float32 [3] as number 5 on world", "all_gather() of uint8 [2, 16]"
    assert f"zspmd.errors.ReplayDivergedError: rank 0 asks for {asked}; recorded is {recorded}" in done.stdout


def test_a_file_that_is_cut_is_replayed_up_to_there(leak_check: LeakCheck, mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.zsr"
    shutil.copy(mixed, path)
    os.truncate(path, path.stat().st_size - 100)
    done = replay(path)
    assert done.returncode == 0
    assert f"note: {path} is cut inside the entry at offset " in done.stdout
    alone = replay(path, "--rank", "0")
    assert (alone.returncode, f"cannot read the recording {rank_path(str(path), 0)}: " in alone.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "arguments", "told"),
    [
        (("-n", "3"), (), "--num-ranks is 3, the recording has 2; leave it out, the recording decides"),
        (("--tp", "1"), (), "--tp is 1, the recording has 2"),
        (("--pp", "2"), (), "--pp is 2, the recording has 1"),
        (("--devices", "cpu"), (), "--devices is cpu, the recording has cpu,cpu"),
        ((), ("--rank", "2"), "--rank is 2; the recording has ranks 0 to 1"),
    ],
    ids=["ranks", "tp", "pp", "devices", "rank"],
)
def test_the_command_line_cannot_contradict_the_recording(
    mixed: Path, options: tuple[str, ...], arguments: tuple[str, ...], told: str
) -> None:
    done = replay(mixed, *arguments, options=options)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_failure_fails_again(leak_check: LeakCheck, failed: Path) -> None:
    told = "raised builtins.RuntimeError in its step: the third step goes wrong"
    done = replay(failed)
    assert done.returncode == 0
    assert f"failed as recorded: WorkerRaisedError of rank 1 in step 2: {told}" in done.stdout
    waiting = replay(failed, "--rank", "0")
    assert waiting.returncode == 0
    assert "ends where the launch did, in all_reduce(sum) of float64 [2], number 2 on tp" in waiting.stdout
    failing = replay(failed, "--rank", "1")
    assert failing.returncode == 0
    assert "failed as recorded: builtins.RuntimeError: the third step goes wrong" in failing.stdout


def test_a_failure_of_the_teardown_fails_again(leak_check: LeakCheck, tmp_path: Path) -> None:
    path = tmp_path / "run.zsr"

    async def record() -> None:
        with pytest.raises(zspmd.WorkerRaisedError, match="the end goes wrong"):
            async with launch("FailingAtTheEnd", path, preload=()) as group:
                await group.step({"number": 0})

    asyncio.run(record())
    done = replay(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "failed as recorded: WorkerRaisedError of rank 1 in step 0: raised builtins.RuntimeError in its teardown: the end" in done.stdout
    assert replay(path, differ="failure").returncode == 1
    assert replay(path, "--rank", "1").returncode == 0
    alone = replay(path, "--rank", "1", differ="failure")
    assert (alone.returncode, "failed when it was recorded, and not in the replay" in alone.stdout) == (1, True)


def test_a_failure_that_does_not_come_again_is_a_difference(leak_check: LeakCheck, failed: Path) -> None:
    done = replay(failed, differ="failure")
    assert done.returncode == 1
    assert "step 2: recorded builtins.RuntimeError: 'the third step goes wrong', replayed an answer" in done.stdout
    assert "\nreplayed: no failure\ndifferent\n" in done.stdout


@pytest.mark.parametrize(
    ("axis", "speculation", "ranks"),
    [
        ("tp", None, ([], ["--rank", "1"])),
        ("tp", "draft:demo,k=3,tp=2+ngram:k=2", (["--rank", "0"],)),
        ("pp", None, (["--rank", "0"], ["--rank", "1"])),
    ],
    ids=["plain", "speculating", "stages"],
)
async def test_an_engine_is_replayed(
    axis: str, speculation: str | None, ranks: tuple[list[str], ...], leak_check: LeakCheck, tmp_path: Path
) -> None:
    path = tmp_path / "run.zsr"
    config, parallel = zspmd.EngineConfig(speculation=speculation), zspmd.ParallelConfig(**{axis: 2})
    async with zspmd.Engine(DEMO_MODEL, parallel=parallel, config=config, devices="cpu", deadlines=DEADLINES, record=path) as engine:
        params = [zspmd.SamplingParams(max_tokens=8, temperature=t, seed=7) for t in (0.0, 1.0)]
        await complete_all(engine, ["12+30=", "zspmd is"], params)
    for arguments in ranks:
        done = replay(path, *arguments)
        assert (done.returncode, done.stdout.split("\n")[-2]) == (0, "equal"), done.stdout + done.stderr
        answers = "0" if axis == "tp" else "1"  # the first rank of the last stage
        assert ("were run and have nothing to be compared with" in done.stdout) == (arguments not in ([], ["--rank", answers]))


def test_a_worker_of_a_script_is_found_again(leak_check: LeakCheck, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "script.py", "run.zsr"], cwd=tmp_path, check=True, timeout=60)
    done = replay(tmp_path / "run.zsr", "--rank", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_files_are_refused(leak_check: LeakCheck, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("hello, this is text")
    done = replay(tmp_path / "other")
    assert done.returncode == 2
    assert f"{tmp_path / 'other'} is no recording: it begins with b'hello, t'" in done.stderr
    assert replay(tmp_path / "absent").returncode == 2


@pytest.mark.parametrize("name", ["run.zsr", "run.zsr.r00001"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(zspmd.ConfigError, match=rf"record is '.*run\.zsr', but {tmp_path / name} is there; remove it"):
        launch("Failing", tmp_path / "run.zsr")


def test_a_directory_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(zspmd.ConfigError, match="is no directory that can be written; make it first"):
        launch("Failing", tmp_path / "absent" / "run.zsr")
