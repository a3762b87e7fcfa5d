"""The coordinator on plain torch.distributed, RFC 3587's reference: for programs that torchrun, srun or the like have started.

Who is there is found in torch's TCPStore, so that a timeout names ranks; then data moves through gloo. Neither is the program's default
process group, which it may make or not, before or after.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's stubs do not export it
from torch.distributed.distributed_c10d import PrefixStore

from ..errors import ConfigError, CoordinatorTimeoutError, EndpointInUseError, PeerLostError, TopologyError
from .bootstrap import read_number
from .context import RankFacts
from .coordinator import MAX_DATA_BYTES, Coordinator, Deadline, check_data
from .store import PrefixedStore, Store
from .torch_store import TorchStoreAdapter


class TorchCoordinator(Coordinator):
    """A ``Coordinator`` over gloo. ``torch_store`` is ``store`` as torch has it; gloo listens on ``address`` only."""

    def __init__(self, facts: RankFacts, store: Store, torch_store: Any, *, address: str, timeout_s: float) -> None:
        super().__init__(facts, store, timeout_s=timeout_s)
        self._torch_store = torch_store
        self._address = address
        self._gloo: Any = None
        self._failure = ""

    @classmethod
    def create(cls, *, name: str, timeout_s: float) -> TorchCoordinator:
        """Return the coordinator of the launch that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Rank 0 serves the store on MASTER_PORT, unless torchrun's agent does; it is the one that init_process_group would use. ``name``
        tells this rank's coordinators apart.

        Raises:
            ConfigError, TopologyError: what the environment says cannot be.
            CoordinatorTimeoutError: another rank, which is needed to find the facts, has not come.
            EndpointInUseError: MASTER_PORT is held by somebody else.
        """
        rank, world_size = read_number("RANK"), read_number("WORLD_SIZE")
        if rank >= world_size:
            raise TopologyError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks count from 0")
        deadline = Deadline(timeout_s)
        address = _own_address()
        torch_store = _connect(rank, timeout_s)
        prefix = f"zspmd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        store = PrefixedStore(TorchStoreAdapter(torch_store, timeout_s=timeout_s), prefix)
        facts = _find_facts(store, rank, world_size, deadline)
        return cls(facts, store, PrefixStore(prefix, torch_store), address=address, timeout_s=timeout_s)

    def broadcast(self, data: bytes | None, src: int = 0, *, timeout_s: float | None = None) -> bytes:
        deadline = self._deadline(timeout_s)
        kind = self._broadcast_kind(src)
        sent = check_data("broadcast", data, MAX_DATA_BYTES) if self.rank == src else b""
        self._meet(kind, range(self.world_size), deadline)
        size = torch.tensor([len(sent)])
        self._run(lambda group: group.broadcast(size, src), deadline)
        content = _as_tensor(sent, int(size))
        self._run(lambda group: group.broadcast(content, src), deadline)
        return content.numpy().tobytes()

    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        deadline = self._deadline(timeout_s)
        share = check_data("all_gather", data, MAX_DATA_BYTES // self.world_size)
        self._meet("all_gather", range(self.world_size), deadline)
        sizes = torch.empty(self.world_size, dtype=torch.int64)
        self._run(lambda group: group._allgather_base(sizes, torch.tensor([len(share)])), deadline)
        width = int(sizes.max())
        rows = torch.empty(self.world_size, width, dtype=torch.uint8)
        self._run(lambda group: group._allgather_base(rows.view(-1), _as_tensor(share, width)), deadline)
        return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes.tolist())]

    def torch_store(self) -> Any:
        self._check_open()
        return PrefixStore("torch", self._torch_store)

    def close(self) -> None:
        super().close()
        self._gloo = self._torch_store = None

    def _run(self, start: Callable[[Any], Any], deadline: Deadline) -> None:
        """Do one collective of gloo, which every rank has announced; after one that failed, gloo is of no use any more."""
        if self._failure:
            raise PeerLostError(
                f"gloo failed before: {self._failure}; close this coordinator, and make another with the ranks that are left"
            )
        try:
            if self._gloo is None:
                self._gloo = self._make_gloo()
            start(self._gloo).wait(timedelta(seconds=max(0.001, deadline.left_s())))
        except RuntimeError as error:
            self._failure = str(error)
            raise PeerLostError(f"gloo: {error}; a rank that had come to the operation has ended, or hangs in it") from error

    def _make_gloo(self) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
            options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
        else:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
        options._timeout = timedelta(seconds=self.timeout_s)
        return dist.ProcessGroupGloo(PrefixStore("gloo", self._torch_store), self.rank, self.world_size, options)


def _connect(rank: int, timeout_s: float) -> Any:
    """Return torch's store, as ``init_process_group`` would, but without waiting for the others: a timeout would not name them."""
    host, port = os.environ["MASTER_ADDR"], _master_port()
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, port, None, is_server, timeout, wait_for_workers=False, multi_tenant=is_server)
    except dist.DistNetworkError as error:
        if is_server:
            raise EndpointInUseError(f"rank 0 cannot serve the store on {host}:{port}: {error}") from error
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise PeerLostError(f"torchrun's agent does not serve the store on {host}:{port}: {error}") from error
        raise CoordinatorTimeoutError(f"connecting to {host}:{port}", [0], timeout_s) from error


