"""The driver's handle on the agent of one node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import BadFrameError, LaunchError, describe_exit
from ...transport.schema import pack_record
from .agent_process import AgentProcess
from .agent_protocol import (
    AgentGone,
    AgentRecord,
    AgentWarning,
    DumpStacks,
    Hold,
    LaunchFailed,
    RankExited,
    RankLog,
    RankStack,
    RankStarted,
    Release,
    Signal,
    StacksDone,
    Start,
    Stop,
)
from .run_directory import RunDirectory

# Beyond the moments that an order names: for the agent to reap, to report and to end.
_MARGIN_S = 3.0
_DEFAULT_KILL_S = 2.0


@dataclass(frozen=True)
class AgentLost:
    """The agent ended without saying that it was done; the kernel has killed its ranks. ``reason`` says how it ended."""

    reason: str


@dataclass
class StackDump:
    """The answers to one request for stacks, by rank."""

    done: asyncio.Event
    texts: dict[int, str] = field(default_factory=dict)


Event = RankStarted | RankLog | RankExited | AgentWarning | LaunchFailed | AgentGone | AgentLost


class NodeSupervisor:
    """Starts the ranks of this node under an agent and follows them to the end: ``open``, ``start``, ``stop``.

    Events come in order, on the loop that called ``open``: ``RankStarted`` for each rank, ``RankLog`` as it prints, ``RankExited``
    once for each, and last ``AgentGone`` or ``AgentLost``. ``on_event`` must not raise; if it does, the loop's exception handler
    is told and the rest goes on.

    The agent ends with this process, however that ends, and takes everything that ranks have started with it, and the run directory.
    """

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._agent: AgentProcess | None = None
        self._order: Start | None = None
        self._started: asyncio.Future[None] | None = None
        self._is_done = False
        self._pids: dict[int, int] = {}
        self._exit_codes: dict[int, int] = {}
        self._num_dumps = 0
        self._dumps: dict[int, StackDump] = {}

    @property
    def pids(self) -> dict[int, int]:
        """The pid of each rank that was started."""
        return dict(self._pids)

    @property
    def exit_codes(self) -> dict[int, int]:
        """The exit code of each rank that has ended, negative for a signal."""
        return dict(self._exit_codes)

    @property
    def agent_pid(self) -> int | None:
        """The process that is the parent of the ranks, once it has told; it is no child of this process."""
        return None if self._agent is None else self._agent.agent_pid

    @property
    def guard_pid(self) -> int | None:
        """The parent of the agent, which is a child of this process; it does nothing but clean up after an agent that is killed."""
        return None if self._agent is None else self._agent.guard_pid

    def open(self) -> None:
        """Start the agent, which waits for its order; do it before the run directory is made, and nothing can be left of that.

        Raises:
            LaunchError: no process can be started, or descriptors have run out.
        """
        assert self._agent is None, "open is called once"
        agent = AgentProcess(self._on_record, self._on_silence, self._on_agent_end)
        agent.open()
        self._agent = agent

    async def start(self, order: Start, run_directory: RunDirectory | None = None, timeout_s: float = 120.0) -> None:
        """Start the ranks; return when each has a process. The agent holds the directory's lock too, and removes it at its end.

        Raises:
            LaunchError: a rank could not be started, within ``timeout_s`` or at all; nothing is left running.

        Cancellation: everything that was started is being killed; ``stop`` waits for the end of that.
        """
        assert self._agent is not None, "open comes first"
        assert self._order is None, "start is called once"
        self._check_order(order)
        self._order = order
        self._started = asyncio.get_running_loop().create_future()
        try:
            if self._is_done:
                raise LaunchError("the agent of this node ended before it was told what to start")
            if run_directory is not None:
                self._agent.hand_over(run_directory)
            self._agent.send(order)
            await asyncio.wait_for(self._started, timeout_s)
        except asyncio.TimeoutError:
            await self.stop(0.0, order.kill_s)
            missing = sorted({rank.rank for rank in order.ranks} - set(self._pids))
            raise LaunchError(f"ranks {missing} had no process after {timeout_s} s") from None
        except LaunchError:
            await self.stop(0.0, order.kill_s)
            raise
        except BaseException:
            self.kill_nowait()
            raise

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing, within ``timeout_s``; works while ranks hang, and raises nothing.

        A text begins with the kernel's word on the process (running, sleeping, stopped by a signal); below it are the Python stacks
        of its threads. A rank that cannot be asked, or does not answer in time, has a text that says why.
        """
        if self._agent is None or self._order is None:
            return {}
        dump = StackDump(asyncio.Event())
        self._num_dumps += 1
        request = self._num_dumps
        self._dumps[request] = dump
        try:
            if not self._is_done:
                self._agent.send(DumpStacks(request))
                await asyncio.wait_for(dump.done.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass  # each rank that is missing is told with the reason
        finally:
            del self._dumps[request]
        return {r.rank: dump.texts.get(r.rank) or self._why_silent(r.rank, timeout_s) for r in self._order.ranks}

    async def stop(self, grace_s: float, kill_s: float) -> dict[int, int]:
        """End every rank and the agent, and return the exit codes by rank.

        Ranks get ``grace_s`` seconds to end by themselves, then SIGTERM, and SIGKILL ``kill_s`` later; with them go all processes
        that they started. Call it again, also while it runs, to make it quicker. A rank whose end nobody saw is not in the result.
        """
        if self._agent is None:
            return {}
        if self._order is None:
            self._agent.kill_both()  # it has started nothing
        else:
            self.stop_nowait(grace_s, kill_s)
        await self._agent.wait_ended(grace_s + 2 * kill_s + _MARGIN_S)
        return self.exit_codes

    def stop_nowait(self, grace_s: float, kill_s: float) -> None:
        """Ask for the same without waiting for it."""
        if self._agent is not None:
            self._agent.send(Stop(grace_s, kill_s))

    def signal_nowait(self, number: int) -> None:
        """Have a signal sent to every rank that runs, as ``Signal`` says."""
        if self._agent is not None:
            self._agent.send(Signal(int(number)))

    def hold_nowait(self, is_held: bool) -> None:
        """Have what ranks print left in their pipes, so that they wait, or read again."""
        if self._agent is not None:
            self._agent.send(Hold() if is_held else Release())

    def kill_nowait(self) -> None:
        """End everything at once without waiting: the agent finds its driver gone and kills all that it has. Safe to call again."""
        if self._agent is not None and not self._agent.has_ended:
            self._is_done = True
            self._agent.disconnect((_DEFAULT_KILL_S if self._order is None else self._order.kill_s) + _MARGIN_S)

    def _check_order(self, order: Start) -> None:
        try:
            pack_record(order)
        except BadFrameError as error:
            raise LaunchError(f"the agent cannot be told what to start: {error}; give fewer ranks, arguments or variables") from error

    def _on_record(self, record: AgentRecord) -> None:
        if isinstance(record, RankStarted):
            self._pids[record.rank] = record.pid
            self._emit(record)
            if self._order is not None and len(self._pids) == len(self._order.ranks):
                self._settle_start(None)
        elif isinstance(record, RankExited):
            self._exit_codes[record.rank] = record.exit_code
            self._emit(record)
        elif isinstance(record, LaunchFailed):
            self._emit(record)
            self._settle_start(LaunchError(record.reason))
        elif isinstance(record, AgentGone):
            self._is_done = True
            self._emit(record)
        elif isinstance(record, RankStack):
            if record.request in self._dumps:  # else it comes too late
                self._dumps[record.request].texts[record.rank] = record.text
        elif isinstance(record, StacksDone):
            if record.request in self._dumps:
                self._dumps[record.request].done.set()
        elif isinstance(record, (RankLog, AgentWarning)):
            self._emit(record)
        else:
            self._on_silence(BadFrameError(f"the agent sent the order {type(record).__name__}"))

    def _on_silence(self, error: BadFrameError | None) -> None:
        """An agent that closes its stream has said all, or is beyond help."""
        if error is not None:
            self._emit(AgentWarning(f"the agent is killed, since it broke the protocol: {error}"))
        if not self._is_done and self._agent is not None:
            self._agent.kill_agent()

    def _on_agent_end(self, way: str) -> None:
        self._settle_start(LaunchError(way))
        for dump in self._dumps.values():
            dump.done.set()
        if not self._is_done:
            self._is_done = True
            self._emit(AgentLost(way))

    def _why_silent(self, rank: int, timeout_s: float) -> str:
        if rank in self._exit_codes:
            return f"its process {describe_exit(self._exit_codes[rank])}"
        if rank not in self._pids:
            return "it has no process yet"
        return "its agent is gone" if self._is_done else f"its agent did not tell within {timeout_s:g} s"

    def _settle_start(self, error: LaunchError | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # the caller's code: it must not end the supervision
            asyncio.get_running_loop().call_exception_handler({"message": f"on_event raised on {type(event).__name__}", "exception": error})
