"""What another launcher has told this process of its place: torchrun, Open MPI's mpirun, MPICH's mpiexec, Slurm's srun.

Nothing is asked of them; the facts are in the environment that each gives its processes. The innermost launcher counts: torchrun within
srun, say. Each launch has an identity that its processes share and no other launch of this time has, from which its launch id follows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ....errors import ConfigError

_MAX_RANKS = 1 << 16
_HYDRA = "hydra_pmi_proxy"


@dataclass(frozen=True)
class ExternalRank:
    """The place of this process among those that another launcher has started.

    Attributes:
        launcher: its name.
        local_rank, local_world_size: among the processes on this machine.
        identity: the same in all processes of the launch, and in no other launch at the same time; empty where there is none.
        master_addr: an address or name of rank 0's machine; empty where the launcher does not tell.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    identity: tuple[str, ...]
    master_addr: str = ""

    @property
    def is_one_machine(self) -> bool:
        """Whether all processes of the launch are on this machine."""
        return self.local_world_size == self.world_size

    @property
    def launch_id(self) -> str:
        """The launch id that all processes of the launch derive; raises ConfigError where the launcher gives no identity."""
        if not self.identity:
            raise ConfigError(f"{self.launcher} tells nothing by which launches on several machines differ; give all ranks one --launch-id")
        digest = hashlib.blake2b("\0".join((self.launcher, *self.identity)).encode(errors="surrogateescape"), digest_size=8)
        return f"{self.launcher}-{digest.hexdigest()}"


def find_ancestor(name: str) -> str:
    """Return pid and start of the nearest process above this one that has this name, or nothing."""
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat") as file:
                head, _, tail = file.read().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            return ""
        facts = tail.split()
        if head.partition("(")[2] == name[:15]:
            return f"{pid} {facts[19]}"
        pid = int(facts[1])
    return ""


def read_external(environment: Mapping[str, str], find: Callable[[str], str] = find_ancestor) -> ExternalRank:
    """Return what this environment says.

    Raises:
        ConfigError: no launcher is to be found in it, or what it says cannot be.
    """
    for is_there, read in (
        (_is_torchrun, _read_torchrun),
        (_is_openmpi, _read_openmpi),
        (_is_slurm, _read_slurm),
        (_is_torch, _read_torch),
    ):
        if is_there(environment):
            return _checked(read(environment))
    if _is_mpich(environment):
        return _checked(_read_mpich(environment, find))
    raise ConfigError(
        "this process was not started by torchrun, mpirun or srun: none of TORCHELASTIC_RUN_ID, OMPI_COMM_WORLD_RANK, PMI_RANK, "
        "SLURM_STEP_NUM_TASKS, or RANK with MASTER_ADDR is set; start it by one of them, or leave external out"
    )


# --- torchrun, and whoever sets the same variables ---


def _is_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment and "RANK" in environment


def _read_torchrun(environment: Mapping[str, str]) -> ExternalRank:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    place = _torch_place("torchrun", environment, names)
    if place.is_one_machine:  # a directory that torchrun makes anew for each attempt, and for each node
        attempt = os.path.dirname(os.path.dirname(environment.get("TORCHELASTIC_ERROR_FILE", "")))
        place = replace(place, identity=(*place.identity, attempt))
    return place


def _is_torch(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def _read_torch(environment: Mapping[str, str]) -> ExternalRank:
    return _torch_place("env", environment, ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))


def _torch_place(launcher: str, environment: Mapping[str, str], identity: tuple[str, ...]) -> ExternalRank:
    return ExternalRank(
        launcher=launcher,
        rank=_number(environment, "RANK"),
        world_size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK"),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        identity=tuple(environment.get(name, "") for name in identity),
        master_addr=environment.get("MASTER_ADDR", ""),
    )


# --- MPI ---


def _is_openmpi(environment: Mapping[str, str]) -> bool:
    return "OMPI_COMM_WORLD_RANK" in environment


def _read_openmpi(environment: Mapping[str, str]) -> ExternalRank:
    # A job's number is reused; the key is drawn anew for each, and the address names the mpirun.
    names = ("PMIX_NAMESPACE", "OMPI_MCA_orte_precondition_transports", "OMPI_MCA_orte_hnp_uri")
    identity = tuple(environment.get(name, "") for name in names)
    if not any(identity):
        raise ConfigError(f"this mpirun tells its processes none of {', '.join(names)}, so that its launches cannot be told apart")
    return ExternalRank(
        launcher="openmpi",
        rank=_number(environment, "OMPI_COMM_WORLD_RANK"),
        world_size=_number(environment, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        identity=identity,
        master_addr=environment.get("MASTER_ADDR", ""),
    )


def _is_mpich(environment: Mapping[str, str]) -> bool:
    return "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment


def _read_mpich(environment: Mapping[str, str], find: Callable[[str], str]) -> ExternalRank:
    """MPICH tells nothing that all processes share; on one machine they share the process that has started them."""
    identity = find(_HYDRA)
    place = ExternalRank(
        launcher="mpich",
        rank=_number(environment, "PMI_RANK"),
        world_size=_number(environment, "PMI_SIZE"),
        local_rank=_number(environment, "MPI_LOCALRANKID"),
        local_world_size=_number(environment, "MPI_LOCALNRANKS"),
        identity=(identity,),
        master_addr=environment.get("MASTER_ADDR", ""),
    )
    if place.is_one_machine and not identity:
        raise ConfigError(f"no process above this one is called {_HYDRA}, by which launches of mpiexec are told apart")
    return place if place.is_one_machine else replace(place, identity=())


# --- Slurm ---


def _is_slurm(environment: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, without being one of several; and mpiexec may have been started by srun.
    return "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment and not _is_mpich(environment)


def _read_slurm(environment: Mapping[str, str]) -> ExternalRank:
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    return ExternalRank(
        launcher="slurm",
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=_tasks_of_node(tasks, _number(environment, "SLURM_NODEID")),
        identity=tuple(environment.get(name, "") for name in names),
        master_addr=environment.get("MASTER_ADDR", ""),
    )


def _tasks_of_node(text: str, node: int) -> int:
    """Return what ``2(x3),1`` says of one node: 2 tasks on each of three nodes, 1 on the fourth."""
    counts: list[int] = []
    for entry in text.split(","):
        found = re.fullmatch(r"([0-9]{1,5})(?:\(x([0-9]{1,5})\))?", entry)
        if found is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; srun writes it as in 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which says nothing of node {node} (SLURM_NODEID)")
    return counts[node]


# --- checks ---


def _number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        value = environment.get(name)
        if value is not None:
            if not (value.isdecimal() and value.isascii()) or int(value) > _MAX_RANKS:
                raise ConfigError(f"{name} is {value!r}; a launcher sets it to a whole number from 0 to {_MAX_RANKS}")
            return int(value)
    raise ConfigError(f"{' or '.join(names)} is not set, which the launcher of this process sets beside its other facts")


def _checked(place: ExternalRank) -> ExternalRank:
    if not (place.rank < place.world_size and place.local_rank < place.local_world_size <= place.world_size):
        raise ConfigError(
            f"{place.launcher} says that this is rank {place.rank} of {place.world_size}, and {place.local_rank} of "
            f"{place.local_world_size} on its machine, which cannot be"
        )
    return place
