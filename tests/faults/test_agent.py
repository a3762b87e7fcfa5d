"""The agent against ranks, drivers and itself dying; each test ends with nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support.nodes import DAEMON, DEADLINE_S, STUBBORN, WAIT, Nodes, wait_ended
from support.nodes import nodes as nodes
from support.nodes import runtime_dir as runtime_dir

from zspmd.errors import EndpointInUseError, LaunchError
from zspmd.runtime.launch.agent_process import AgentProcess
from zspmd.runtime.launch.agent_protocol import AgentGone, AgentWarning, RankExited, RankStarted
from zspmd.runtime.launch.run_directory import RunDirectory, run_directory_path
from zspmd.runtime.launch.supervisor import AgentLost

DRIVER = """
import asyncio, json, os, signal, sys
from zspmd.runtime.launch.agent_protocol import RankLog, RankStart, Start
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.launch.supervisor import NodeSupervisor

async def drive(program, has_fork):
    daemon = asyncio.get_running_loop().create_future()
    def on_event(event):
        if isinstance(event, RankLog):
            daemon.set_result(int(event.lines[0].split()[1]))
    start = Start((RankStart(0, dict(os.environ)),), "spawn", argv=(sys.executable, "-I", "-S", "-c", program))
    node = NodeSupervisor(on_event)
    node.open()
    await node.start(start, RunDirectory.create("driver"))
    pids = {"guard": node.guard_pid, "agent": node.agent_pid, "rank": node.pids[0], "daemon": await daemon}
    if has_fork:
        fork = os.fork()
        if fork == 0:
            signal.pause()
        pids["fork"] = fork
    print(json.dumps(pids), flush=True)
    signal.pause()

