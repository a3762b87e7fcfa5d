"""What other launchers' environments say, as they were seen in processes of torchrun 2.x, Open MPI 4.1, MPICH 4.0 and Slurm 23."""

from __future__ import annotations

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.dial.external import find_ancestor, read_external

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_a/none_b/attempt_0/1/error.json",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "2051538945",
    "OMPI_MCA_orte_precondition_transports": "a78591accb9087d4-9689b2d5cca9d820",
    "OMPI_MCA_orte_hnp_uri": "2051538944.0;tcp://192.0.2.2:49395",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "7"}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_CLUSTER_NAME": "c",
}
TORCH = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
ALL = {"torchrun": TORCHRUN, "openmpi": OPENMPI, "mpich": MPICH, "slurm": SLURM, "env": TORCH}


def ancestor(name: str) -> str:
    return f"12 of {name}"


@pytest.mark.parametrize(
    ("launcher", "place", "is_one_machine"),
    [
        ("torchrun", (1, 2, 1, 2), True),
        ("openmpi", (3, 4, 1, 2), False),
        ("mpich", (0, 2, 0, 2), True),
        ("slurm", (4, 5, 0, 1), False),
        ("env", (1, 2, 1, 2), True),
    ],
    ids=["torchrun", "openmpi", "mpich", "slurm", "env"],
)
def test_each_launcher_tells_the_place(launcher: str, place: tuple[int, int, int, int], is_one_machine: bool) -> None:
    rank = read_external(ALL[launcher], ancestor)
    assert rank.launcher == launcher
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size) == place
    assert rank.is_one_machine == is_one_machine
    assert rank.launch_id.startswith(f"{launcher}-")


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ("torchrun", {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_a/none_b/attempt_0/0/error.json"}),
        ("openmpi", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_ID": "5.0"}),
        ("mpich", {"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "PMI_FD": "8"}),
        ("slurm", {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "9"}),
    ],
    ids=["torchrun", "openmpi", "mpich", "slurm"],
)
def test_the_ranks_of_a_launch_derive_the_same_launch_id(launcher: str, changes: dict[str, str]) -> None:
    assert read_external({**ALL[launcher], **changes}, ancestor).launch_id == read_external(ALL[launcher], ancestor).launch_id


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ("torchrun", {"MASTER_PORT": "29501"}),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "other"}),
        ("torchrun", {"TORCHELASTIC_RESTART_COUNT": "1"}),
        ("torchrun", {"TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_z/none_b/attempt_0/1/error.json"}),
        ("openmpi", {"PMIX_NAMESPACE": "7"}),
        ("openmpi", {"OMPI_MCA_orte_precondition_transports": "0-1"}),
        ("slurm", {"SLURM_STEP_ID": "1"}),
        ("slurm", {"SLURM_JOB_ID": "78"}),
        ("env", {"MASTER_PORT": "29501"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_another_launch_has_another_launch_id(launcher: str, changes: dict[str, str]) -> None:
    assert read_external({**ALL[launcher], **changes}, ancestor).launch_id != read_external(ALL[launcher], ancestor).launch_id


def test_launches_of_mpiexec_differ_by_the_process_that_started_them() -> None:
    ids = {read_external(MPICH, lambda name, start=start: f"{name} {start}").launch_id for start in (1, 2)}  # type: ignore[misc]
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({**SLURM, **TORCHRUN}, "torchrun"),
        ({**SLURM, **OPENMPI}, "openmpi"),
        ({**OPENMPI, **TORCHRUN}, "torchrun"),
        ({**SLURM, **MPICH}, "mpich"),
        ({**SLURM, "PMI_RANK": "4", "PMI_SIZE": "5"}, "slurm"),
    ],
    ids=["torchrun in srun", "mpirun in Slurm", "torchrun in mpirun", "mpiexec in Slurm", "srun --mpi=pmi2"],
)
def test_the_innermost_launcher_counts(environment: dict[str, str], launcher: str) -> None:
    assert read_external(environment, ancestor).launcher == launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not started by torchrun, mpirun or srun: none of TORCHELASTIC_RUN_ID"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, "not started by"),
        ({**TORCHRUN, "RANK": "two"}, "RANK is 'two'; a launcher sets it to a whole number from 0"),
        ({**TORCHRUN, "RANK": "2"}, "rank 2 of 2, and 1 of 2 on its machine, which cannot be"),
        ({**TORCHRUN, "WORLD_SIZE": "99999999"}, "WORLD_SIZE is '99999999'"),
        ({**TORCHRUN, "WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({**TORCHRUN, "RANK": "\u0663"}, "RANK is"),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}, "LOCAL_WORLD_SIZE or LOCAL_SIZE is not set"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE is '2\\(x'; srun writes it"),
        ({**SLURM, "SLURM_NODEID": "3"}, "says nothing of node 3"),
        ({name: value for name, value in OPENMPI.items() if name.startswith("OMPI_COMM")}, "cannot be told apart"),
    ],
    ids=[
        "nothing",
        "a batch script",
        "no number",
        "a rank too high",
        "too large",
        "negative",
        "foreign digits",
        "missing",
        "no counts",
        "no such node",
        "no identity",
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_external(environment, ancestor)


def test_mpiexec_without_its_proxy_is_refused_and_on_several_machines_has_no_identity() -> None:
    with pytest.raises(ConfigError, match="no process above this one is called hydra_pmi_proxy"):
        read_external(MPICH, lambda name: "")
    several = read_external({**MPICH, "PMI_SIZE": "4"}, ancestor)
    assert several.identity == ()
    with pytest.raises(ConfigError, match="give all ranks one --launch-id"):
        _ = several.launch_id


def test_an_ancestor_is_found_by_its_name() -> None:
    with open("/proc/1/comm") as comm:
        first = comm.read().strip()
    assert find_ancestor("no such name") == ""
    with open("/proc/self/stat") as file:
        parent = file.read().rpartition(")")[2].split()[1]
    with open(f"/proc/{parent}/comm") as comm:
        name = comm.read().strip()
    assert name == first or find_ancestor(name).split()[0] == parent
