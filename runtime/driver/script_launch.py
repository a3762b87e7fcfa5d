"""A launch of ranks that run a script of their own: its processes, the store for their coordinator, and its end.

There are no steps and no driver program here. This process keeps the port of rank 0's server and serves the store; the agent
supervises, as it does for a worker group.

    Ctrl-C, SIGTERM or SIGHUP   once    the ranks get the same signal and ``grace_s`` to end, then SIGTERM and SIGKILL
                                twice   SIGTERM now, SIGKILL after ``KILL_S``
                                thrice  SIGKILL now
    a rank fails                        the others get SIGTERM at once, SIGKILL after ``abort_grace_s``
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from collections import deque

from ...errors import LaunchError, NodeLostError
from ..launch.agent_protocol import AgentGone, AgentWarning, RankExited, RankLog
from ..launch.command.options import ScriptOptions
from ..launch.command.plan_text import describe_nodes
from ..launch.command.script_console import ScriptConsole
from ..launch.launch_supervisor import AllGone, NodeEvent
from ..launch.supervisor import AgentLost
from .script_end import ScriptEnd
from .script_faults import RankEnd
from .script_processes import KILL_S, ScriptProcesses

# A rank whose error the loss of another explains is heard of first when the other takes its time to end; it gets this long.
SETTLE_S = 2.0
# Beyond the moments given to the agent, until it is killed itself.
_MARGIN_S = 5.0
_STDERR_LINES = 400
_MAX_LINE_CHARACTERS = 2000
_STOPPED_FLUSH_S = 1.0
_FLUSH_PERIOD_S = 0.01
_PACE_PERIOD_S = 0.02
_NODE_SIGNAL_S = 0.5
_STACKS_S = 5.0


class ScriptLaunch:
    """Starts the ranks and follows them to their end; ``run`` once, ``interrupt`` as often as somebody asks for the end."""

    def __init__(self, options: ScriptOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._console = ScriptConsole(options, self._on_output_closed)
        self._is_terminal = os.isatty(1)
        self._processes = ScriptProcesses(
            options,
            log_policy="drop" if self._is_terminal else "wait",
            on_event=self._on_event,
            on_trouble=self._console.say,
            on_node_signal=self._on_node_signal,
        )
        self._done = asyncio.Event()
        self._signals: list[int] = []
        self._started_at = 0.0
        self._is_overdue = False
        self._left: tuple[int, ...] = ()
        self._ends: list[RankEnd] = []
        self._stderr: dict[int, deque[str]] = {}
        self._is_ending = False
        self._ending_at = math.inf
        self._is_holding = False
        self._error: LaunchError | NodeLostError | None = None
        self._preparing: asyncio.Task[object] | None = None

    async def run(self) -> int:
        """Run the launch and return its exit code: 0, that of the rank that failed first, or 128 and the first signal.

        Raises:
            EndpointInUseError: a live launch has this launch id, or the port that was asked for is taken.
            ResourceError: the system has too few descriptors, threads, memory or disk.
            LaunchError: a rank could not be started, or did not end even after SIGKILL.
            PeerLostError: the agent that supervises the ranks was killed.

        Cancellation: ends the ranks as an ``interrupt`` does that comes the second time.
        """
        if self._signals:  # before anything was started
            return 128 + self._signals[0]
        with contextlib.closing(self._processes):
            try:
                await self._follow()
            finally:
                await self._processes.stop()
        return await self._conclude()

    def interrupt(self, number: int) -> None:
        """Have the ranks ended: gently the first time, quickly the second, at once the third."""
        self._signals.append(number)
        name, count = signal.Signals(number).name, len(self._signals)
        supervisor = self._processes.supervisor
        if self._preparing is not None and not self._preparing.done():
            self._preparing.cancel()  # no rank is there yet
            return
        if supervisor is None or self._done.is_set():
            return
        grace_s = self._options.grace_s
        if count == 1:
            why = "nobody reads standard output any longer" if number == signal.SIGPIPE else name
            self._console.say(f"{why}: the ranks have {grace_s:g} s to end; a signal more ends them in {KILL_S:g} s, yet another at once")
            supervisor.signal_nowait(signal.SIGTERM if number == signal.SIGPIPE else number)
            self._end_ranks(grace_s, KILL_S)
        elif count == 2:
            self._console.say(f"{name} again: the ranks are ended")
            self._end_ranks(0.0, KILL_S)
        else:
            self._end_ranks(0.0, 0.0)

    async def time_out(self) -> None:
        """Tell what each rank is doing, and have them ended as after a failure."""
        if self._preparing is not None and not self._preparing.done():
            self._is_overdue = True
            self._preparing.cancel()
        elif self._processes.supervisor is not None and not self._done.is_set() and not self._is_ending:
            self._is_overdue = True
            self._console.say(f"not done within {self._options.timeout_s:g} s (--timeout); what the ranks are doing:")
            for rank, text in sorted((await self._processes.supervisor.dump_stacks(_STACKS_S)).items()):
                self._console.say(f"rank {rank}: {text}")
            self._abort()

    async def leave_callers(self, exit_code: int) -> None:
        """Have the processes of nodes that called in end with this code; after ``run``."""
        await self._processes.leave_callers(exit_code)

    def _on_node_signal(self, node_rank: int, number: int) -> None:
        """End the launch as for a signal of one's own, unless that comes too: a terminal and a manager of jobs signal all processes."""

        def interrupt() -> None:
            if not self._signals:
                self._console.say(f"the process of node {node_rank} got {signal.Signals(number).name}")
                self.interrupt(number)

        self._loop.call_later(_NODE_SIGNAL_S, interrupt)

    # --- starting ---

    async def _follow(self) -> None:
        self._preparing = self._loop.create_task(self._processes.prepare())
        try:
            await self._preparing
        except asyncio.CancelledError:
            if not self._signals and not self._is_overdue:
                raise
            return
        plan = self._processes.plan
        self._console.use_plan(plan)
        if len(plan.nodes) > 1 and not self._options.is_quiet:
            self._console.say(describe_nodes(plan, self._options))
        for name, line in self._processes.noise() if self._options.is_verbose else ():
            self._console.say(f"{name}: its login printed: {line}")
        self._started_at = time.monotonic()
        try:
            await self._processes.start()
        except LaunchError:
            if not self._signals:  # whoever ends a launch that is just starting gets no error for it
                raise
        else:
            await self._done.wait()

    # --- what happens ---

    def _on_event(self, event: NodeEvent, node_rank: int) -> None:
        if isinstance(event, RankLog):
            if event.stream == "err":
                self._stderr.setdefault(event.rank, deque(maxlen=_STDERR_LINES)).extend(line[:_MAX_LINE_CHARACTERS] for line in event.lines)
            self._console.show(event.rank, event.stream, event.lines)
            if not self._is_holding:
                self._pace()
        elif isinstance(event, RankExited):
            self._on_exit(event, node_rank)
        elif isinstance(event, AgentWarning):
            self._console.say(event.reason)
        elif isinstance(event, (AgentGone, AgentLost)):
            self._on_agent_end(event, node_rank)
        elif isinstance(event, AllGone):
            self._done.set()

    def _pace(self) -> None:
        """Let ranks wait for whoever reads their output, as a pipe would; not for a terminal, nor once they are to end."""
        assert self._processes.supervisor is not None, "it has said something"
        is_holding = self._console.is_behind and not self._is_terminal and not self._is_ending
        if is_holding != self._is_holding:
            self._is_holding = is_holding
            self._processes.supervisor.hold_nowait(is_holding)
        if is_holding:
            self._loop.call_later(_PACE_PERIOD_S, self._pace)

    def _on_exit(self, event: RankExited, node_rank: int) -> None:
        ended_s, whereabouts = event.ended_ns / 1e9, self._processes.whereabouts(node_rank)
        end = RankEnd(
            rank=event.rank,
            pid=event.pid,
            exit_code=event.exit_code,
            at_s=max(0.0, ended_s - self._started_at),
            # the news of it may have come later; what the clocks of two nodes do not tell, the agent does
            is_spontaneous=not event.was_signalled and ended_s - whereabouts.get("error_s", 0.0) < self._ending_at,
            stderr=tuple(self._stderr.get(event.rank, ())),
            tail=event.log_tail,
            error_report=event.error_report,
            **whereabouts,
        )
        self._ends.append(end)
        if end.exit_code != 0 and end.is_spontaneous:
            self._console.show_failed(end.rank, end.tail)
        if end.exit_code == 0 or self._is_ending:
            return
        if end.is_consequence:
            self._loop.call_later(SETTLE_S, self._abort)
        else:
            self._abort()

    def _abort(self) -> None:
        if not self._is_ending:
            self._end_ranks(0.0, self._options.abort_grace_s)

    def _end_ranks(self, grace_s: float, kill_s: float) -> None:
        """Ask the agent for the end of all ranks; if it does not come, ``run`` goes on without and kills the agent."""
        assert self._processes.supervisor is not None, "there is something to be ended"
        if not self._is_ending:
            self._is_ending, self._ending_at = True, time.monotonic()
        self._processes.supervisor.stop_nowait(grace_s, kill_s)
        self._loop.call_later(grace_s + 2 * kill_s + _MARGIN_S, self._done.set)

    def _on_output_closed(self) -> None:
        """End the launch as a program ends whose reader is gone; called from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.interrupt, signal.SIGPIPE)

    def _on_agent_end(self, event: AgentGone | AgentLost, node_rank: int) -> None:
        if isinstance(event, AgentLost):
            self._error = self._error or self._processes.node_lost(node_rank, event)
            self._abort()
        elif event.left:
            pids, name = ", ".join(map(str, event.left)), self._processes.node_name(node_rank)
            self._error = LaunchError(f"{name}: pids {pids} did not end even after SIGKILL; see their state in /proc".lstrip(": "))

    # --- the end ---

    async def _conclude(self) -> int:
        now = time.monotonic()
        end = ScriptEnd(
            options=self._options,
            plan=self._processes.plan if self._started_at else None,
            ends=self._ends,
            signals=self._signals,
            error=self._error,
            is_overdue=self._is_overdue,
            elapsed_s=now - self._started_at if self._started_at else 0.0,
            cleanup_s=now - self._started_at - min((end.at_s for end in self._ends), default=0.0) if self._started_at else 0.0,
            left=self._left,
        )
        if summary := end.summary():
            self._console.say(summary)
        if trouble := end.write_report():
            self._console.say(trouble)
        await self._wait_shown()
        code = end.exit_code
        if code is None and self._error is not None:
            raise self._error
        return code or 0

    async def _wait_shown(self) -> None:
        """Wait until whoever reads our output has read it, for as long as that takes: a pager may be open. A signal ends the wait."""
        deadline = self._loop.time() + _STOPPED_FLUSH_S if self._signals else None
        num_signals = len(self._signals)
        while not self._console.is_shown():
            if len(self._signals) > num_signals or (deadline is not None and self._loop.time() > deadline):
                return
            await asyncio.sleep(_FLUSH_PERIOD_S)