asyncio.run(drive(sys.argv[1], sys.argv[2] == "True"))
"""


async def test_ranks_that_end_by_themselves_end_the_agent(nodes: Nodes) -> None:
    node = await nodes.started("import os, sys; sys.exit(int(os.environ['RANK']) * 7)", 3, "ends")
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.supervisor.exit_codes == {0: 0, 1: 7, 2: 14}
    assert await node.supervisor.stop(0.0, 1.0) == {0: 0, 1: 7, 2: 14}
    assert node.of(AgentGone) == [AgentGone(left=())]
    assert not run_directory_path("ends").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: signal.Signals(number).name)
async def test_a_signal_is_reported_with_the_log_tail(nodes: Nodes, number: int) -> None:
    program = f"import os\nfor i in range(50): print('line', i, flush=True)\nos.kill(os.getpid(), {int(number)})"
    node = await nodes.started(program)
    await node.wait(lambda: bool(node.of(RankExited)))
    (exited,) = node.of(RankExited)
    assert (exited.rank, exited.exit_code) == (0, -number)
    assert exited.pid == node.supervisor.pids[0]
    assert exited.log_tail == tuple(f"line {i}" for i in range(10, 50))
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.parametrize(
    ("program", "exit_code"), [(WAIT, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)], ids=["ends on SIGTERM", "ignores SIGTERM"]
)
async def test_stop_escalates(nodes: Nodes, program: str, exit_code: int) -> None:
    node = await nodes.started(program, 2, "stop")
    await node.wait(lambda: node.lines(0) == node.lines(1) == ["ready"])
    began = time.monotonic()
    codes = await node.supervisor.stop(0.05, 0.3)
    assert codes == {0: exit_code, 1: exit_code}
    assert time.monotonic() - began < 3.0


async def test_a_stopped_rank_gets_to_handle_sigterm(nodes: Nodes) -> None:
    node = await nodes.started("import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n" + WAIT)
    await node.wait(lambda: node.lines(0) == ["ready"])
    os.kill(node.supervisor.pids[0], signal.SIGSTOP)
    assert await node.supervisor.stop(0.0, 5.0) == {0: 3}


async def test_last_words_count_while_a_child_holds_the_pipe(nodes: Nodes) -> None:
    node = await nodes.started("import os, signal\nif os.fork() == 0: signal.pause()\nos.write(1, b'last words'); os._exit(4)")
    await node.wait(lambda: bool(node.of(AgentGone)))
    (exited,) = node.of(RankExited)
    assert (exited.exit_code, exited.log_tail) == (4, ("last words",))
    await node.supervisor.stop(0.0, 1.0)


async def test_a_second_stop_is_quicker_than_the_first(nodes: Nodes) -> None:
    node = await nodes.started(STUBBORN)
    await node.wait(lambda: node.lines(0) == ["ready"])
    began = time.monotonic()
    slow = asyncio.ensure_future(node.supervisor.stop(60.0, 60.0))
    assert await node.supervisor.stop(0.0, 0.1) == {0: -signal.SIGKILL}
    assert await slow == {0: -signal.SIGKILL}
    assert time.monotonic() - began < 5.0


async def test_kill_nowait_ends_everything(nodes: Nodes) -> None:
    node = await nodes.started(STUBBORN, 2, "kill")
    node.supervisor.kill_nowait()
    node.supervisor.kill_nowait()
    await node.supervisor.stop(0.0, 1.0)
    assert node.of(AgentLost) == []


async def test_an_agent_whose_stream_ends_needs_no_killing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[AgentProcess] = []
    monkeypatch.setattr(AgentProcess, "kill_agent", killed.append)
    node = await nodes.started(STUBBORN, 2)
    node.supervisor.kill_nowait()
    await node.supervisor.stop(0.0, 1.0)
    assert killed == []


async def test_stop_before_start_does_nothing(nodes: Nodes) -> None:
    node = nodes.make(WAIT)
    assert await node.supervisor.stop(1.0, 1.0) == {}


async def test_cancelling_start_leaves_nothing(nodes: Nodes) -> None:
    node = nodes.make(WAIT, 4, "cancel")
    starting = asyncio.ensure_future(node.start())
    await asyncio.wait([starting], timeout=0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.parametrize("has_fork", [False, True], ids=["alone", "a fork holds its stream"])
def test_the_death_of_the_driver_ends_ranks_and_daemons(nodes: Nodes, has_fork: bool) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, DAEMON, str(has_fork)], stdout=subprocess.PIPE)
    with driver:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        fork = pids.pop("fork", None)
        for pid in pids.values():
            nodes.watch(pid)
        os.kill(pids["guard"], signal.SIGSTOP)  # which would see to it too, some seconds later
        driver.kill()
        driver.wait(5.0)
        began = time.monotonic()
        nodes.check_nothing_left()
        assert time.monotonic() - began < 5.0
        assert not run_directory_path("driver").exists()
        nodes.pidfds.clear()
        if fork is not None:
            os.kill(fork, signal.SIGKILL)


async def test_a_daemon_ends_with_its_launch(nodes: Nodes) -> None:
    node = await nodes.started(DAEMON)
    await node.wait(lambda: bool(node.lines(0)))
    nodes.watch(int(node.lines(0)[0].split()[1]))
    await node.supervisor.stop(0.0, 1.0)
    assert node.of(AgentGone) == [AgentGone(left=())]


async def test_the_death_of_the_agent_ends_its_ranks(nodes: Nodes) -> None:
    node = await nodes.started(STUBBORN, 2, "agent")
    await node.wait(lambda: node.lines(0) == node.lines(1) == ["ready"])
    for pid in node.supervisor.pids.values():
        nodes.watch(pid)
    assert node.supervisor.agent_pid is not None
    os.kill(node.supervisor.agent_pid, signal.SIGKILL)
    await node.wait(lambda: bool(node.of(AgentLost)))
    assert "SIGKILL" in node.of(AgentLost)[0].reason
    assert await node.supervisor.stop(1.0, 1.0) == {}


async def test_sigterm_to_the_agent_ends_its_ranks(nodes: Nodes) -> None:
    node = await nodes.started(WAIT, 2)
    await node.wait(lambda: node.lines(0) == node.lines(1) == ["ready"])
    assert node.supervisor.agent_pid is not None
    os.kill(node.supervisor.agent_pid, signal.SIGTERM)
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.supervisor.exit_codes == {0: -signal.SIGTERM, 1: -signal.SIGTERM}
    await node.supervisor.stop(0.0, 1.0)


# --- forks of a zygote ---

ENTRY = """
import os, sys
from zspmd.process import BOOTSTRAP_FD, take_bootstrap

