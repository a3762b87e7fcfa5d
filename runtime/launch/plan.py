"""Who runs where: the plan of a launch, complete before any process starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import TopologyError
from .devices import available_cores, detect_devices
from .launch_id import check_launch_id

# Another launcher's rank facts make torch, Lightning and mpi4py believe that launcher: TORCHELASTIC_USE_AGENT_STORE alone turns
# rank 0's store into a client that waits for ever.
_FOREIGN_PREFIXES = ("TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_STEP", "SLURM_SRUN_", "SLURM_TASK")
_FOREIGN_SLURM = "PROCID LOCALID NODEID NTASKS NPROCS NNODES GTIDS NODELIST JOB_NODELIST JOB_NUM_NODES LAUNCH_NODE_IPADDR"
_FOREIGN_NAMES = frozenset(("ZSPMD_BOOTSTRAP_FD", *(f"SLURM_{name}" for name in _FOREIGN_SLURM.split())))
# What every launch sets in its ranks.
_FACTS = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK NNODES ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT ZSPMD_LAUNCH_ID ZSPMD_RANK ZSPMD_LOCAL_RANK ZSPMD_WORLD_SIZE ZSPMD_LOCAL_WORLD_SIZE ZSPMD_DEVICE "
    "ZSPMD_RUN_DIR"
)
FACT_NAMES = frozenset(_FACTS.split())


@dataclass(frozen=True)
class RankPlan:
    """Where one rank runs: ``node_rank`` indexes the plan's hosts, ``device`` is "cpu" or "cuda:<index>"."""

    rank: int
    local_rank: int
    node_rank: int
    device: str


@dataclass(frozen=True)
class LaunchPlan:
    """Every fact of a launch that its ranks are told.

    Attributes:
        ranks: one entry per rank, in rank order; the ranks of a node follow each other.
        hosts: a name per node, by node rank.
        master_addr, master_port: where rank 0's server may listen; an IP address, and a port that the launch holds.
        run_directory: for sockets of this node.
    """

    launch_id: str
    world_size: int
    ranks: tuple[RankPlan, ...]
    master_addr: str
    master_port: int
    run_directory: str
    hosts: tuple[str, ...]

    def node_ranks(self, node_rank: int) -> tuple[RankPlan, ...]:
        """Return the ranks of one node."""
        return tuple(rank for rank in self.ranks if rank.node_rank == node_rank)

    @cached_property
    def _local_world_sizes(self) -> Counter[int]:
        return Counter(rank.node_rank for rank in self.ranks)

    def rank_environment(self, rank: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the whole environment of a rank's process.

        Args:
            base: what to start from, by default this process's environment. Facts of other launchers (torchrun, mpirun, srun)
                are taken out; thread counts and debugging variables that it sets are kept.
        """
        environment = {name: value for name, value in (os.environ if base is None else base).items() if not _is_foreign(name)}
        place = self.ranks[rank]
        local_world_size = self._local_world_sizes[place.node_rank]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // local_world_size)))
        for name in ("PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
            environment.setdefault(name, "1")
        environment.update(self._facts(place, local_world_size))
        return environment

    def describe(self) -> list[dict[str, str]]:
        """Return one row per rank for a table, with the same columns in each."""
        return [
            {
                "rank": str(place.rank),
                "local": str(place.local_rank),
                "node": str(place.node_rank),
                "host": self.hosts[place.node_rank],
                "device": place.device,
            }
            for place in self.ranks
        ]

    def _facts(self, place: RankPlan, local_world_size: int) -> dict[str, str]:
        num_nodes = str(len(self.hosts))
        return {
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(local_world_size),
            "GROUP_RANK": str(place.node_rank),
            "GROUP_WORLD_SIZE": num_nodes,
            "NODE_RANK": str(place.node_rank),
            "NNODES": num_nodes,
            "ROLE_NAME": "zspmd",
            "ROLE_RANK": str(place.rank),
            "ROLE_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "ZSPMD_LAUNCH_ID": self.launch_id,
            "ZSPMD_RANK": str(place.rank),
            "ZSPMD_LOCAL_RANK": str(place.local_rank),
            "ZSPMD_WORLD_SIZE": str(self.world_size),
            "ZSPMD_LOCAL_WORLD_SIZE": str(local_world_size),
            "ZSPMD_DEVICE": place.device,
            "ZSPMD_RUN_DIR": self.run_directory,
        }


def plan_local(
    *,
    launch_id: str,
    world_size: int,
    master_port: int,
    run_directory: str,
    devices: str | Sequence[str] = "auto",
    master_addr: str = "127.0.0.1",
) -> LaunchPlan:
    """Plan a launch on this machine alone; starts and binds nothing.

    Args:
        master_port: from ``reserve_port``, or ``first_candidate`` for a plan that is only shown.
        run_directory: from ``RunDirectory.create``, or ``run_directory_path`` likewise.
        devices: as in ``detect_devices``.

    Raises:
        ConfigError: the launch id or a device name cannot be used.
        TopologyError: the world size is below 1, or there are fewer devices than ranks.
    """
    check_launch_id(launch_id)
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise TopologyError(f"world_size is {world_size!r}; it must be a whole number of at least 1")
    return LaunchPlan(
        launch_id=launch_id,
        world_size=world_size,
        ranks=tuple(RankPlan(rank, rank, 0, device) for rank, device in enumerate(detect_devices(devices, world_size))),
        master_addr=master_addr,
        master_port=master_port,
        run_directory=run_directory,
        hosts=("localhost",),
    )


def _is_foreign(name: str) -> bool:
    return name.startswith(_FOREIGN_PREFIXES) or name in _FOREIGN_NAMES
