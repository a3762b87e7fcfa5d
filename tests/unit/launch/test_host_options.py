"""On which machines a command line runs ranks, how they are reached, and how many go where."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from zspmd.config import NodesConfig, ParallelConfig
from zspmd.errors import ConfigError, HostfileError, TopologyError, ZspmdError
from zspmd.runtime.launch.command.command_options import launch_options, script_options
from zspmd.runtime.launch.command.host_options import ManualNode, choose_hosts, read_manual
from zspmd.runtime.launch.command.option_parser import build_parser
from zspmd.runtime.launch.command.options import LaunchOptions, ScriptOptions

BATCH = ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "PE_HOSTFILE", "LSB_DJOB_HOSTFILE")
SLURM = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "2(x3)"}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory with a script and a hostfile, outside of every batch system's job."""
    for name in BATCH:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.py").touch()
    (tmp_path / "hosts").write_text("node0 slots=2\nlee@node1 slots=2 port=2222\nnode2 slots=4\n")
    monkeypatch.chdir(tmp_path)


def arguments(*options: str, command: str = "train.py") -> argparse.Namespace:
    return build_parser([]).parse_args([*options, command])


def script(*options: str) -> ScriptOptions:
    return script_options(arguments(*options))


def program(*options: str) -> LaunchOptions:
    return launch_options(arguments(*options, command="generate"), "generate")


def slots(options: ScriptOptions | LaunchOptions) -> list[tuple[str, int | None]]:
    return [(host.target, host.slots) for host in options.hosts or ()]


@pytest.mark.parametrize(
    ("options", "expected", "world_size"),
    [
        (["-f", "hosts"], [("node0", 2), ("lee@node1", 2), ("node2", 4)], 8),
        (["--hostfile=hosts", "-n", "3"], [("node0", 2), ("lee@node1", 2), ("node2", 4)], 3),
        (["-f", "hosts", "--nnodes", "2"], [("node0", 2), ("lee@node1", 2)], 4),
        (["-f", "hosts", "--nnodes", "2:2"], [("node0", 2), ("lee@node1", 2)], 4),
        (["-f", "hosts", "--exclude", "node1"], [("node0", 2), ("node2", 4)], 6),
        (["-f", "hosts", "--include", "node2:1,3"], [("node2", 2)], 2),
        (["-f", "hosts", "--nproc-per-node", "1"], [("node0", 1), ("lee@node1", 1), ("node2", 1)], 3),
        (["-f", "hosts", "--nproc_per_node", "gpu"], [("node0", None), ("lee@node1", None), ("node2", None)], None),
        (["-f", "hosts", "--nproc-per-node=auto"], [("node0", 2), ("lee@node1", 2), ("node2", 4)], 8),
        (["--host", "a:2,b"], [("a", 2), ("b", None)], None),
        (["--host", "a,b", "--nproc-per-node", "3"], [("a", 3), ("b", 3)], 6),
        (["--host", "a,b", "-n", "2"], [("a", None), ("b", None)], 2),
        ([], [], 1),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) and all(isinstance(word, str) for word in value) else None,
)
def test_hosts_and_the_number_of_ranks(options: list[str], expected: list[tuple[str, int | None]], world_size: int | None) -> None:
    read = script(*options)
    assert (slots(read), read.world_size) == (expected, world_size)


