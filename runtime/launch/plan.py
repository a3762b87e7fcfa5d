"""Who runs where: the plan of a launch, complete before any process starts."""

from __future__ import annotations

import os
import sys
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
_FOREIGN_NAMES = frozenset(("ZSPMD_BOOTSTRAP_FD", "ZSPMD_SECRET", *(f"SLURM_{name}" for name in _FOREIGN_SLURM.split())))
# What every launch sets in its ranks.
_FACTS = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK NNODES ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT ZSPMD_LAUNCH_ID ZSPMD_RANK ZSPMD_LOCAL_RANK ZSPMD_WORLD_SIZE ZSPMD_LOCAL_WORLD_SIZE ZSPMD_DEVICE "
    "ZSPMD_RUN_DIR ZSPMD_NODE_ADDR"
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
class NodePlan:
    """One machine of a launch.

    Attributes:
        name: of the host, as the user wrote it.
        address: the IP address at which the other nodes reach it, and ``iface`` the interface that has it, where that is known.
        run_directory: for sockets and files of the launch on this node.
        is_local: whether it is the driver's own.
        num_cores: that its ranks share; None for those of this process.
        python: its interpreter.
        devices: the CUDA devices that its host entry lists, in the order of its ranks; None where it lists none.
        local_place: where another launcher has placed it: the local rank of its first rank, and the ranks of its machine; else None.
    """

    name: str
    address: str
    run_directory: str
    is_local: bool = True
    iface: str = ""
    num_cores: int | None = None
    python: str = sys.executable
    devices: tuple[int, ...] | None = None
    local_place: tuple[int, int] | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """Every fact of a launch that its ranks are told.

    Attributes:
        ranks: one entry per rank, in rank order; the ranks of a node follow each other.
        nodes: by node rank.
        master_addr, master_port: where rank 0's server may listen; an IP address, and a port that the launch holds.
    """

    launch_id: str
    world_size: int
    ranks: tuple[RankPlan, ...]
    master_addr: str
    master_port: int
    nodes: tuple[NodePlan, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        """A name per node, by node rank."""
        return tuple(node.name for node in self.nodes)

    def node_of(self, rank: int) -> NodePlan:
        """Return the machine of a rank."""
        return self.nodes[self.ranks[rank].node_rank]

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
        environment = {name: value for name, value in (os.environ if base is None else base).items() if not is_foreign(name)}
        place = self.ranks[rank]
        node = self.nodes[place.node_rank]
        local_world_size = self._local_world_sizes[place.node_rank] if node.local_place is None else node.local_place[1]
        num_cores = available_cores() if node.num_cores is None else node.num_cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // local_world_size)))
        if len(self.nodes) > 1 and node.iface:  # else both guess from the host's name, which many resolve to loopback
            environment.setdefault("GLOO_SOCKET_IFNAME", node.iface)
            environment.setdefault("NCCL_SOCKET_IFNAME", f"={node.iface}")
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
        num_nodes = str(len(self.nodes))
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
            "ZSPMD_RUN_DIR": self.nodes[place.node_rank].run_directory,
            "ZSPMD_NODE_ADDR": self.nodes[place.node_rank].address,
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
        nodes=(NodePlan("localhost", master_addr, run_directory),),
    )


def place_ranks(hosts: Sequence[str], slots: Sequence[int], world_size: int | None) -> list[tuple[int, int]]:
    """Return (node rank, local rank) for each rank: the slots of the first host, then of the next.

    Args:
        hosts: names, for messages; ``slots`` are their numbers.
        world_size: None for a rank in each slot. Hosts beyond it have no rank.

    Raises:
        TopologyError: fewer slots than ranks; says how many each host has.
    """
    places = [(node, local) for node, count in enumerate(slots) for local in range(count)]
    if world_size is None:
        world_size = len(places)
    if not 0 < world_size <= len(places):
        listed = ", ".join(f"{host} {count}" for host, count in zip(hosts, slots))
        num_slots = "1 slot" if len(places) == 1 else f"{len(places)} slots"
        raise TopologyError(
            f"{world_size} ranks do not fit into {num_slots} ({listed}); add hosts, give them more slots=, or ask for fewer ranks"
        )
    return places[:world_size]


def place_devices(devices: str | Sequence[str], places: Sequence[tuple[int, int]], cuda: Sequence[Sequence[int]]) -> list[str]:
    """Return the device of each rank of several nodes; as ``detect_devices`` does it for one.

    Args:
        places: from ``place_ranks``.
        cuda: the indices of the CUDA devices that each node offers, in the order of its local ranks.

    Raises:
        TopologyError: a node has too few, or the list is too short.
    """
    if not isinstance(devices, str) or devices not in ("auto", "cpu", "cuda"):
        entries = [entry.strip() for entry in devices.split(",")] if isinstance(devices, str) else list(devices)
        if len(entries) < len(places):
            raise TopologyError(f"devices lists {len(entries)} entries for {len(places)} ranks; list one per rank")
        return entries[: len(places)]
    if devices == "cpu" or (devices == "auto" and not any(cuda)):
        return ["cpu"] * len(places)
    for node, local in places:
        if local >= len(cuda[node]):
            raise TopologyError(
                f"node {node} has {len(cuda[node])} CUDA devices and gets {local + 1} ranks or more; "
                "give it fewer slots=, or set devices to cpu"
            )
    return [f"cuda:{cuda[node][local]}" for node, local in places]


def is_foreign(name: str) -> bool:
    """Say whether a variable is another launcher's fact, which ranks must not see."""
    return name.startswith(_FOREIGN_PREFIXES) or name in _FOREIGN_NAMES
