"""The plan of a launch over several nodes, before any of them is asked and at its start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from zspmd.config import NodesConfig, ParallelConfig
from zspmd.runtime.launch.cli import main
from zspmd.runtime.launch.command.folding import fold_numbers
from zspmd.runtime.launch.command.options import LaunchOptions
from zspmd.runtime.launch.command.plan_text import describe_nodes
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.plan import LaunchPlan, NodePlan, RankPlan
from zspmd.runtime.launch.ports import first_candidate

HOSTFILE = "localhost slots=2\nlee@no.such.host.invalid slots=2 port=2222 addr=10.0.0.2 iface=eth1 devices=4,5\nspare:2\n"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "train.py").touch()
    (tmp_path / "hosts").write_text(HOSTFILE)
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["--launch-id", "plan", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_each_node_and_connects_to_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = shown(capsys, "-f", "hosts", "-n", "4", "-x", "KEY=secret", "train.py")
    assert text.startswith(f"plan     launch plan  world 4 = 2 nodes x 2  master ?:{first_candidate('plan', 'master')}\n")
    assert re.search(r"^   0-1 +0-1 +localhost \(local\) +\? +- +\? +\d+$", text, re.MULTILINE)
    assert re.search(r"^   2-3 +0-1 +lee@no\.such\.host\.invalid:2222 +10\.0\.0\.2 +eth1 +cuda:4-5 +\?$", text, re.MULTILINE)
    assert re.search(r"^   env \+\d+.*  by ssh  preflight yes$", text, re.MULTILINE)
    assert "spare" not in text
    assert "secret" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "train.py"]


def test_ranks_that_depend_on_gpus_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--host", "a,b", "train.py")
    assert "world: the GPUs of 2 nodes" in text
    assert len(re.findall(r"^   \? +\? +[ab] ", text, re.MULTILINE)) == 2


def test_uneven_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "world 5 = 2 nodes x 4+1" in shown(capsys, "--host", "a:4,b:1", "train.py")


def test_a_dry_run_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = json.loads(shown(capsys, "-f", "hosts", "-n", "3", "--json", "-x", "KEY=secret", "train.py"))
    assert (told["launch_id"], told["world_size"], told["environment"]["set"], told["relay"]) == ("plan", 3, ["KEY"], "auto")
    nodes = told["nodes"]
    assert [(node["target"], node["is_local"], node["address"]) for node in nodes] == [
        ("localhost", True, None),
        ("lee@no.such.host.invalid:2222", False, "10.0.0.2"),
    ]
    assert nodes[1]["ranks"] == [{"rank": 2, "local_rank": 0, "device": "cuda:4"}]
    assert "secret" not in json.dumps(told)


def test_one_node_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(shown(capsys, "-n", "2", "--devices", "cpu", "--json", "train.py"))
    assert [rank["device"] for rank in told["nodes"][0]["ranks"]] == ["cpu", "cpu"]


def test_json_without_a_dry_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "train.py"]) == 2
    assert "--json prints the plan of --dry-run" in capsys.readouterr().err


def test_a_job_of_a_batch_system_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert main(["--dry-run", "train.py"]) == 0
    told = capsys.readouterr()
    assert "[zspmd] runs on the 2 hosts of SLURM_JOB_NODELIST" in told.err
    assert "world 4 = 2 nodes x 2" in told.out


def test_the_start_shows_what_has_been_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    plan = LaunchPlan(
        launch_id="plan",
        world_size=3,
        ranks=(RankPlan(0, 0, 0, "cuda:0"), RankPlan(1, 1, 0, "cuda:1"), RankPlan(2, 0, 1, "cpu")),
        master_addr="10.0.0.1",
        master_port=24117,
        nodes=(
            NodePlan("node0", "10.0.0.1", "/run/a", iface="eth1", num_cores=8),
            NodePlan("node1", "10.0.0.2", "/run/b", is_local=False, iface="eth0", num_cores=6),
        ),
    )
    hosts = (Host("node0"), Host("node1", user="lee", port=22), Host("spare"))
    options = LaunchOptions(
        ParallelConfig(tp=3), "plan", (), "/logs", is_quiet=False, hosts=hosts, nodes=NodesConfig(relay="on", is_preflight=False)
    )
    lines = describe_nodes(plan, options).splitlines()
    assert lines[0] == "plan     launch plan  world 3 = 2 nodes x 2+1  master 10.0.0.1:24117"
    assert lines[2].split()[:-1] == ["0-1", "0-1", "node0", "(local)", "10.0.0.1", "eth1", "cuda:0-1"]
    assert lines[3].split() == ["2", "0", "lee@node1:22", "10.0.0.2", "eth0", "cpu", "6"]
    assert "relay on  preflight no" in lines[4]
    assert "-1 (TORCHELASTIC_USE_AGENT_STORE)" in lines[4]
    assert lines[5] == "   logs /logs, on each node"


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")], ids=["none", "one", "runs"])
def test_numbers_are_folded(numbers: list[int], text: str) -> None:
    assert fold_numbers(numbers) == text
