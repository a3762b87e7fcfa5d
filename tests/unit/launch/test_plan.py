from __future__ import annotations

import pytest

from zspmd.errors import ConfigError, TopologyError
from zspmd.runtime.launch import plan as plan_module
from zspmd.runtime.launch.plan import FACT_NAMES, LaunchPlan, NodePlan, RankPlan, plan_local


def make_plan(world_size: int = 4) -> LaunchPlan:
    return plan_local(launch_id="job", world_size=world_size, master_port=20123, run_directory="/run/job", devices="cpu")


def test_a_local_plan_puts_every_rank_on_one_node() -> None:
    plan = make_plan(2)
    assert plan.ranks == (RankPlan(0, 0, 0, "cpu"), RankPlan(1, 1, 0, "cpu"))
    assert plan.hosts == ("localhost",)
    assert [row["rank"] for row in plan.describe()] == ["0", "1"]
    assert {row["device"] for row in plan.describe()} == {"cpu"}


def test_the_names_of_the_facts_are_those_that_ranks_are_told() -> None:
    told = {
        name for name, value in make_plan().rank_environment(0, dict.fromkeys(FACT_NAMES, "not a fact")).items() if value != "not a fact"
    }
    assert told - {"OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "TORCH_NCCL_ASYNC_ERROR_HANDLING"} == FACT_NAMES


def test_ranks_are_told_the_facts_of_rfc_3587_and_the_names_of_torch() -> None:
    assert make_plan().rank_environment(3, {"OMP_NUM_THREADS": "5"}) == {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "NODE_RANK": "0",
        "NNODES": "1",
        "ROLE_NAME": "zspmd",
        "ROLE_RANK": "3",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "20123",
        "OMP_NUM_THREADS": "5",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "ZSPMD_LAUNCH_ID": "job",
        "ZSPMD_NODE_ADDR": "127.0.0.1",
        "ZSPMD_RANK": "3",
        "ZSPMD_LOCAL_RANK": "3",
        "ZSPMD_WORLD_SIZE": "4",
        "ZSPMD_LOCAL_WORLD_SIZE": "4",
        "ZSPMD_DEVICE": "cpu",
        "ZSPMD_RUN_DIR": "/run/job",
    }


def test_ranks_of_a_second_node_count_locally() -> None:
    ranks = tuple(RankPlan(rank, rank % 2, rank // 2, "cpu") for rank in range(4))
    nodes = (NodePlan("a", "10.0.0.1", "/run/job", iface="eth0"), NodePlan("b", "10.0.0.2", "/run/job@1", is_local=False, num_cores=9))
    plan = LaunchPlan("job", 4, ranks, "10.0.0.1", 20123, nodes)
    environment = plan.rank_environment(3, {})
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NNODES")
    assert [environment[name] for name in names] == ["3", "1", "2", "1", "2"]
    assert plan.node_ranks(1) == ranks[2:]
    assert plan.describe()[3]["host"] == "b"


@pytest.mark.parametrize(("world_size", "threads"), [(1, "6"), (2, "3"), (4, "1"), (12, "1")])
def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch, world_size: int, threads: str) -> None:
    monkeypatch.setattr(plan_module, "available_cores", lambda: 6)
    assert make_plan(world_size).rank_environment(0, {})["OMP_NUM_THREADS"] == threads


FOREIGN = """
TORCHELASTIC_USE_AGENT_STORE PET_NNODES OMPI_COMM_WORLD_RANK PMI_RANK PMIX_RANK
SLURM_PROCID SLURM_STEP_ID SLURM_NTASKS SLURM_TASK_PID ZSPMD_BOOTSTRAP_FD
"""


@pytest.mark.parametrize("name", FOREIGN.split())
def test_facts_of_other_launchers_are_taken_out(name: str) -> None:
    environment = make_plan().rank_environment(0, {name: "7", "SLURM_JOB_ID": "1", "HOME": "/h"})
    assert name not in environment
    assert (environment["SLURM_JOB_ID"], environment["HOME"]) == ("1", "/h")


def test_the_environment_starts_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THIS_TEST", "yes")
    monkeypatch.setenv("RANK", "99")
    environment = make_plan().rank_environment(1)
    assert (environment["OF_THIS_TEST"], environment["RANK"]) == ("yes", "1")


@pytest.mark.parametrize("world_size", [0, -1, True, 1.5, "2"], ids=repr)
def test_a_world_without_ranks_is_refused(world_size: object) -> None:
    with pytest.raises(TopologyError, match="world_size"):
        make_plan(world_size)  # type: ignore[arg-type]  # the point of some cases


def test_a_bad_launch_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="launch id"):
        plan_local(launch_id="a/b", world_size=1, master_port=1, run_directory="/r", devices="cpu")