def _master_port() -> int:
    port = read_number("MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {port}; a port is 1 to 65535")
    return port


def _own_address() -> str:
    """Return the address of the interface by which this machine reaches MASTER_ADDR; nothing is sent.

    Raises:
        ConfigError: MASTER_ADDR has no address, or there is no way to it.
    """
    host, port = os.environ["MASTER_ADDR"], _master_port()
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR is {host!r}, which cannot be reached: {error}") from error


def _find_facts(store: Store, rank: int, world_size: int, deadline: Deadline) -> RankFacts:
    """Agree on a launch id, and find this rank's place on its node where the launcher has not told it."""
    host = os.uname().nodename
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        machine = f"{host} {boot_id.read().strip()}".encode()
    store.set(f"machine/{rank}", machine)
    if rank == 0:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own word for none
        own_id = secrets.token_hex(8) if run_id == "none" else run_id
        store.compare_set("launch_id/0", b"", own_id.encode())  # keeps that of an earlier try, which others may have read
    with deadline.naming_absent("finding the launch id"):
        launch_id = store.get("launch_id/0", deadline.left_s()).decode()
    if "LOCAL_RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        local_rank, local_world_size = read_number("LOCAL_RANK"), read_number("LOCAL_WORLD_SIZE")
    else:
        with deadline.naming_absent("finding the ranks of this node"):
            machines = store.get_many([f"machine/{peer}" for peer in range(world_size)], deadline.left_s())
        local_rank, local_world_size = machines[:rank].count(machine), machines.count(machine)
        if machines[rank - local_rank :][:local_world_size].count(machine) != local_world_size:
            raise TopologyError(f"the ranks of {host} do not follow each other; have the launcher place ranks in blocks (srun -m block)")
    if local_rank >= local_world_size or not 0 <= rank - local_rank <= world_size - local_world_size:
        raise TopologyError(
            f"rank {rank} of {world_size} cannot be {local_rank} of {local_world_size} on its node; see LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return RankFacts(launch_id, rank, world_size, local_rank, local_world_size, host, _device(local_rank))


def _device(local_rank: int) -> str:
    """Return this rank's device; a launcher may show each rank its own one only, or all of them."""
    num_devices = torch.cuda.device_count()
    return f"cuda:{local_rank % num_devices}" if num_devices else "cpu"


def _as_tensor(data: bytes, size: int) -> torch.Tensor:
    """Return the bytes as a uint8 tensor of ``size``, which may be more."""
    tensor = torch.zeros(size, dtype=torch.uint8)
    if data:
        tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensor
