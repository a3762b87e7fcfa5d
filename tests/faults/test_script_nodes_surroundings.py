"""Scripts over several nodes inside other launchers; what of a launch may be seen, and what must not be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.cluster_host import ClusterHost
from support.node_faults import AGENT, wait_named
from support.polling import block_until
from support.script_nodes import PIPES, Ended, ScriptNodes, finish, prefixed
from support.script_nodes import script_nodes as script_nodes
from support.script_runs import script
from support.sshd import PORT, SshServers
from support.torch_exits import ABORT, ATTEMPTS
from zmq.utils import z85

from zspmd.transport.records import Bootstrap
from zspmd.transport.schema import read_record

TRAINING = str(Path(__file__).parents[2] / "docs" / "examples" / "torchrun_script.py")
PYTHON = ["--no-python", sys.executable, "-I", "-S", "-c"]
# What ranks of other launchers find, where a launch is nested in them.
NESTS = {
    "torchrun": {
        "RANK": "5",
        "LOCAL_RANK": "5",
        "GROUP_RANK": "1",
        "WORLD_SIZE": "64",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "theirs",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "3",
    },
    "srun": {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "5",
        "SLURM_NTASKS": "64",
        "SLURM_NODEID": "1",
        "SLURM_STEP_ID": "0",
        "PMI_RANK": "5",
        "PMI_SIZE": "64",
    },
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "64",
        "OMPI_COMM_WORLD_LOCAL_RANK": "5",
        "PMIX_RANK": "5",
        "PMIX_NAMESPACE": "theirs",
    },
}
FACTS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT")


@pytest.mark.parametrize("nest", NESTS)
def test_ranks_of_all_nodes_see_this_launch_and_not_the_one_around_it(script_nodes: ScriptNodes, nest: str) -> None:
    process = script_nodes.begin("--no-python", "sh", "-c", "env; echo ready", num_ready=0, env=NESTS[nest])
    ended = finish(process, since=time.monotonic())
    assert ended.code == 0, ended.errors
    for rank, (local_rank, node, size) in enumerate(((0, 0, 2), (1, 0, 2), (0, 1, 1), (0, 2, 1))):
        variables = dict(line.split("=", 1) for line in prefixed(ended.out, rank) if "=" in line)
        told = [variables[name] for name in FACTS]
        assert told == [str(rank), str(local_rank), str(node), "4", str(size), script_nodes.hosts[0].address, "0"]
        ours = {*FACTS, "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
        left = {name for name, value in NESTS[nest].items() if variables.get(name) == value and name not in ours}
        assert left == set()
        assert variables["TORCHELASTIC_RUN_ID"] == variables["ZSPMD_LAUNCH_ID"]


def test_gloo_meets_over_nodes_inside_another_launcher(script_nodes: ScriptNodes) -> None:
    command = script_nodes.argv(script("meet"), slots=(1, 1))
    env = {name: value for nest in NESTS.values() for name, value in nest.items()}
    ended = to_its_end(script_nodes, command, env)
    assert [text.split()[0] for rank in range(2) for text in prefixed(ended.out, rank)] == ["3", "3"], ended.errors


def to_its_end(script_nodes: ScriptNodes, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Ended:
    """Run a launch that uses gloo to its end; again where torch aborted a process on its way out."""
    for _ in range(ATTEMPTS):
        process = script_nodes.cluster.run(0, argv, env=env, **PIPES)
        ended = finish(process, since=time.monotonic(), timeout_s=100.0)
        if ABORT not in ended.errors:
            break
    assert ended.code == 0, ended.errors
    return ended


def losses(script_nodes: ScriptNodes, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines of a training."""
    ended = to_its_end(script_nodes, [*script_nodes.run_argv, *arguments, TRAINING], env)
    return re.findall(r"epoch \d+: loss \S+", ended.out)


@pytest.mark.long
def test_a_training_as_for_torchrun_has_over_three_nodes_the_losses_that_it_has_on_one(
    script_nodes: ScriptNodes, ssh_servers: SshServers
) -> None:
    """By real ssh, and inside what looks like a rank of torchrun."""
    over_nodes = script_nodes.argv(rsh=ssh_servers.command)[len(script_nodes.run_argv) :]
    assert losses(script_nodes, *over_nodes, env=NESTS["torchrun"]) == losses(script_nodes, "-n", "4") != []


# --- secrets, listeners ---

SHOWS = """
import os, pathlib, signal
fd = int(os.environ["ZSPMD_BOOTSTRAP_FD"])
pathlib.Path("secret-" + os.environ["RANK"]).write_bytes(os.pread(fd, 1 << 16, 0))
print("ready", flush=True)
signal.pause()
"""


def secrets_of(directory: Path, world_size: int) -> set[bytes]:
    """Return all key bytes that the ranks were handed, in each form that they could be written down in."""
    found = set()
    for rank in range(world_size):
        bootstrap = read_record(Bootstrap, (directory / f"secret-{rank}").read_bytes())
        assert isinstance(bootstrap, Bootstrap)
        found |= {bootstrap.token, bootstrap.token.hex().encode()}
        if bootstrap.secret_key:
            found |= {bootstrap.secret_key, z85.decode(bootstrap.secret_key), z85.decode(bootstrap.secret_key).hex().encode()}
    return found


def texts_of(host: ClusterHost) -> dict[str, bytes]:
    """Return command line and environment of each process of a host."""
    return {f"/proc/{pid}/{name}": Path(f"/proc/{pid}/{name}").read_bytes() for pid in host.killable() for name in ("cmdline", "environ")}


def test_secrets_are_nowhere_and_listeners_are_the_documented_ones(script_nodes: ScriptNodes, ssh_servers: SshServers) -> None:
    said = script_nodes.directory / "ssh.log"
    command = ["-v", "--log-dir", str(script_nodes.directory / "logs"), "--report", "report.json", *PYTHON, SHOWS]
    process = script_nodes.begin(*command, rsh=f"{ssh_servers.command} -vvv -E {said}", num_ready=4)
    texts = {name: text for host in script_nodes.hosts for name, text in texts_of(host).items()}
    listening = [script_nodes.cluster.listeners(index) - {(host.address, PORT)} for index, host in enumerate(script_nodes.hosts)]
    process.send_signal(signal.SIGTERM)
    ended = finish(process, since=time.monotonic())
    assert ended.code == 143
    secrets = secrets_of(script_nodes.directory, 4)
    assert len(secrets) == 2 + 2 * 3  # one token; a key for each rank of another node
    files = [path for path in script_nodes.directory.rglob("*") if path.is_file() and not path.name.startswith("secret-")]
    assert said in files
    texts |= {str(path): path.read_bytes() for path in files}
    texts |= {f"sshd of node{index}": ssh_servers.log(index).encode() for index in range(3)}
    texts |= {"output": (ended.out + ended.errors).encode()}
    assert any(b"zspmd.runtime.launch.guard" in text for text in texts.values())
    assert [name for name, text in texts.items() for secret in secrets if secret in text] == []
    (store,) = listening[0]  # the coordinator's; the master port is rank 0's, which serves nothing here
    assert store[0] == script_nodes.hosts[0].address
    assert listening[1:] == [set(), set()]


# --- by whom ranks are started ---


def children_of(pid: int, thread: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))


def test_every_rank_is_a_child_of_its_agent_s_main_thread(script_nodes: ScriptNodes) -> None:
    """The kernel sends the signal of a parent's death at the end of the thread that forked, and any other may end at any time."""
    process = script_nodes.begin("--no-python", "sh", "-c", "echo ready; exec sleep 600", num_ready=4)
    for index, count in enumerate((2, 1, 1)):
        agent = wait_named(script_nodes.hosts[index], AGENT)
        assert set(script_nodes.wait_ranks(index, count).values()) <= children_of(agent, agent)
    process.send_signal(signal.SIGTERM)
    assert finish(process, since=time.monotonic()).code == 143


def test_a_rank_that_another_thread_forks_is_not_found_so() -> None:
    """What the test above looks at tells the two apart."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(["sleep", "600"]))
        release.wait(10.0)

    release = threading.Event()
    thread = threading.Thread(target=start)
    own = subprocess.Popen(["sleep", "600"])
    thread.start()
    block_until(lambda: started)
    assert own.pid in children_of(os.getpid(), os.getpid())
    assert started[0].pid not in children_of(os.getpid(), os.getpid())
    for process in (own, *started):
        process.kill()
        process.wait()
    release.set()
    thread.join()
