"""The worker group under an engine, and those that replace it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ...config import EngineConfig
from ...errors import BackpressureError
from ..driver.group import WorkerGroup
from ..driver.pending import PendingReply
from .checkpoint import choose_num_blocks


class EngineRanks:
    """Starts ranks with a KV cache, replaces them after a fault, and ends them.

    Args:
        group: the first, not started. Its successors have the same launch id, devices and log files, and an epoch of their own.
        on_failed: called when a group has failed, also while nobody awaits anything of it.
    """

    def __init__(self, group: WorkerGroup, on_failed: Callable[[], None]) -> None:
        self.group = group
        self._on_failed = on_failed
        self._num_blocks = 0
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, config: EngineConfig, max_model_len: int) -> int:
        """Start the ranks, size the KV pool and allocate it; returns its blocks, block 0 included.

        Raises:
            ConfigError: no room for the pool.
            WorkerError, LaunchError: as ``WorkerGroup.start``.
        """
        await self.group.start()
        try:
            capacities = await self.group.call("kv_capacity")
            self._num_blocks = choose_num_blocks(capacities, self.group.config.devices, max_model_len, config)
            await self._serve()
        except BaseException:
            await self.group.aclose(abort=True)
            raise
        return self._num_blocks

    async def replace(self) -> None:
        """End what is left of the group, and start another with the same pool; its ranks know nothing of the batch.

        Raises:
            WorkerError, LaunchError, TransportError: it did not start; nothing of it is left, and this may be called again.

        Cancellation: whatever was started is ended first.
        """
        await self._unwatch()
        await self.group.aclose(abort=True)
        self.group = WorkerGroup(self.group.config)
        await self.group.start()
        try:
            await self._serve()
        except BaseException:
            await self.group.aclose(abort=True)
            raise

    async def submit(self, inputs: Any, in_flight: Sequence[PendingReply]) -> PendingReply:
        """Publish one step; raises as ``WorkerGroup.submit``.

        Where a rank hangs there may be no room first. The step before is then overdue as well, and its error, which says where everybody
        is, is the one that is raised.
        """
        try:
            return await self.group.submit(inputs)
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
