"""The agent of a simulated node with its guard: what ``AgentProcess`` is to the real ``NodeSupervisor``."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from zspmd.errors import BadFrameError
from zspmd.runtime.launch.agent_protocol import (
    AgentGone,
    AgentRecord,
    DumpStacks,
    RankExited,
    RankLog,
    RankStack,
    RankStarted,
    StacksDone,
    Start,
    Stop,
)
from zspmd.transport.records import Bootstrap, unpack_record

from .ranks import SIGKILL, SIGTERM, SimulatedRank

if TYPE_CHECKING:
    from .launch import SimulatedLaunch


_unpack = functools.lru_cache(unpack_record)


class SimulatedAgent:
    """Starts, ends and describes simulated ranks, and tells of them over a stream that the driver's loop reads when it gets to it."""

    agent_pid = 2
    guard_pid = 3

    def __init__(
        self,
        launch: SimulatedLaunch,
        on_record: Callable[[AgentRecord], None],
        on_silence: Callable[[BadFrameError | None], None],
        on_end: Callable[[str], None],
    ) -> None:
        launch.agent = self
        self._launch = launch
        self._world = launch.world
        self._on_record = on_record
        self._on_silence = on_silence
        self._on_end = on_end
        self._fd = launch.network.next_fd()
        self._arrived: deque[AgentRecord | None] = deque()  # None for the end of the processes, and of the stream
        self._last_at = 0.0
        self._num_ranks = 0  # to start
        self._num_running = 0
        self._is_ending = False
        self._is_gone = False
        self._is_lost = False  # killed: it tells no more
        self._is_disconnected = False
        self._ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def open(self) -> None:
        self._launch.loop.add_reader(self._fd, self._read)

    def send(self, record: AgentRecord) -> None:
        self._world.after(self._latency(), self._handle, record)

    def hand_over(self, directory: object) -> None:
        return

    def disconnect(self, kill_s: float) -> None:
        if not self._is_disconnected:
            self._is_disconnected = True
            self._world.after(self._latency(), self._kill_ranks)

    async def wait_ended(self, timeout_s: float) -> None:
        await asyncio.wait_for(self._ended.wait(), timeout_s + self._world.paused_s)

    def kill_agent(self) -> None:
        self._is_lost = True
        self._kill_ranks()

    def kill_both(self) -> None:
        self.kill_agent()

    def rank_ended(self, rank: SimulatedRank) -> None:
        """Report the end of a rank, with what it printed last."""
        assert rank.exit_code is not None
        self._num_running -= 1
        lines = (f"rank {rank.rank} says its last word",)
        self._tell(RankLog(rank.rank, "err", lines))
        self._tell(RankExited(rank.rank, rank.rank + 1, rank.exit_code, log_tail=lines))
        self._end_if_done()

    def _handle(self, record: AgentRecord) -> None:
        if self._is_gone or self._is_lost:
            return
        if isinstance(record, Start):
            self._num_ranks = len(record.ranks)
            for order in record.ranks:
                self._world.after(self._world.chance.uniform(1e-3, 20e-3), self._start_rank, order.rank, order.bootstrap)
        elif isinstance(record, Stop):
            self._is_ending = True
            self._world.after(record.grace_s, self._signal_ranks, SIGTERM)
            self._world.after(record.grace_s + record.kill_s, self._signal_ranks, SIGKILL)
            self._end_if_done()
        elif isinstance(record, DumpStacks):
            self._world.after(self._world.chance.uniform(0.02, 0.4), self._dump, record.request)

    def _start_rank(self, rank: int, bootstrap: bytes) -> None:
        if self._is_ending:
            return
        record = _unpack(bootstrap)
        assert isinstance(record, Bootstrap)
        self._num_running += 1
        self._launch.ranks.append(SimulatedRank(self._launch, rank, record))
        self._tell(RankStarted(rank, rank + 1))
        self._launch.ranks[-1].start()

    def _dump(self, request: int) -> None:
        for rank in self._launch.ranks:
            if rank.is_alive:
                self._tell(RankStack(request, rank.rank, _describe(rank.doing)))
        self._tell(StacksDone(request))

    def _signal_ranks(self, code: int) -> None:
        for rank in self._launch.ranks:
            if rank.is_alive and (code == SIGKILL or not rank.ignores_sigterm):
                self._world.reach("ended_by_sigkill" if code == SIGKILL else "ended_by_sigterm", f"rank {rank.rank}")
                self._world.after(self._latency(), rank.end, code)

    def _kill_ranks(self) -> None:
        self._is_ending = True
        self._signal_ranks(SIGKILL)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._is_ending and self._num_running == 0 and not self._is_gone:
            self._is_gone = True
            self._tell(AgentGone(()))
            self._arrive_in_order(None)

    def _tell(self, record: AgentRecord) -> None:
        if not self._is_lost:
            self._arrive_in_order(record)

    def _arrive_in_order(self, record: AgentRecord | None) -> None:
        self._last_at = max(self._last_at, self._world.now + self._latency())
        self._world.at(self._last_at, self._arrive, record)

    def _arrive(self, record: AgentRecord | None) -> None:
        self._arrived.append(record)
        self._launch.loop.readable[self._fd] = None

    def _read(self) -> None:
        self._launch.loop.readable.pop(self._fd, None)
        while self._arrived:
            record = self._arrived.popleft()
            if record is None:
                self._launch.loop.remove_reader(self._fd)
                if not self._is_disconnected:
                    self._on_silence(None)
                self._on_end("the agent of this node was ended by SIGKILL" if self._is_lost else "the agent of this node has ended")
                self._ended.set()
            elif not self._is_disconnected:
                self._on_record(record)

    def _latency(self) -> float:
        return self._world.chance.uniform(50e-6, self._launch.options.agent_delay_s)


def _describe(doing: str) -> str:
    if doing == "stopped":
        return "stopped by a signal"
    where = "zspmd/workers/communicators/shared_memory.py, line 1 in all_reduce" if doing == "waiting" else "worker.py, line 1 in step"
    return f"sleeping\n{where}\n{doing}"
