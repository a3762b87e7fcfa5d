"""Collectives by torch's process groups: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ...errors import PeerLostError
from ...topology import AxisGroup
from ..torch_store import CoordinatorStore
from .arguments import HALF_DTYPES
from .communicator import Communicator
from .setup import CommunicatorSetup

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed exports it only at run time

_TAG = 0
_MOST_ON_THE_WAY = 64


class ProcessGroupCommunicator(Communicator):
    """Collectives of a torch process group, made directly: it touches no global state of torch.distributed.

    ``store`` is where the ranks of the group met; the process group needs the Python object alive.
    """

    def __init__(self, group: AxisGroup, process_group: Any, store: Store, *, device: str = "cpu") -> None:
        super().__init__(group, device=device)
        self._process_group = process_group
        self._store = store

    @abstractmethod
    def _reduction(self, op: str) -> Any:
        """Return torch's name of an operation."""

    def _barrier(self) -> None:
        self._do(self._process_group.barrier)

    def _close(self) -> None:
        self._process_group = None

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = self._reduction(op)
        self._do(self._process_group.allreduce, [tensor], options)

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        self._do(self._process_group._allgather_base, rows.view(-1), own)

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        options = dist.ReduceScatterOptions()
        options.reduceOp = self._reduction(op)
        self._do(self._process_group._reduce_scatter_base, reduced.view(-1), tensor.view(-1), options)

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        self._do(self._process_group.broadcast, data, src)

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        self._do(self._process_group.alltoall_base, received, data, receive_sizes, send_sizes, dist.AllToAllOptions())

    def _send(self, data: torch.Tensor, dst: int) -> None:
        self._do(self._process_group.send, [data], dst, _TAG)

    def _receive(self, data: torch.Tensor, src: int) -> None:
        self._do(self._process_group.recv, [data], src, _TAG)

    def _do(self, start: Callable[..., Any], *arguments: Any) -> None:
        """Start an operation and wait for it."""
        self._finish(lambda: start(*arguments).wait())

    def _finish(self, wait: Callable[[], object]) -> None:
        """Call what waits for peers. What torch raises then is about these: what is ours was checked before."""
        try:
            wait()
        except RuntimeError as error:
            axis, ranks = self.group.axis, ", ".join(map(str, self.ranks))
            raise PeerLostError(f"a collective on axis {axis} (ranks {ranks}) failed, so one of them ended or is late: {error}") from error


class GlooCommunicator(ProcessGroupCommunicator):
    """Gloo's collectives for CPU tensors. Halves go as float32, which rounds them once instead of at each rank."""

    def __init__(self, group: AxisGroup, process_group: Any, store: Store) -> None:
        super().__init__(group, process_group, store)
        self._on_the_way: dict[int, deque[tuple[Any, torch.Tensor]]] = {}  # by receiver; gloo reads the memory when the receiver is there

    def _send_nowait(self, data: torch.Tensor, dst: int) -> None:
        """Gloo does not say whether a send is done without waiting for it: the one of 64 messages ago has long been received."""
        on_the_way = self._on_the_way.setdefault(dst, deque())
        if len(on_the_way) == _MOST_ON_THE_WAY:
            self._finish(on_the_way.popleft()[0].wait)
        kept = data.clone()
        self._finish(lambda: on_the_way.append((self._process_group.send([kept], dst, _TAG), kept)))

    def _reduction(self, op: str) -> Any:
        names = {"sum": "SUM", "mean": "SUM", "product": "PRODUCT", "min": "MIN", "max": "MAX"}  # not every gloo has AVG
        return getattr(dist.ReduceOp, names[op])

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        wide = tensor.float() if tensor.dtype in HALF_DTYPES else tensor
        super()._all_reduce(wide, op)
        if op == "mean":
            wide.div_(self.size)
        if wide is not tensor:
            tensor.copy_(wide)

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        is_half = tensor.dtype in HALF_DTYPES
        wide = reduced.float() if is_half else reduced
        super()._reduce_scatter(wide, tensor.float() if is_half else tensor, op)
        if op == "mean":
            wide.div_(self.size)
        if is_half:
            reduced.copy_(wide)


class NcclCommunicator(ProcessGroupCommunicator):
    """NCCL's collectives by torch, for tensors on one GPU a rank, on the current stream."""

    def _reduction(self, op: str) -> Any:
        names = {"sum": "SUM", "mean": "AVG", "product": "PRODUCT", "min": "MIN", "max": "MAX"}
        return getattr(dist.ReduceOp, names[op])

    def _barrier(self) -> None:
        options = dist.BarrierOptions()
        options.device_ids = [self.device.index]
        self._do(self._process_group.barrier, options)

    def _close(self) -> None:
        self._process_group.shutdown()
        super()._close()

    def _abort(self) -> None:
        self._process_group.abort()
        super()._close()


def create_gloo(setup: CommunicatorSetup) -> GlooCommunicator:
    """Return gloo collectives for CPU tensors, listening on the setup's address only.

    Raises:
        CoordinatorTimeoutError: a rank of the group did not come within ``timeout_s``.
    """
    setup.meet()  # what gloo raises of an absent rank does not say which
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=setup.address)]
    options._timeout = timedelta(seconds=setup.timeout_s)
    store = CoordinatorStore(setup.store)
    process_group = dist.ProcessGroupGloo(store, setup.group.index, setup.group.size, options)
    return GlooCommunicator(setup.group, process_group, store)


def create_nccl(setup: CommunicatorSetup) -> NcclCommunicator:
    """Return NCCL collectives for tensors on the setup's device; raises what ``create_gloo`` does."""
    setup.meet()
    torch.cuda.set_device(setup.device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=setup.timeout_s)
    store = CoordinatorStore(setup.store)
    process_group = dist.ProcessGroupNCCL(store, setup.group.index, setup.group.size, options)
    return NcclCommunicator(setup.group, process_group, store, device=setup.device)
