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
import os
import secrets
import signal
import socket
from collections import deque

import zmq

from ...errors import LaunchError, PeerLostError, ProtocolError
from ...transport.control_sockets import ControlServer
from ...transport.records import Bootstrap
from ...transport.schema import pack_record
from ..launch.agent_protocol import AgentGone, AgentWarning, RankExited, RankLog, RankStart, Start
from ..launch.options import ScriptOptions
from ..launch.plan import LaunchPlan, plan_local
from ..launch.ports import ReservedPort, hold_port, reserve_port
from ..launch.resources import check_resources, shortages_named
from ..launch.run_directory import RunDirectory
from ..launch.script_console import ScriptConsole
from ..launch.supervisor import AgentLost, Event, NodeSupervisor
from .control import ControlHub, RankRecord
from .script_faults import RankEnd, exit_code_of, first_cause, summarise

START_S = 120.0
KILL_S = 2.0
# A rank whose error the loss of another explains is heard of first when the other takes its time to end; it gets this long.
SETTLE_S = 2.0
# Beyond the moments given to the agent, until it is killed itself.
_MARGIN_S = 5.0
_STDERR_LINES = 400
_MAX_LINE_CHARACTERS = 2000
_STOPPED_FLUSH_S = 1.0
_FLUSH_PERIOD_S = 0.01
_PACE_PERIOD_S = 0.02


