"""Nodes that call in, by ``zspmd-run``: one command a rank under another launcher, and one command a node by hand, over real links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.external_launchers import LAUNCHERS, PROGRAM, RUN, command
from support.leaks import LeakCheck
from support.polling import block_until
from support.script_runs import script
from support.traces import read_trace

SECRET = "6e6f207365637265743a2061207465737427732e"
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS)


def zspmd_run(*arguments: str) -> list[str]:
    return [sys.executable, "-m", RUN, *arguments]


def under(launcher: str, num_ranks: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(launcher, num_ranks, "-m", RUN, "--external", *arguments), **PIPES, **options)


def finish(*processes: subprocess.Popen[str], timeout_s: float = 60.0) -> list[tuple[int, str, str]]:
    """Return exit code, output and standard error of each."""
    ends = []
    for process in processes:
        out, errors = process.communicate(timeout=timeout_s)
        ends.append((process.returncode, out, errors))
    return ends


# --- under another launcher ---


@each_launcher
def test_a_script_runs_as_under_zspmd_run(leak_check: LeakCheck, launcher: str) -> None:
    ((code, out, errors),) = finish(under(launcher, 3, script("meet")))
    assert code == 0, errors
    host = os.uname().nodename
    lines = sorted(out.split("\n")[:-1])
    assert [line.split()[:2] for line in lines] == [[f"[{rank}@{host}]", "6"] for rank in range(3)]
    assert len({line.split()[2] for line in lines}) == 1


@each_launcher
def test_generate_gives_the_tokens_of_one_node(leak_check: LeakCheck, launcher: str) -> None:
    ((code, out, errors),) = finish(under(launcher, 2, "generate", "123+456=", "999+1="))
    assert code == 0, errors
    assert out.splitlines() == ["123+456=579", "999+1=1000"]
    assert "rank 1: weights loaded" in errors


def test_a_trace_has_the_ranks_of_other_nodes(leak_check: LeakCheck, tmp_path: Path) -> None:
    """They share no memory with the driver: what they did comes over the wire, on a clock that was measured."""
    path = tmp_path / "trace.json"
    ((code, _, errors),) = finish(under("torchrun", 2, "--trace", str(path), "generate", "--ignore-eos", "--max-tokens", "40", "1+1="))
    assert code == 0, errors
    trace = read_trace(path)
    host = os.uname().nodename
    near, far = (trace.process(f"rank {rank} ({host})") for rank in range(2))
    assert (near["clock_error_us"], far["clock_error_us"] > 0) == (0.0, True)
    assert (near["is_complete"], far["is_complete"]) == (True, True)
    steps = [{s["args"]["step"] for s in trace.spans(p["name"], "step")} for p in (near, far)]
    assert steps[0] == steps[1] >= set(range(40))
    assert len(trace.spans(far["name"], "all_reduce")) == len(trace.spans(near["name"], "all_reduce")) > 40


@each_launcher
def test_the_exit_code_of_the_first_failure_is_that_of_all(leak_check: LeakCheck, launcher: str) -> None:
    program = 'test "$RANK" != 1 || exit 7; exec sleep 60'
    ((code, _, errors),) = finish(under(launcher, 3, "--no-python", "sh", "-c", program))
    assert code == (1 if launcher == "torchrun" else 7)  # torchrun has no other
    assert "FAILED with exit code 7\n  first cause  rank 1 @ " in errors


def test_a_killed_process_is_named_with_its_ranks(leak_check: LeakCheck) -> None:
    """Without a launcher that ends the others first: these processes believe in one by their environment."""
    facts = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}
    started = [
        subprocess.Popen(
            zspmd_run("--external", "--no-python", "sh", "-c", "echo ready; exec sleep 60"),
            env={**os.environ, **facts, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **PIPES,
        )
        for rank in range(2)
    ]
    assert started[0].stdout is not None
    assert sorted(started[0].stdout.readline().strip()[-5:] for _ in range(2)) == ["ready"] * 2
    begun = time.monotonic()
    started[1].kill()
    (code, _, errors), (killed, _, _) = finish(*started)
    assert (code, killed) == (121, -signal.SIGKILL)
    assert time.monotonic() - begun < 10.0
    assert f"node 1, pid {started[1].pid} on {os.uname().nodename}: its connection was lost" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_to_any_process_ends_the_launch_in_order(leak_check: LeakCheck, number: signal.Signals) -> None:
    facts = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}
    program = "trap 'echo bye; exit 0' TERM INT; echo ready; while :; do sleep 0.05; done"
    started = [
        subprocess.Popen(
            zspmd_run("--external", "--no-python", "sh", "-c", program),
            env={**os.environ, **facts, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **PIPES,
        )
        for rank in range(2)
    ]
    assert started[0].stdout is not None
    for _ in range(2):
        started[0].stdout.readline()
    started[1].send_signal(number)
    (code, out, errors), (node_code, _, _) = finish(*started)
    assert (code, node_code) == (128 + number, 128 + number)
    assert out.count("bye") == 2
    assert f"the process of node 1 got {number.name}" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "3", "x.py"], "3 ranks are asked for, and env has started 2; leave the number out"),
        (["--tp", "3", "generate", "x"], "--nproc-per-node 2 and --tp 3 do not agree"),
        (["--host", "node1", "x.py"], "--external joins ranks that another launcher has started"),
        (["doctor"], "--external means nothing for the program 'doctor'"),
    ],
    ids=["number of ranks", "axes", "hosts", "a program without ranks"],
)
def test_what_does_not_fit_an_external_launch_is_refused(arguments: list[str], message: str) -> None:
    facts = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(zspmd_run("--external", *arguments), env={**os.environ, **facts}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert message in done.stderr


# --- one command a node ---


def by_hand(cluster: Cluster, index: int, *arguments: str, num_nodes: int = 3, **options: Any) -> subprocess.Popen[str]:
    manual = ["--node-rank", str(index), "--nnodes", str(num_nodes), "--master-addr", cluster.hosts[0].address]
    return cluster.run(index, zspmd_run(*manual, *arguments), **PIPES, **options)


def test_nodes_by_hand_meet_in_any_order_with_slots_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    slots = (2, 1, 1)
    processes = [
        by_hand(cluster, index, "--secret-file", str(secret), "--nproc-per-node", str(slots[index]), script("meet")) for index in (2, 1, 0)
    ]
    (last, first, driver) = finish(*processes)
    assert driver[0] == 0, driver[2]
    assert [last[:2], first[:2]] == [(0, ""), (0, "")]
    said = sorted(line.split()[:2] for line in driver[1].splitlines())
    assert said == [["[0@node0]", "10"], ["[1@node0]", "10"], ["[2@node1]", "10"], ["[3@node2]", "10"]]


def test_a_program_runs_on_nodes_by_hand(cluster: Cluster) -> None:
    options: dict[str, Any] = {"num_nodes": 2, "env": {"ZSPMD_SECRET": SECRET}}
    driver, node = finish(*(by_hand(cluster, index, "-q", "--tp", "2", "generate", "123+456=", **options) for index in range(2)))
    assert (driver[0], driver[1]) == (0, "123+456=579\n"), driver[2]
    assert node == (0, "", "")


def test_the_driver_listens_at_its_address_alone_and_nodes_nowhere(cluster: Cluster) -> None:
    options: dict[str, Any] = {"num_nodes": 2, "env": {"ZSPMD_SECRET": SECRET}}
    program = ["--master-port", "23456", "--no-python", "sh", "-c", "echo ready; exec sleep 60"]
    processes = [by_hand(cluster, index, *program, **options) for index in range(2)]
    assert processes[0].stdout is not None
    for _ in range(2):
        processes[0].stdout.readline()
    listening = cluster.listeners(0)
    assert (cluster.hosts[0].address, 23456) in listening
    assert {address for address, _ in listening} == {cluster.hosts[0].address}
    assert cluster.listeners(1) == set()
    for index in range(2):
        for pid in cluster.processes(index):
            assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            is_command = pid == processes[index].pid  # the kernel shows what it was started with
            assert is_command or SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    processes[0].send_signal(signal.SIGINT)
    (code, _, _), (node_code, _, _) = finish(*processes)
    assert (code, node_code) == (130, 130)


def test_a_node_that_is_cut_off_is_named_and_ends_by_itself(cluster: Cluster) -> None:
    options: dict[str, Any] = {"num_nodes": 2, "env": {"ZSPMD_SECRET": SECRET}}
    program = ["--node-timeout", "2", "--no-python", "sh", "-c", "echo ready; exec sleep 60"]
    processes = [by_hand(cluster, index, *program, **options) for index in range(2)]
    assert processes[0].stdout is not None
    for _ in range(2):
        processes[0].stdout.readline()
    begun = time.monotonic()
    cluster.cut(1)
    (code, _, errors) = finish(processes[0])[0]
    assert time.monotonic() - begun < 2.0 + 5.0
    assert code == 121
    assert "node 1" in errors
    block_until(lambda: processes[1].poll() is not None, 7.0)
    (node_code, _, node_errors) = finish(processes[1])[0]
    assert node_code == 121
    assert "the connection to the driver at tcp://" in node_errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-rank", "0", "--nnodes", "2", "--master-addr", "192.0.2.1", "x.py"], "make one with `openssl rand -hex 32`"),
        (["--node-rank", "0", "--nnodes", "2", "x.py"], "--node-rank needs --master-addr"),
        (["--node-rank", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "x.py"], "nodes count from 0 to 1"),
        (["--node-rank", "0", "--nnodes", "2", "--master-addr", "127.0.0.1", "-n", "4", "x.py"], "-n counts the ranks of all nodes"),
        (["--node-rank", "0", "--nnodes", "2", "--master-addr", "127.0.0.1", "generate", "x"], "give --tp, and each node its"),
        (["--secret-file", "s", "generate", "x"], "--secret-file is for scripts, or with --node-rank or --external"),
    ],
    ids=["no secret", "no address", "a number too high", "-n", "a program without axes", "a secret for nobody"],
)
def test_a_place_that_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    done = subprocess.run(zspmd_run(*arguments), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert message in done.stderr


# --- torchrun on several machines ---


def test_a_group_over_torchrun_on_two_machines(cluster: Cluster) -> None:
    def torchrun(index: int) -> subprocess.Popen[str]:
        where = ["--master-addr", cluster.hosts[0].address, "--master-port", "29777"]
        argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(index), "--nproc-per-node", "2", *where]
        return cluster.run(index, [*argv, PROGRAM, "step", "MASTER_ADDR", "LOCAL_RANK"], env={"ZSPMD_SECRET": SECRET}, **PIPES)

    driver, node = finish(*map(torchrun, range(2)))
    assert driver[0] == 0, driver[2]
    assert node[0] == 0, node[2]
    assert '"local_rank": 1, "local_world_size": 2' in driver[1]
    assert f'"MASTER_ADDR": "{cluster.hosts[0].address}", "LOCAL_RANK": "1"' in driver[1]
    assert '"ranks"' not in node[1]
