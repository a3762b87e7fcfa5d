"""Every program of docs/examples runs as its first lines say, and prints what it should."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.leaks import LeakCheck
from support.torch_exits import run_to_its_end

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ZSPMD_RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMEOUT_S = 100
LINES_OF_THE_TORCH_RPC_ACTOR = 26  # of code, in the second example of youkaichao's in vLLM's PR 3466

PRINTED = {
    "echo_group": [
        *(f"rank {rank}: [0.0, 8.0, 16.0]" for rank in range(4)),
        "submitted: [0.0, 8.0, 16.0]",
        "steps seen by ranks 0 and 3: [4, 4]",
        "processes: 4",
    ],
    "batch_scorer": [
        "7 rows, best score 0.984, as in one process: True",
        "100 rows, best score 0.989, as in one process: True",
        "1 rows, best score 0.484, as in one process: True",
    ],
    "parameter_sweep": [
        "rate 0.02: loss 1.76e+00",
        "rate 0.05: loss 1.33e-01",
        "rate 0.10: loss 1.20e-03",
        "rate 0.20: loss 1.20e-08",
        "rate 0.40: loss 9.94e-28",
        "rate 0.70: loss 1.09e-15",
        "rate 0.80: loss 1.20e-08",
        "rate 0.95: loss 1.33e-01",
        "rate 1.01: loss 1.99e+01",
        "best rate 0.40, from 9 trials on 4 ranks",
    ],
    "actor": ["Rank 0: 0", "Rank 1: 2", "Rank 2: 4", "Rank 3: 6"],
}


def run(command: list[str], *arguments: str | Path) -> list[str]:
    """Return the lines that a command prints on stdout, without the rank that ``zspmd-run`` puts in front."""
    with LeakCheck() as leaks:
        whole = [*command, *map(str, arguments)]
        done = run_to_its_end(whole, timeout=TIMEOUT_S, env=os.environ | {"OMP_NUM_THREADS": "1"})
        leaks.check()
    assert done.returncode == 0, done.stderr
    return [re.sub(r"^\[rank \d+\] ", "", line) for line in done.stdout.splitlines()]


def test_every_example_is_run_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*PRINTED, "torchrun_script", "download_once", "rfc3587", "several_nodes"}
    index = (EXAMPLES / "README.md").read_text()
    for name in names:
        assert f"docs/examples/{name}.py" in index
        assert f"docs/examples/{name}.py" in (ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or "")


@pytest.mark.parametrize("name", PRINTED)
def test_a_driver_program_prints_what_it_should(name: str) -> None:
    assert run([sys.executable], EXAMPLES / f"{name}.py") == PRINTED[name]


def test_the_actor_takes_fewer_lines_than_over_torch_rpc() -> None:
    assert num_code_lines(EXAMPLES / "actor.py") < LINES_OF_THE_TORCH_RPC_ACTOR


def num_code_lines(path: Path) -> int:
    """Return how many lines are neither blank nor part of the docstring nor a comment."""
    text = path.read_text()
    docstring = ast.parse(text).body[0]
    assert docstring.end_lineno is not None
    lines = [line.strip() for line in text.splitlines()[docstring.end_lineno :]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("is_compared", [False, pytest.param(True, marks=pytest.mark.long)], ids=["ours", "both"])
def test_a_script_for_torchrun_gives_the_same_losses_under_both(is_compared: bool) -> None:
    script = EXAMPLES / "torchrun_script.py"
    assert "zspmd" not in {
        name.name for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import) for name in node.names
    }
    ours = run([*ZSPMD_RUN, "-n", "2"], script)
    assert [line.partition(":")[0] for line in ours] == ["epoch 0", "epoch 1", "epoch 2"]
    losses = [float(line.split()[-1]) for line in ours]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 < losses[0]
    if is_compared:
        assert run([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], script) == ours


def test_one_rank_of_a_node_downloads(tmp_path: Path) -> None:
    source, cache = tmp_path / "weights.bin", tmp_path / "cache"
    source.write_bytes(bytes(12_345))
    lines = run([*ZSPMD_RUN, "-n", "4"], EXAMPLES / "download_once.py", source, cache)
    assert lines == ["rank 0 downloads weights.bin", f"bytes read by each rank: {[12_345] * 4}"]
    assert [path.name for path in cache.iterdir()] == ["weights.bin"]


def test_coordinator_and_communicator_do_what_the_rfc_asks() -> None:
    lines = run([*ZSPMD_RUN, "-n", "2"], EXAMPLES / "rfc3587.py")
    facts = [f"rank {rank} of 2, local rank {rank}" for rank in range(2)]
    sums = [f"rank {rank}: every element is [3.0]" for rank in range(2)]
    assert sorted(lines) == sorted([*facts, "rank 0 prepares its node", *sums])
    assert min(map(lines.index, sums)) > max(map(lines.index, [*facts, "rank 0 prepares its node"]))  # the barrier


def several_nodes(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """Start the example on the first host of a cluster."""
    command = [sys.executable, str(EXAMPLES / "several_nodes.py"), "--rsh", cluster.rsh(), *arguments]
    return cluster.run(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_group_spans_several_nodes(cluster: Cluster) -> None:
    process = several_nodes(cluster, "4", "node0:2", "node1", "node2")
    lines, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    places = [(0, "node0", 0), (1, "node0", 1), (2, "node1", 0), (3, "node2", 0)]
    assert lines.splitlines() == [f"rank {rank} on {host}, local rank {local}: [0.0, 10.0, 20.0]" for rank, host, local in places]


def test_a_group_says_what_a_node_lacks(cluster: Cluster) -> None:
    process = several_nodes(cluster, "2", "node0", "node1 python=/not/there")
    lines, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 120, errors
    assert re.fullmatch(r"node1: agent: .*exited with code 127: .*/not/there: not found; .*python=.*\n", lines)
