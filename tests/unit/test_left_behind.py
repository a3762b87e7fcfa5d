"""Each kind of thing that a test can leave behind is found, and every test of this suite is looked at."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import zmq
from support.holdings import SHARED_MEMORY, Holdings, check_tasks

from zspmd.runtime.launch.run_directory import RunDirectory

TESTS = Path(__file__).parents[1]
NAME = f"zspmd-left-{os.getpid()}"
LEAKING = """
import asyncio, os

def test_nothing(): pass

async def test_tasks(): asyncio.get_running_loop().kept = asyncio.create_task(asyncio.sleep(600))

def test_descriptors(): os.open("/dev/null", os.O_RDONLY)

def test_what_an_earlier_test_left_is_not_blamed_on_this_one(): pass
"""


@contextmanager
def descriptor() -> Iterator[None]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield
    os.close(fd)


@contextmanager
def memory_file() -> Iterator[None]:
    fd = os.memfd_create(NAME)
    yield
    os.close(fd)


@contextmanager
def listening_port() -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)):
        yield


@contextmanager
def abstract_socket() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"\0{NAME}")
        yield


@contextmanager
def zeromq_context() -> Iterator[None]:
    context = zmq.Context()
    context.socket(zmq.PUSH).close()
    yield
    context.term()


@contextmanager
def thread() -> Iterator[None]:
    ended = threading.Event()
    made = threading.Thread(target=ended.wait, name="left")
    made.start()
    yield
    ended.set()
    made.join()


@contextmanager
def child() -> Iterator[None]:
    with subprocess.Popen(["sleep", "600"]) as made:
        yield
        made.kill()


@contextmanager
def zombie() -> Iterator[None]:
    made = subprocess.Popen(["true"])
    os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
    yield
    made.wait()


@contextmanager
def shared_memory() -> Iterator[None]:
    path = SHARED_MEMORY / NAME
    path.touch()
    yield
    path.unlink()


@contextmanager
def run_directory() -> Iterator[None]:
    made = RunDirectory.create("left")
    yield
    made.remove()


@pytest.mark.parametrize(
    ("take", "told"),
    [
        pytest.param(descriptor, r"descriptor \d+ -> /dev/null", id="descriptor"),
        pytest.param(memory_file, rf"descriptor \d+ -> /memfd:{NAME} ", id="memory file"),
        pytest.param(listening_port, r"descriptor \d+ -> socket:\[\d+\] \(tcp \d+: 0100007F:", id="listening port"),
        pytest.param(abstract_socket, rf"descriptor \d+ -> socket:\[\d+\] \(unix .* @{NAME}\)", id="abstract socket"),
        pytest.param(zeromq_context, r"thread ZMQbg/", id="ZeroMQ's threads"),
        pytest.param(thread, r"thread left \(\d+\)", id="thread"),
        pytest.param(child, r"child \d+ \(state S\) sleep 600", id="child"),
        pytest.param(zombie, r"child \d+ \(state Z\)", id="zombie"),
        pytest.param(shared_memory, f"{SHARED_MEMORY}/{NAME}", id="shared memory"),
        pytest.param(run_directory, r"run directory \S+/zspmd/left", id="run directory"),
    ],
)
def test_what_is_left_behind_is_named(take: Callable[[], AbstractContextManager[None]], told: str) -> None:
    before = Holdings.now()
    with take(), pytest.raises(AssertionError, match=told):
        before.check(grace_s=0.05)
    before.check()


async def test_a_task_that_goes_on_is_named() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(asyncio.sleep(600), name="left")
    with pytest.raises(AssertionError, match="left behind: task left in <coroutine object sleep"):
        await check_tasks(before, grace_s=0.05)
    task.cancel()
    await check_tasks(before)


def test_every_test_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    options = ["-p", "conftest", "-c", str(TESTS.parent / "pyproject.toml"), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert re.search(r"^1 failed, 3 passed, 1 error in ", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search("^FAILED .*::test_tasks - AssertionError: left behind: task", done.stdout, re.MULTILINE), done.stdout
    assert re.search("^ERROR .*::test_descriptors - AssertionError: left behind: descriptor", done.stdout, re.MULTILINE), done.stdout
