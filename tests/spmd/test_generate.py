"""``zspmd-run generate`` with the demo model that ships with the package, from the shell's side."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.engines import complete
from support.leaks import LeakCheck
from support.polling import block_until
from support.traces import read_trace

import zspmd
from zspmd.runtime.engine.checkpoint import DEMO_MODEL

RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli"]
LINE = "zspmd is an asyncio message-passing runtime over ZeroMQ. A driver publishes each step once, and every rank runs it."


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_two_ranks_add_and_know_their_line(leak_check: LeakCheck, tmp_path: Path) -> None:
    done = run("--tp", "2", "--log-dir", str(tmp_path / "logs"), "generate", "123+456=", "999+1=", "zspmd is")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["123+456=579", "999+1=1000", LINE])
    assert "rank 1: weights loaded" in done.stderr
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["r00000.err", "r00000.out", "r00001.err", "r00001.out"]


def test_stages_of_unequal_size_and_replicas_give_the_same_text(leak_check: LeakCheck) -> None:
    done = run("--pp", "2", "--dp", "2", "generate", "--pp-partition", "3,1", "123+456=", "999+1=", "zspmd is")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["123+456=579", "999+1=1000", LINE])
    assert re.search(r"rank 2: weights loaded, 2\.8 MB", done.stderr)  # three of the four layers, as --dry-run says
    assert re.search(r"rank 3: weights loaded, 1\.1 MB", done.stderr)


def test_a_trace_shows_every_rank(leak_check: LeakCheck, tmp_path: Path) -> None:
    done = run("-q", "--tp", "2", "--trace", str(tmp_path / "t.json"), "generate", "123+456=")
    assert (done.returncode, done.stdout) == (0, "123+456=579\n")
    trace = read_trace(tmp_path / "t.json")
    assert [len(trace.spans(f"rank {rank} (localhost)", "forward")) >= 4 for rank in range(2)] == [True, True]


def test_prompts_come_from_standard_input_and_answers_as_json(leak_check: LeakCheck) -> None:
    done = run("-q", "generate", "--json", stdin="7+8=\n\n10+20=\n")
    assert done.returncode == 0
    assert not done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(a["prompt"], a["text"], a["finish_reason"]) for a in answers] == [("7+8=", "15", "stop"), ("10+20=", "30", "stop")]


def test_speculation_keeps_the_text_and_says_what_it_did(leak_check: LeakCheck) -> None:
    done = run(
        "--tp", "2", "generate", "--json", "--speculate", "draft:demo,k=3+ngram", "--speculate-policy", "fixed", "123+456=", "zspmd is"
    )
    assert done.returncode == 0
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] + answer["text"] for answer in answers] == ["123+456=579", LINE]
    kept, drafted = (sum(answer["metrics"][name] for answer in answers) for name in ("num_accepted", "num_drafted"))
    assert 0 < kept <= drafted
    assert all(len(a["token_ids"]) <= a["metrics"]["num_steps"] + a["metrics"]["num_accepted"] for a in answers)
    assert re.search(r"done: \d+ tokens in [\d.]+ s, \d+ of \d+ proposed ones kept", done.stderr)


def test_no_prompt_at_all_is_an_error(leak_check: LeakCheck) -> None:
    done = run("generate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no prompt; give one or more as arguments, or one a line on standard input" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="INT"),
        pytest.param(signal.SIGTERM, 143, id="TERM"),
        pytest.param(signal.SIGHUP, 129, id="HUP", marks=pytest.mark.long),
    ],
)
def test_a_signal_in_the_middle_ends_everything(leak_check: LeakCheck, number: signal.Signals, code: int) -> None:
    endless = ["generate", "--ignore-eos", "--max-tokens", "500", *["zspmd is"] * 64]
    with subprocess.Popen([*RUN, "--tp", "2", *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "z"  # the first token is there
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"zspmd-run: ended by {number.name}" in told


def test_a_launch_id_in_use_is_refused_and_its_holder_unharmed(leak_check: LeakCheck) -> None:
    endless = ["--launch-id", "twice", "generate", "--ignore-eos", "--max-tokens", "500", *["zspmd is"] * 64]
    with subprocess.Popen([*RUN, *endless], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.read(1) == "z"
        second = run("--launch-id", "twice", "generate", "1+1=")
        assert second.returncode == 120
        assert f"launch id 'twice' is held by pid {first.pid}" in second.stderr
        assert first.poll() is None
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=20)


def test_a_killed_rank_is_named_and_its_signal_is_the_exit_code(leak_check: LeakCheck) -> None:
    endless = ["generate", "--ignore-eos", "--max-tokens", "500", "--max-restarts", "0", *["zspmd is"] * 64]
    with subprocess.Popen([*RUN, "--tp", "2", *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "z"
        os.kill(rank_pid(process.pid, "zspmd-rank1"), signal.SIGKILL)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 on" in told
    assert "was ended by SIGKILL" in told


def test_a_killed_rank_is_replaced_and_the_text_goes_on(leak_check: LeakCheck) -> None:
    command = [*RUN, "--tp", "2", "generate", "--ignore-eos", "--max-tokens", "200", *["zspmd is"] * 8]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        text = process.stdout.read(1)
        os.kill(rank_pid(process.pid, "zspmd-rank1"), signal.SIGKILL)
        text += process.stdout.read()  # not communicate(): it forgets what read(1) has buffered
        told = process.stderr.read()
    lines = text.splitlines()
    assert (process.returncode, [line[: len(LINE)] for line in lines]) == (0, [LINE] * 8)  # the rank was killed in the middle of it
    assert len(set(lines)) == 1
    assert "was ended by SIGKILL" in told
    assert "restarting the workers, 8 requests go on" in told


def rank_pid(driver_pid: int, name: str) -> int:
    """Return the pid of a rank of this driver: guard, agent, rank."""
    ranks = [pid for guard in children(driver_pid) for agent in children(guard) for pid in children(agent)]
    return next(pid for pid in ranks if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_sums_that_the_model_has_not_seen_are_right() -> None:
    """Of 200 random sums at most 2 may be wrong; a fifth of all pairs was never trained on."""
    chance = random.Random(7)
    pairs = [(chance.randrange(10**digits), chance.randrange(10 ** chance.randint(1, 3))) for digits in (1, 2, 3, 3) for _ in range(50)]
    async with zspmd.Engine("demo", devices="cpu") as engine:

        async def add(a: int, b: int) -> bool:
            output = await complete(engine, f"{a}+{b}=", zspmd.SamplingParams(max_tokens=8, temperature=0))
            return output.text == str(a + b)

        right = await asyncio.gather(*(add(a, b) for a, b in pairs))
    assert sum(right) >= 198


def test_the_demo_models_are_small() -> None:
    main, draft = DEMO_MODEL / "model.safetensors", DEMO_MODEL / "draft" / "model.safetensors"
    assert main.stat().st_size <= 3_000_000
    assert draft.stat().st_size <= main.stat().st_size / 4
    assert (DEMO_MODEL / "tokenizer.json").read_bytes() == (DEMO_MODEL / "draft" / "tokenizer.json").read_bytes()


def test_ctrl_c_ends_the_wait_for_standard_input(leak_check: LeakCheck) -> None:
    with subprocess.Popen([*RUN, "generate"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wchan = Path(f"/proc/{process.pid}/wchan")
        block_until(lambda: "pipe" in wchan.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=10)
    assert (process.returncode, told) == (130, b"")