def test_without_hosts_there_are_none() -> None:
    assert script().hosts is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["-f", "hosts", "--host", "a"], ConfigError, "--hostfile and --host are both given"),
        (["-f", "absent"], HostfileError, "absent: it cannot be read"),
        (["--host", "a:two"], HostfileError, "--host"),
        (["--include", "a"], ConfigError, "--include chooses among hosts, and there are none"),
        (["-f", "hosts", "--nnodes", "4"], TopologyError, "4 nodes are asked for, and the hosts are 3"),
        (["-f", "hosts", "-n", "9"], TopologyError, "9 ranks do not fit into 8 slots"),
        (["-f", "hosts", "-n", "gpu"], TopologyError, "-n gpu means this machine, and there are several"),
        (["-f", "hosts", "--nproc-per-node", "cpu"], TopologyError, "--nproc-per-node cpu means this machine"),
        (["-f", "hosts", "--nproc-per-node", "3"], TopologyError, "--nproc-per-node is 3, and hosts:1 gives node0 2 slots"),
        (["-f", "hosts", "--node-rank", "1"], ConfigError, "--node-rank is for one command a node"),
        (["-f", "hosts", "--external"], ConfigError, "--external joins ranks that another launcher has started"),
        (["-f", "hosts", "--devices", "cuda:0,cuda:1"], ConfigError, "lists devices of one machine, and there are several"),
        (["-f", "hosts", "--fanout", "0"], ConfigError, "fanout is 0"),
        (["-f", "hosts", "--ssh-port", "70000"], ConfigError, "ssh_port is 70000"),
        (["-f", "hosts", "--ssh-opt", "'open"], ConfigError, '--ssh-opt is "\'open": No closing quotation'),
        (["-f", "hosts", "--rsh", " "], ConfigError, "rsh is empty"),
        (
            ["--nnodes", "2", "--node-rank", "2", "--master-addr", "h"],
            ConfigError,
            "--node-rank is 2 and --nnodes 2; nodes count from 0 to 1",
        ),
        (["--nnodes", "2", "--node-rank", "1"], ConfigError, "--node-rank needs --master-addr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_contradicts_itself_is_an_error(options: list[str], error: type[ZspmdError], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        script(*options)


def test_how_nodes_are_reached() -> None:
    options = ["--rsh", "ssh -v", "--ssh-port", "22", "--ssh-opt=-o User=lee", "--ssh-opt=-4", "--remote-python", "/opt/python"]
    others = ["--iface", "10.0.0.0/8", "--relay", "off", "--fanout", "8", "--no-preflight", "--allow-same-host", "--node-timeout", "3"]
    read = script("-f", "hosts", *options, *others, "-x", "ZSPMD_SET=1")
    assert read.lease_s == 3.0
    assert read.nodes == NodesConfig(
        rsh="ssh -v",
        ssh_port=22,
        ssh_options=("-o", "User=lee", "-4"),
        python="/opt/python",
        iface="10.0.0.0/8",
        relay="off",
        environment=("ZSPMD_SET",),
        fanout=8,
        is_preflight=False,
        allow_same_host=True,
    )


def test_hosts_are_selected_once() -> None:
    """A second selection among those that are left would refuse slots that are gone."""
    nodes = script("-f", "hosts", "--include", "node2:3", "--nnodes", "1").nodes
    assert (nodes.include, nodes.exclude, nodes.num_nodes) == (None, None, None)


def test_a_list_of_hosts_has_no_short_option_of_doubtful_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments("-H", "a,b")
    assert stopped.value.code == 2
    assert "-H is a list of hosts in Open MPI and a hostfile in DeepSpeed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "environment", "hosts"),
    [
        ([], SLURM, ["n1", "n2", "n3"]),
        (["--nnodes", "2"], SLURM, ["n1", "n2"]),
        (["--host", "localhost"], SLURM, ["localhost"]),
        (["--standalone"], SLURM, None),
        (["--nnodes", "1", "--node-rank", "0"], SLURM, None),
        (["--external"], SLURM, None),
        ([], {**SLURM, "SLURM_STEP_NUM_TASKS": "3"}, None),
        ([], {**SLURM, "WORLD_SIZE": "2"}, None),
        ([], {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, ["n1", "n2", "n3"]),
        ([], {"SLURM_JOB_NODELIST": "n1"}, None),
        ([], {}, None),
    ],
    ids=[
        *("allocation", "some", "explicit host", "standalone", "torchrun's one node", "external"),
        *("one of srun's tasks", "one of torchrun's ranks", "the only task", "one host", "no allocation"),
    ],
)
def test_the_hosts_of_a_job_are_used_where_nobody_names_others(
    options: list[str], environment: dict[str, str], hosts: list[str] | None
) -> None:
    choice = choose_hosts(arguments(*options), environment)
    assert (None if choice.hosts is None else [host.name for host in choice.hosts]) == hosts
    is_told = bool(choice.notes) and "hosts of SLURM_JOB_NODELIST; --host localhost keeps it here" in choice.notes[0]
    assert is_told == (hosts is not None and hosts != ["localhost"])


@pytest.mark.parametrize(
    ("options", "manual"),
    [
        (["--nnodes=2", "--node_rank=1", "--master_addr=node0", "--master_port=29511"], ManualNode(1, 2, "node0", 29511, None)),
        (["--nnodes=2", "--node-rank=0", "--master-addr=::1", "--secret-file", "s"], ManualNode(0, 2, "::1", 0, "s")),
        (["--nnodes=1", "--node_rank=0", "--master_addr=localhost", "--master_port=29511"], None),
        (["--standalone", "--nnodes", "1:1"], None),
    ],
    ids=["torchrun's two nodes", "secret", "torchrun's one node", "standalone"],
)
def test_one_command_on_each_node(options: list[str], manual: ManualNode | None) -> None:
    assert read_manual(arguments(*options)) == manual


@pytest.mark.parametrize(
    ("options", "parallel"),
    [
        ([], ParallelConfig()),
        (["-n", "2"], ParallelConfig(tp=2)),
        (["--nproc-per-node", "2"], ParallelConfig(tp=2)),
        (["--tp", "4"], ParallelConfig(tp=4)),
        (["--tp", "2", "--pp", "2"], ParallelConfig(tp=2, pp=2)),
        (["--pp", "2"], ParallelConfig(pp=2)),
        (["--pp", "2", "-n", "4"], ParallelConfig(tp=2, pp=2)),
        (["--pp", "2", "--dp", "2", "--tp", "2", "-n", "8"], ParallelConfig(tp=2, pp=2, dp=2)),
        (["-f", "hosts"], ParallelConfig(tp=8)),
        (["-f", "hosts", "--tp", "2", "--pp", "2"], ParallelConfig(tp=2, pp=2)),
        (["--host", "a,b", "--nproc-per-node", "2"], ParallelConfig(tp=4)),
        (["--host", "a,b", "--tp", "2"], ParallelConfig(tp=2)),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else None,
)
def test_the_axes_of_a_program(options: list[str], parallel: ParallelConfig) -> None:
    assert program("--devices", "cpu", *options).parallel == parallel


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["-n", "3", "--pp", "2"], TopologyError, "3 ranks cannot be divided by --pp 2 and --dp 1"),
        (["-n", "4", "--tp", "3", "--pp", "2"], TopologyError, "-n 4 and --tp 3 and --pp 2 do not agree"),
        (["--pp", "0"], TopologyError, "pp is 0"),
        (["--host", "a,b"], ConfigError, "nobody says how many ranks there are; give --tp"),
        (["-f", "hosts", "--tp", "9"], TopologyError, "9 ranks do not fit into 8 slots"),
        (["--node-rank", "1"], ConfigError, "--node-rank is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_axes_that_cannot_be(options: list[str], error: type[ZspmdError], words: str) -> None:
    with pytest.raises(error, match=words):
        program("--devices", "cpu", *options)


@pytest.mark.parametrize("option", ["--hostfile", "--host", "--include", "--exclude"])
def test_hosts_mean_nothing_for_a_program_of_one_machine(option: str) -> None:
    parsed = arguments(option, "hosts", command="ps")
    with pytest.raises(ConfigError, match=f"{option} means nothing for the program 'ps'"):
        launch_options(parsed, "ps", takes_hosts=False)


def test_devices_go_to_other_nodes_as_they_were_written() -> None:
    assert (script("-f", "hosts").devices, script("-f", "hosts").device_spec) == ((), "auto")
    assert script("-f", "hosts", "--devices", "cpu").visible_devices == ""
    assert program("-f", "hosts", "--devices", "cuda:1,cuda:0").placement == "cuda:1,cuda:0"
    assert program("--devices", "cpu").placement == ("cpu",)


def test_the_file_that_has_to_be_the_same_everywhere(tmp_path: Path) -> None:
    assert script("-f", "hosts").script == str(tmp_path / "train.py")
    parsed: Any = build_parser([]).parse_args(["-f", "hosts", "-m", "package.train"])
    assert script_options(parsed).script == ""