def main():
    rank = int(os.environ["RANK"])
    secret = take_bootstrap().decode()
    print(secret, os.getppid() == int(os.environ["AGENT"]) if "AGENT" in os.environ else os.getppid(), os.getsid(0) == os.getpid())
    print(os.getcwd(), BOOTSTRAP_FD in os.environ, sorted(map(int, os.listdir("/proc/self/fd")))[:3], sep="|", file=sys.stderr)
    return rank

def fail():
    raise ValueError("no such luck")

def leave():
    sys.exit("left in words")

def wait():
    import signal
    print("ready", flush=True)
    signal.pause()
"""


def fork_fields(tmp_path: Path, entry: str = "main") -> dict[str, Any]:
    (tmp_path / "entry_of_test.py").write_text(ENTRY)
    return {
        "start_method": "fork",
        "preload": ("entry_of_test",),
        "entry": f"entry_of_test:{entry}",
        "sys_path": (str(tmp_path), *sys.path),
        "cwd": str(tmp_path),
    }


async def test_forked_ranks_have_their_facts(nodes: Nodes, tmp_path: Path) -> None:
    node = await nodes.started("", 4, "fork", **fork_fields(tmp_path))
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.supervisor.exit_codes == {0: 0, 1: 1, 2: 2, 3: 3}
    for rank in range(4):
        assert node.lines(rank) == [f"secret {rank} {node.supervisor.agent_pid} True"]
        assert node.lines(rank, "err") == [f"{tmp_path}|False|[0, 1, 2]"]
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.parametrize(
    ("entry", "words"), [("fail", "ValueError: no such luck"), ("leave", "left in words"), ("absent", "has no attribute 'absent'")]
)
async def test_a_forked_rank_that_raises_exits_with_1(nodes: Nodes, tmp_path: Path, entry: str, words: str) -> None:
    node = await nodes.started("", 1, **fork_fields(tmp_path, entry))
    await node.wait(lambda: bool(node.of(RankExited)))
    (exited,) = node.of(RankExited)
    assert exited.exit_code == 1
    assert words in exited.log_tail[-1]
    await node.supervisor.stop(0.0, 1.0)


async def test_the_death_of_the_agent_ends_forked_ranks(nodes: Nodes, tmp_path: Path) -> None:
    node = await nodes.started("", 2, **fork_fields(tmp_path, "wait"))
    await node.wait(lambda: node.lines(0) == node.lines(1) == ["ready"])
    for pid in node.supervisor.pids.values():
        nodes.watch(pid)
    assert node.supervisor.agent_pid is not None
    os.kill(node.supervisor.agent_pid, signal.SIGKILL)
    await node.wait(lambda: bool(node.of(AgentLost)))
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import absent_module", "No module named 'absent_module'"),
        ("import threading, signal; threading.Thread(target=signal.pause, daemon=True).start()", "started threads"),
        ("import os; os._exit(3)", "exited with code 3"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
    ids=["a missing module", "a thread", "an exit", "SystemExit"],
)
async def test_a_preload_that_fails_fails_the_launch(nodes: Nodes, tmp_path: Path, source: str, words: str) -> None:
    fields = fork_fields(tmp_path)
    (tmp_path / "preload_of_test.py").write_text(source)
    node = nodes.make("", 2, "preload", **{**fields, "preload": ("preload_of_test",)})
    with pytest.raises(LaunchError, match=words):
        await node.start()
    assert node.of(RankStarted) == []


# --- spawned ranks ---


async def test_spawned_ranks_have_their_facts(nodes: Nodes, tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        with open(int(os.environ["ZSPMD_BOOTSTRAP_FD"]), "rb") as file:
            secret = file.read().decode()
        print(secret, os.getppid(), os.getsid(0) == os.getpid(), os.getcwd(), sys.stdin.read() == "")
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, sorted(map(int, os.listdir("/proc/self/fd")))[:3])
    """
    node = await nodes.started(textwrap.dedent(program), 2, "facts", cwd=str(tmp_path))
    await node.wait(lambda: bool(node.of(AgentGone)))
    for rank in range(2):
        assert node.lines(rank) == [
            f"secret {rank} {node.supervisor.agent_pid} True {tmp_path} True",
            "True [0, 1, 2]",
        ]
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.parametrize(("name", "exit_code"), [("absent", 127), ("plain", 126)], ids=["missing", "not executable"])
async def test_a_program_that_cannot_be_executed(nodes: Nodes, tmp_path: Path, name: str, exit_code: int) -> None:
    (tmp_path / "plain").write_text("no program")
    node = await nodes.started("", argv=(str(tmp_path / name),))
    await node.wait(lambda: bool(node.of(RankExited)))
    (exited,) = node.of(RankExited)
    assert exited.exit_code == exit_code
    assert "cannot execute" in exited.log_tail[0]
    await node.supervisor.stop(0.0, 1.0)