class ScriptLaunch:
    """Starts the ranks and follows them to their end; ``run`` once, ``interrupt`` as often as somebody asks for the end."""

    def __init__(self, options: ScriptOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._console = ScriptConsole(options, self._on_output_closed)
        self._supervisor: NodeSupervisor | None = None
        self._token = secrets.token_bytes(32)
        self._done = asyncio.Event()
        self._signals: list[int] = []
        self._started_at = 0.0
        self._ends: list[RankEnd] = []
        self._stderr = [deque[str](maxlen=_STDERR_LINES) for _ in range(options.world_size)]
        self._is_ending = False
        self._is_holding = False
        self._is_terminal = os.isatty(1)
        self._error: LaunchError | PeerLostError | None = None

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
        with contextlib.ExitStack() as cleanups:
            check_resources(self._options.world_size)
            self._supervisor = NodeSupervisor(self._on_event)
            try:
                self._supervisor.open()
                with shortages_named():
                    directory = RunDirectory.create(self._options.launch_id)
                    cleanups.callback(directory.remove)
                    port = cleanups.enter_context(self._hold_port())
                    self._open_store(directory, cleanups)
                plan = script_plan(self._options, port.port, str(directory.path))
                await self._follow(self._supervisor, self._order(plan, directory), directory)
            finally:
                await self._supervisor.stop(0.0, KILL_S)
        return await self._conclude()

    def interrupt(self, number: int) -> None:
        """Have the ranks ended: gently the first time, quickly the second, at once the third."""
        self._signals.append(number)
        name, count = signal.Signals(number).name, len(self._signals)
        if self._supervisor is None or self._done.is_set():
            return
        grace_s = self._options.grace_s
        if count == 1:
            why = "nobody reads standard output any longer" if number == signal.SIGPIPE else name
            self._console.say(f"{why}: the ranks have {grace_s:g} s to end; a signal more ends them in {KILL_S:g} s, yet another at once")
            self._supervisor.signal_nowait(signal.SIGTERM if number == signal.SIGPIPE else number)
            self._end_ranks(grace_s, KILL_S)
        elif count == 2:
            self._console.say(f"{name} again: the ranks are ended")
            self._end_ranks(0.0, KILL_S)
        else:
            self._end_ranks(0.0, 0.0)

    # --- starting ---

    def _hold_port(self) -> ReservedPort:
        options = self._options
        if options.master_port:
            return hold_port(options.master_addr, options.master_port)
        return reserve_port(options.launch_id, "master", options.master_addr)

    def _open_store(self, directory: RunDirectory, cleanups: contextlib.ExitStack) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        cleanups.callback(context.destroy, linger=0)
        hub = ControlHub(
            ControlServer(context, directory.endpoint("control")),
            token=self._token,
            world_size=self._options.world_size,
            on_hello=_refuse_worker,
            on_progress=lambda rank: None,  # only workers report any
            on_error=lambda error: self._console.say(f"control socket: {error}"),
        )
        cleanups.callback(hub.close)

    def _order(self, plan: LaunchPlan, directory: RunDirectory) -> Start:
        options = self._options
        secret = pack_record(Bootstrap(launch_id=options.launch_id, control_endpoint=directory.endpoint("control"), token=self._token))
        environments = [script_environment(options, plan, rank) for rank in range(options.world_size)]
        return Start(
            ranks=tuple(RankStart(rank, environment, secret) for rank, environment in enumerate(environments)),
            start_method="spawn",
            argv=options.argv,
            cwd=options.cwd,
            log_dir=options.log_dir,
            log_policy="drop" if self._is_terminal else "wait",
            kill_s=KILL_S,
        )

    async def _follow(self, supervisor: NodeSupervisor, order: Start, directory: RunDirectory) -> None:
        self._started_at = self._loop.time()
        try:
            await supervisor.start(order, directory, START_S)
        except LaunchError:
            if not self._signals:  # whoever ends a launch that is just starting gets no error for it
                raise
        else:
            await self._done.wait()

    # --- what happens ---

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RankLog):
            if event.stream == "err":
                self._stderr[event.rank].extend(line[:_MAX_LINE_CHARACTERS] for line in event.lines)
            self._console.show(event.rank, event.stream, event.lines)
            if not self._is_holding:
                self._pace()
        elif isinstance(event, RankExited):
            self._on_exit(event)
        elif isinstance(event, AgentWarning):
            self._console.say(event.reason)
        elif isinstance(event, (AgentGone, AgentLost)):
            self._on_agent_end(event)

    def _pace(self) -> None:
        """Let ranks wait for whoever reads their output, as a pipe would; not for a terminal, nor once they are to end."""
        assert self._supervisor is not None
        is_holding = self._console.is_behind and not self._is_terminal and not self._is_ending
        if is_holding != self._is_holding:
            self._is_holding = is_holding
            self._supervisor.hold_nowait(is_holding)
        if is_holding:
            self._loop.call_later(_PACE_PERIOD_S, self._pace)

    def _on_exit(self, event: RankExited) -> None:
        end = RankEnd(
            rank=event.rank,
            pid=event.pid,
            exit_code=event.exit_code,
            at_s=self._loop.time() - self._started_at,
            is_spontaneous=not self._is_ending,
            stderr=tuple(self._stderr[event.rank]),
            tail=event.log_tail,
            error_report=event.error_report,
        )
        self._ends.append(end)
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
        assert self._supervisor is not None
        self._is_ending = True
        self._supervisor.stop_nowait(grace_s, kill_s)
        self._loop.call_later(grace_s + 2 * kill_s + _MARGIN_S, self._done.set)

    def _on_output_closed(self) -> None:
        """End the launch as a program ends whose reader is gone; called from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.interrupt, signal.SIGPIPE)

    def _on_agent_end(self, event: AgentGone | AgentLost) -> None:
        if isinstance(event, AgentLost):
            self._error = PeerLostError(f"the ranks are gone with the agent that supervised them: {event.reason}")
        elif event.left:
            pids = ", ".join(map(str, event.left))
            self._error = LaunchError(f"pids {pids} did not end even after SIGKILL; see their state in /proc")
        self._done.set()

    # --- the end ---

    async def _conclude(self) -> int:
        cause = first_cause(self._ends)
        is_failure = cause is not None and cause.severity < 2
        if cause is not None and is_failure:
            self._console.say(summarise(cause, self._ends, host=socket.gethostname(), log_dir=self._options.log_dir))
        await self._wait_shown()
        if cause is not None and is_failure:
            return exit_code_of(cause)
        if self._signals:
            return 128 + self._signals[0]
        if self._error is not None:
            raise self._error
        return 0

    async def _wait_shown(self) -> None:
        """Wait until whoever reads our output has read it, for as long as that takes: a pager may be open. A signal ends the wait."""
        deadline = self._loop.time() + _STOPPED_FLUSH_S if self._signals else None
        num_signals = len(self._signals)
        while not self._console.is_shown():
            if len(self._signals) > num_signals or (deadline is not None and self._loop.time() > deadline):
                return
            await asyncio.sleep(_FLUSH_PERIOD_S)


def script_plan(options: ScriptOptions, master_port: int, run_directory: str) -> LaunchPlan:
    """Return the plan of a script's launch; starts and binds nothing."""
    return plan_local(
        launch_id=options.launch_id,
        world_size=options.world_size,
        master_addr=options.master_addr,
        master_port=master_port,
        run_directory=run_directory,
        devices=options.devices,
    )


def script_environment(options: ScriptOptions, plan: LaunchPlan, rank: int) -> dict[str, str]:
    """Return the whole environment of a rank: the launch's facts, what torch's elastic agent would set, and ``--env``."""
    environment = plan.rank_environment(rank, {**os.environ, **options.environment})
    environment.update(options.environment)  # those too that are taken out as another launcher's
    environment.update(
        TORCHELASTIC_RUN_ID=options.run_id,
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_ERROR_FILE=os.path.join(plan.run_directory, f"error-r{rank:05d}.json"),
    )
    if options.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.visible_devices
    return environment


def _refuse_worker(rank: RankRecord) -> None:
    raise ProtocolError(f"rank {rank.rank} asks for a worker's welcome, and this launch runs a script")
