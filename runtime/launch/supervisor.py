"""The driver's handle on the agent of one node. It passes 350 lines with the contract of its public methods."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ...errors import BadFrameError, LaunchError, describe_exit
from ...transport.schema import pack_record
from .agent_process import AgentProcess
from .agent_protocol import (
    AgentGone,
    AgentRecord,
    AgentStarted,
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
from .checks.check_records import MachineChecks
from .nodes.agent_link import AgentLink
from .nodes.node_facts import NodeFacts
from .nodes.node_records import Listening, Prepared, Reached, RelayLost
from .nodes.remote_agent import RemoteAgent
from .run_directory import RunDirectory

# Beyond the moments that an order names: for the agent to reap, to report and to end.
_MARGIN_S = 3.0
_DEFAULT_KILL_S = 2.0
_NUM_TOLD_LINES = 20
_ANSWERS = (NodeFacts, Listening, Reached, Prepared, MachineChecks)
AnswerT = TypeVar("AnswerT", bound=AgentRecord)


@dataclass(frozen=True)
class AgentLost:
    """The agent ended without saying that it was done, or its node is lost; the kernel has killed its ranks, or they end by themselves.

    ``reason`` says how, ``ranks`` are those that had not ended.
    """

    reason: str
    ranks: tuple[int, ...] = ()


@dataclass
class StackDump:
    """The answers to one request for stacks, by rank."""

    done: asyncio.Event
    texts: dict[int, str] = field(default_factory=dict)


Event = AgentStarted | RankStarted | RankLog | RankExited | AgentWarning | LaunchFailed | RelayLost | AgentGone | AgentLost


class NodeSupervisor:
    """Starts the ranks of one node under an agent and follows them to the end: ``open``, ``start``, ``stop``.

    Events come in order, on the loop that called ``open``: ``RankStarted`` for each rank, ``RankLog`` as it prints, ``RankExited``
    once for each, and last ``AgentGone`` or ``AgentLost``; none before ``start``, since whoever waits for an agent is told of its end,
    but for ``AgentStarted`` of an agent on this node.
    ``on_event`` must not raise; if it does, the loop's exception handler is told and the rest goes on.

    The agent ends with this process, however that ends, and takes everything that ranks have started with it, and the run directory.

    Args:
        link: the way to an agent of another node; None starts one on this.
        lease_s: how long that may be silent.
    """

    def __init__(self, on_event: Callable[[Event], None], link: AgentLink | None = None, lease_s: float = 15.0) -> None:
        self._on_event = on_event
        self._link = link
        self._lease_s = lease_s
        self._agent: AgentProcess | RemoteAgent | None = None
        self._attached: asyncio.Future[None] | None = None
        self._asked: asyncio.Future[AgentRecord] | None = None
        self._order: Start | None = None
        self._started: asyncio.Future[None] | None = None
        self._is_done = False
        self._way = ""  # how the agent ended
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

    @property
    def is_local(self) -> bool:
        """Whether the node is this one."""
        return self._link is None

    @property
    def noise(self) -> list[str]:
        """The last lines of what a login on the node printed before its agent spoke."""
        return self._agent.noise if isinstance(self._agent, RemoteAgent) else []

    @property
    def clock_error_s(self) -> float:
        """How far the times of this node's events may be off, in seconds."""
        return self._agent.clock.error_s if isinstance(self._agent, RemoteAgent) else 0.0

    @property
    def clock_offset_ns(self) -> int:
        """By how much this node's monotonic clock is ahead of the driver's, to within ``clock_error_s``."""
        return self._agent.clock.offset_ns if isinstance(self._agent, RemoteAgent) else 0

    def open(self) -> None:
        """Start the agent, which waits for its order; do it before the run directory is made, and nothing can be left of that.

        Raises:
            ConfigError: the command that reaches other nodes is not installed.
            LaunchError: no process can be started, or descriptors have run out.
        """
        assert self._agent is None, "open is called once"
        self._attached = asyncio.get_running_loop().create_future()
        if self._link is None:
            local = AgentProcess(self._on_record, self._on_silence, self._on_agent_end)
            local.open()
            self._agent = local
            self._settle(self._attached, None)
        else:
            remote = RemoteAgent(
                self._link, self._lease_s, self._on_record, self._on_silence, self._on_agent_end, lambda: self._settle(self._attached, None)
            )
            remote.open()
            self._agent = remote

    async def wait_attached(self, timeout_s: float) -> None:
        """Wait until the agent of another node answers.

        Raises:
            LaunchError: it does not within ``timeout_s``, or its link has ended; says how.
        """
        assert self._attached is not None, "open comes first"
        try:
            await asyncio.wait_for(asyncio.shield(self._attached), timeout_s)
        except asyncio.TimeoutError:
            assert self._agent is not None, "open comes first"
            self._agent.kill_both()
            raise LaunchError(f"no word of an agent within {timeout_s:g} s") from None

    async def ask(self, question: AgentRecord, answer: type[AnswerT], timeout_s: float) -> AnswerT:
        """Send a record of ``node_records`` or ``node_facts`` and return the answer; one at a time.

        Raises:
            LaunchError: none within ``timeout_s``, or the agent is gone.
        """
        assert self._agent is not None, "open comes first"
        if self._is_done:
            raise LaunchError(f"its agent is gone{self._how}")
        self._asked = asyncio.get_running_loop().create_future()
        if isinstance(self._agent, RemoteAgent):
            self._agent.ping()  # it has nothing else to do now, which is when its clock is read best
        self._agent.send(question)
        try:
            told = await asyncio.wait_for(self._asked, timeout_s)
        except asyncio.TimeoutError:
            raise LaunchError(f"its agent did not answer a {type(question).__name__} within {timeout_s:g} s") from None
        if not isinstance(told, answer):
            raise LaunchError(f"its agent answered a {type(question).__name__} with a {type(told).__name__}")
        return told

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
                raise LaunchError(f"the agent of this node ended before it was told what to start{self._how}")
            if run_directory is not None and not isinstance(self._agent, RemoteAgent):
                self._agent.hand_over(run_directory)
            self._agent.send(order)
            await asyncio.wait_for(self._started, timeout_s)
        except asyncio.TimeoutError:
            await self.stop(0.0, order.kill_s)
            missing = sorted({rank.rank for rank in order.ranks} - set(self._pids))
            raise LaunchError(f"ranks {missing} had no process after {timeout_s} s") from None
        except LaunchError as error:
            await self.stop(0.0, order.kill_s)
            said = self._link.tail if self._link is not None else []
            if not said or said[-1] in str(error):
                raise
            raise LaunchError(str(error) + _said(said)) from error
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
        if self._order is not None:
            self.stop_nowait(grace_s, kill_s)
        elif isinstance(self._agent, RemoteAgent):
            (self._agent.kill_agent if self._is_attached else self._agent.kill_both)()  # it has started nothing
        else:
            self._agent.kill_both()
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

    @property
    def _is_attached(self) -> bool:
        return self._attached is not None and self._attached.done() and self._attached.exception() is None

    @property
    def _how(self) -> str:
        return f": {self._way}" if self._way else ""

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
                self._settle(self._started, None)
        elif isinstance(record, RankExited):
            self._exit_codes[record.rank] = record.exit_code
            self._emit(self._in_own_time(record))
        elif isinstance(record, LaunchFailed):
            reason = record.reason if self._link is None else f"{self._link.name}: {record.reason}"
            self._emit(replace(record, reason=reason))
            self._settle(self._started, LaunchError(reason))
        elif isinstance(record, AgentGone):
            self._is_done = True
            if self._order is not None:
                self._emit(record)
        elif isinstance(record, RankStack):
            if record.request in self._dumps:  # else it comes too late
                self._dumps[record.request].texts[record.rank] = record.text
        elif isinstance(record, StacksDone):
            if record.request in self._dumps:
                self._dumps[record.request].done.set()
        elif isinstance(record, (AgentStarted, RankLog, AgentWarning, RelayLost)):
            self._emit(record)
        elif isinstance(record, _ANSWERS):
            if self._asked is not None and not self._asked.done():  # else it comes too late
                self._asked.set_result(record)
        else:
            self._on_silence(BadFrameError(f"the agent sent the order {type(record).__name__}"))

    def _on_silence(self, error: BadFrameError | None) -> None:
        """An agent that closes its stream has said all, or is beyond help."""
        if error is not None:
            self._emit(AgentWarning(f"the agent is killed, since it broke the protocol: {error}"))
        if not self._is_done and self._agent is not None:
            self._agent.kill_agent()

    def _on_agent_end(self, way: str) -> None:
        self._way = way
        self._settle(self._attached, LaunchError(way))
        self._settle(self._started, LaunchError(way))
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(LaunchError(way))
        for dump in self._dumps.values():
            dump.done.set()
        if not self._is_done:
            self._is_done = True
            if self._order is not None:
                self._emit(AgentLost(way, tuple(sorted({rank.rank for rank in self._order.ranks} - set(self._exit_codes)))))

    def _in_own_time(self, record: RankExited) -> RankExited:
        """Return the record with its time on this node's clock."""
        return replace(record, ended_ns=self._agent.clock.here(record.ended_ns)) if isinstance(self._agent, RemoteAgent) else record

    def _why_silent(self, rank: int, timeout_s: float) -> str:
        if rank in self._exit_codes:
            return f"its process {describe_exit(self._exit_codes[rank])}"
        if rank not in self._pids:
            return "it has no process yet"
        return "its agent is gone" if self._is_done else f"its agent did not tell within {timeout_s:g} s"

    def _settle(self, future: asyncio.Future[None] | None, error: LaunchError | None) -> None:
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # it may be that nobody waits any more

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # the caller's code: it must not end the supervision
            asyncio.get_running_loop().call_exception_handler({"message": f"on_event raised on {type(event).__name__}", "exception": error})


def _said(lines: Sequence[str]) -> str:
    """Return what an agent and a zygote of another node have printed last; those of this node share the driver's stderr."""
    return "; it printed:" + "".join(f"\n    {line}" for line in lines[-_NUM_TOLD_LINES:]) if lines else ""
