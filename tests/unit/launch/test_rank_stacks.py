from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.polling import block_until

from zspmd import process
from zspmd.runtime.launch.rank_stacks import KernelView, RankStacks

OFFER = "from zspmd.process import offer_stacks; offer_stacks()\n"
SPIN = "def spinning():\n    print('ready', flush=True)\n    while True: pass\nspinning()"
# ``PyDLL`` keeps the GIL; the signal ends one call and the next begins.
HOLD_GIL = """
import ctypes, threading
sleep = ctypes.PyDLL(None).sleep
threading.Thread(target=threading.Event().wait, name="other", daemon=True).start()
def holding():
    print('ready', flush=True)
    while True: sleep(1000)
holding()
"""
WAIT = "import signal\nprint('ready', flush=True)\nwhile True: signal.pause()"
BLOCKED = "import signal; from zspmd.process import STACKS_SIGNAL; signal.pthread_sigmask(signal.SIG_BLOCK, [STACKS_SIGNAL])\n" + WAIT
EXECUTE = f"import os, sys; os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', {WAIT!r}])"
MANY_LONG_NAMES = """
import threading
lock = threading.Lock()
def {0}(depth):
    if depth: {0}(depth - 1)
    lock.acquire()
for _ in range(4): threading.Thread(target={0}, args=(90,), daemon=True).start()
while threading.active_count() < 5: pass
print('ready', flush=True)
{0}(90)
""".format("f" * 900)
HANDLES_IT_ITSELF = (
    "import signal; from zspmd.process import STACKS_SIGNAL; signal.signal(STACKS_SIGNAL, lambda *_: print('hit', flush=True))\n"
)


class Program:
    """A process with a ``RankStacks``, which has printed "ready"."""

    def __init__(self, source: str) -> None:
        self.stacks = RankStacks()
        fd = self.stacks.open()
        environment = {**os.environ, process.STACKS_FD: str(fd)}
        self.process = subprocess.Popen([sys.executable, "-c", source], env=environment, pass_fds=(fd,), stdout=subprocess.PIPE)
        os.close(fd)
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        assert self.stdout.readline() == b"ready\n"

    async def take(self) -> str:
        return await self.stacks.take(self.process.pid, self.process.send_signal)

    def wait_state(self, state: str) -> None:
        block_until(lambda: KernelView.read(self.process.pid).state == state)

    def close(self) -> None:
        self.stacks.close()
        with self.process:
            self.process.kill()


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    made: list[Program] = []
    yield made
    for program in made:
        program.close()


def begin(programs: list[Program], source: str) -> Program:
    programs.append(Program(source))
    return programs[-1]


@pytest.mark.parametrize(
    ("source", "state", "function"),
    [(SPIN, "R", "in spinning"), (HOLD_GIL, "S", "in holding"), (WAIT, "S", "in <module>")],
    ids=["endless loop", "C call that holds the GIL", "waits"],
)
async def test_the_kernels_word_is_followed_by_the_stacks(programs: list[Program], source: str, state: str, function: str) -> None:
    program = begin(programs, OFFER + source)
    program.wait_state(state)
    text = await program.take()
    assert text.splitlines()[0].startswith("the kernel says: running" if state == "R" else "the kernel says: sleeping")
    assert "most recent call first" in text
    assert function in text
    assert process.STACKS_READY.decode() not in text
    if source == HOLD_GIL:
        assert text.count("most recent call first") == 2  # of the other thread too


async def test_each_time_there_is_one_stack(programs: list[Program]) -> None:
    program = begin(programs, OFFER + SPIN)
    texts = [await program.take() for _ in range(5)]
    assert [text.count("in spinning") for text in texts] == [1] * 5


async def test_a_stopped_process_is_not_asked_and_answers_again_later(programs: list[Program]) -> None:
    program = begin(programs, OFFER + SPIN)
    program.process.send_signal(signal.SIGSTOP)
    program.wait_state("T")
    for _ in range(3):
        text = await program.take()
        assert "stopped by a signal" in text
        assert len(text.splitlines()) == 1
    program.process.send_signal(signal.SIGCONT)
    program.wait_state("R")
    assert (await program.take()).count("in spinning") == 1


@pytest.mark.parametrize("source", [WAIT, OFFER + EXECUTE, HANDLES_IT_ITSELF + WAIT], ids=["never offered", "executed another", "its own"])
async def test_a_process_that_offers_no_stacks_is_not_signalled(programs: list[Program], source: str) -> None:
    program = begin(programs, source)
    program.wait_state("S")
    text = await program.take()
    assert text.startswith("the kernel says: sleeping")
    assert "has not offered any" in text
    assert not select.select([program.stdout], [], [], 0.1)[0]  # neither ended nor hit


async def test_no_answer_is_said(programs: list[Program]) -> None:
    program = begin(programs, OFFER + BLOCKED)
    assert "no answer within" in await program.take()


async def test_much_is_cut(programs: list[Program]) -> None:
    program = begin(programs, OFFER + MANY_LONG_NAMES)
    text = await program.take()
    assert len(text) < 66_000
    assert text.endswith(" B more")


async def test_a_process_that_has_ended_is_no_error(programs: list[Program]) -> None:
    program = begin(programs, OFFER + WAIT)
    program.process.kill()
    program.wait_state("Z")
    assert "ended, not yet reaped" in await program.take()
    program.process.wait()
    assert (await program.take()).startswith("the kernel says nothing: ")


def test_a_process_that_no_agent_started_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(process.STACKS_FD, raising=False)
    process.offer_stacks()
    assert not KernelView.read(os.getpid()).handles_signal


@pytest.mark.parametrize(("place", "words"), [("", "the kernel says: sleeping"), ("futex_wait", "the kernel says: sleeping in futex_wait")])
def test_the_place_is_told_where_the_kernel_tells_it(place: str, words: str) -> None:
    assert str(KernelView("S", place, handles_signal=False, is_answering=False)) == words