# --- logs ---


async def test_log_files_have_the_raw_bytes(nodes: Nodes, tmp_path: Path) -> None:
    program = r"import os; os.write(1, b'a\xff\n 10%\r 90%\rdone\nlast'); os.write(2, b'err\n')"
    node = await nodes.started(program, 2, log_dir=str(tmp_path / "logs"))
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.lines(1) == ["a\N{REPLACEMENT CHARACTER}", "done", "last"]
    assert node.lines(1, "err") == ["err"]
    assert (tmp_path / "logs" / "r00001.out").read_bytes() == b"a\xff\n 10%\r 90%\rdone\nlast"
    assert (tmp_path / "logs" / "r00001.err").read_bytes() == b"err\n"
    await node.supervisor.stop(0.0, 1.0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
async def test_a_full_disk_is_one_warning(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "r00000.out").symlink_to("/dev/full")
    node = await nodes.started("print('one', flush=True); print('two', flush=True)", log_dir=str(tmp_path))
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.supervisor.exit_codes == {0: 0}
    assert node.lines(0) == ["one", "two"]
    (warning,) = node.of(AgentWarning)
    assert "r00000.out" in warning.reason
    await node.supervisor.stop(0.0, 1.0)


async def test_a_log_directory_that_cannot_be_made_fails_the_launch(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    node = nodes.make(WAIT, 2, log_dir=str(tmp_path / "file" / "logs"))
    with pytest.raises(LaunchError, match="Not a directory"):
        await node.start()


async def test_a_rank_that_prints_faster_than_the_driver_reads_is_not_held_up(nodes: Nodes, tmp_path: Path) -> None:
    program = "import os\nfor i in range(1000): os.write(1, b'x' * 32767 + b'\\n')"
    node = await nodes.started(program, log_dir=str(tmp_path))
    nodes.watch(node.supervisor.pids[0])
    # This loop does not run meanwhile, so the agent's stream fills up.
    assert wait_ended(nodes.pidfds[node.supervisor.pids[0]], DEADLINE_S)
    await node.wait(lambda: bool(node.of(AgentGone)))
    assert node.supervisor.exit_codes == {0: 0}
    assert (tmp_path / "r00000.out").stat().st_size == 1000 * 32768
    assert 0 < len(node.lines(0)) < 1000
    await node.supervisor.stop(0.0, 1.0)


async def test_a_held_launch_id_is_held_by_the_agent_too(nodes: Nodes) -> None:
    node = await nodes.started(WAIT, 1, "held")
    assert node.directory is not None
    os.close(node.directory.lock_fd)
    node.directory.lock_fd = -1
    with pytest.raises(EndpointInUseError, match=str(os.getpid())):
        RunDirectory.create("held")
    await node.supervisor.stop(0.0, 1.0)
    RunDirectory.create("held").remove()
