"""The worker group under an engine, and those that replace it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...config import EngineConfig
from ...errors import BackpressureError, NodeLostError, PreflightError, TopologyError, ZspmdError
from ..driver.group import WorkerGroup
from ..driver.launching import GroupConfig
from ..driver.pending import PendingReply
from .alike_ranks import check_alike
from .checkpoint import choose_num_blocks


class EngineRanks:
    """Starts ranks with a KV cache, replaces them after a fault, and ends them.

    Args:
        group: the first, not started. Its successors have the same launch id, devices and log files, and an epoch of their own. Over
            several nodes they have its hosts, but for those that were lost or did not answer: spare slots take their place.
        on_failed: called when a group has failed, also while nobody awaits anything of it.
        num_alike: how many neighbouring ranks must compute alike, as ``count_alike_ranks`` returns it.
    """

    def __init__(self, group: WorkerGroup, on_failed: Callable[[], None], *, num_alike: int = 1) -> None:
        self.group = group
        self._on_failed = on_failed
        self._num_alike = num_alike
        self._num_blocks = 0
        self._cause: ZspmdError | None = None  # why the ranks are replaced
        self._watcher: asyncio.Task[None] | None = None
        self._worker_args: dict[str, Any] = {}

    def set_worker_arg(self, name: str, value: Any) -> None:
        """Have the ranks that replace these set up with another value of a worker argument."""
        self._worker_args[name] = value

    async def start(self, config: EngineConfig, max_model_len: int) -> int:
        """Start the ranks, size the KV pool and allocate it; returns its blocks, block 0 included.

        Raises:
            ConfigError: no room for the pool, or ranks that must compute alike have different processors.
            WorkerError, LaunchError: as ``WorkerGroup.start``.
        """
        await self.group.start()
        try:
            capacities = await self.group.call("kv_capacity")
            hosts = self.group.plan.hosts  # one machine may be several nodes: each process that mpirun has started is one
            devices = [(hosts.index(hosts[place.node_rank]), place.device) for place in self.group.plan.ranks]
            self._num_blocks = choose_num_blocks(capacities, devices, max_model_len, config)
            await self._serve()
        except BaseException:
            await self.group.aclose(abort=True)
            raise
        return self._num_blocks

    async def replace(self) -> None:
        """End what is left of the group, and start another with the same pool; its ranks know nothing of the batch.

        Raises:
            WorkerError, LaunchError, TransportError: it did not start; nothing of it is left, and this may be called again.
            TopologyError: the hosts that are left have too few slots; its cause is the loss of the others.
            ConfigError: those that must compute alike have different processors.

        Cancellation: whatever was started is ended first.
        """
        await self._unwatch()
        await self.group.aclose(abort=True)
        self._cause = self.group.fault or self._cause
        config = replace(self.group.config, worker_args={**self.group.config.worker_args, **self._worker_args})
        self.group = WorkerGroup(without_lost_hosts(config, self.group.fault))
        try:
            await self.group.start()
        except PreflightError as error:
            self._cause = error
            self.group = WorkerGroup(without_lost_hosts(self.group.config, error))
            raise
        except TopologyError as error:
            raise error from self._cause
        try:
            await self._serve()
        except BaseException:
            await self.group.aclose(abort=True)
            raise

    async def submit(self, inputs: Any, leaders: Sequence[int], in_flight: Iterable[PendingReply]) -> PendingReply:
        """Publish what the ranks ``leaders`` answer; raises as ``WorkerGroup.submit``.

        Where a rank hangs there may be no room first. The step before is then overdue as well, and its error, which says where everybody
        is, is the one that is raised.
        """
        try:
            return await self.group.submit(inputs, ranks=leaders)
        except BackpressureError:
            for pending in in_flight:
                await pending
            raise

    async def aclose(self, *, abort: bool) -> None:
        """End the ranks; raises as ``WorkerGroup.aclose``."""
        try:
            await self._unwatch()
        finally:
            await self.group.aclose(abort=abort)

    async def _serve(self) -> None:
        if self._num_alike > 1:
            check_alike(await self.group.call("describe_processor"), self._num_alike)
        await self.group.call("allocate_kv_cache", self._num_blocks)
        self._watcher = asyncio.create_task(self._watch(self.group), name=f"zspmd-engine-watch-{self.group.launch_id}")

    async def _watch(self, group: WorkerGroup) -> None:
        async with contextlib.aclosing(group.events()) as events:  # type: ignore[type-var]  # it is a generator
            async for event in events:
                if event.kind == "failed":
                    self._on_failed()
                    return

    async def _unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])


def without_lost_hosts(config: GroupConfig, fault: ZspmdError | None) -> GroupConfig:
    """Return the settings without the hosts that a fault says are gone; as they are where no host would be left."""
    lost: set[str] = set()
    if isinstance(fault, NodeLostError):
        lost = {fault.host}
    elif isinstance(fault, PreflightError):
        lost = {problem.host for problem in fault.problems if problem.check == "agent"}
    left = tuple(host for host in config.hosts or () if host.name not in lost and host.target not in lost)
    return replace(config, hosts=left) if left else config
