"""What a worker group owns while it lives: run directory, port, sockets, and the supervisor of its processes.

Start-up, in which no step can be lost: bind -> start the agent -> each rank says hello and is welcomed -> each subscribes, its own
topic last -> when all have, the group publishes SYNC -> each rank answers it once its set-up is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import zmq

from ...errors import LaunchError, PeerLostError, ReadyTimeoutError, describe_exit
from ...transport.codec import ValueEncoder
from ...transport.control_sockets import ControlServer
from ...transport.door import Door
from ...transport.frames import Buffer, ResultFrame, StepKind
from ...transport.reader import SocketReader
from ...transport.records import Bootstrap, Welcome
from ...transport.schema import pack_record
from ...transport.security import tcp_endpoint
from ...transport.sockets import ResultCollector, StepPublisher
from ..launch.agent_protocol import AgentGone, AgentWarning, LaunchFailed, RankExited, RankLog, RankStart, RankStarted, Start
from ..launch.plan import plan_local
from ..launch.ports import reserve_port
from ..launch.resources import check_resources, shortages_named
from ..launch.run_directory import RunDirectory
from ..launch.supervisor import AgentLost, Event, NodeSupervisor
from .control import ControlHub, RankRecord
from .events import EventLog
from .launching import GroupConfig
from .reports import RankReports

LOG_TAIL_LINES = 40
START_MARGIN_S = 5.0  # beyond ready_s, so that the group, which knows more, speaks first


class GroupProcesses:
    """The processes and sockets of one launch. ``start`` opens them, ``stop`` ends the processes, ``close`` removes the rest.

    Calls back ``on_subscribed`` once every rank listens, ``on_result`` for each answer, ``on_exit`` with (rank, exit code) for each
    ended rank, ``on_broken`` for an answer that cannot be read, and ``on_error`` for what is no rank's doing.
    """

    def __init__(
        self,
        config: GroupConfig,
        events: EventLog,
        *,
        on_subscribed: Callable[[], None],
        on_result: Callable[[ResultFrame], None],
        on_exit: Callable[[int, int], None],
        on_error: Callable[[Exception], None],
        on_broken: Callable[[Exception], None],
    ) -> None:
        self._config = config
        self._events = events
        self._on_subscribed = on_subscribed
        self._on_result = on_result
        self._on_exit = on_exit
        self._on_error = on_error
        self._on_broken = on_broken
        self._epoch = secrets.randbits(32)
        self._token = secrets.token_bytes(32)
        self._door: Door | None = None  # where the sockets are TCP
        self._subscribed: set[int] = set()
        self._log_tails = [deque[str](maxlen=LOG_TAIL_LINES) for _ in range(config.parallel.world_size)]
        self.reports = RankReports(lambda: self.control.ranks, self.log_tail)
        self._cleanups: list[Callable[[], object]] = []
        self._supervisor: NodeSupervisor | None = None
        self._has_launch_failed = False
        self.is_open = False  # whether the sockets were made; it stays so after close

    async def start(self) -> None:
        """Bind, then start the agent, which starts the ranks; returns once each has a process.

        Raises:
            EndpointInUseError: a live launch has this launch id.
            ResourceError: the system has too few descriptors, threads, memory or disk.
            LaunchError: a rank could not be started.
            ConfigError: the recording cannot be made.
            TypeError, ValueError: something in ``worker_args`` may not travel.
        """
        config = self._config
        self._worker_args = ValueEncoder().encode(dict(config.worker_args))
        check_resources(config.parallel.world_size)
        self._supervisor = NodeSupervisor(self._on_event)
        self._supervisor.open()  # before there is a run directory: from now on somebody removes it, whatever becomes of the driver
        with shortages_named():
            self.run_directory = RunDirectory.create(config.launch_id)
            self._cleanups.append(self.run_directory.remove)
            port = reserve_port(config.launch_id, "master")
            self._cleanups.append(port.close)
            self._open_sockets()
            plan = plan_local(
                launch_id=config.launch_id,
                world_size=config.parallel.world_size,
                master_port=port.port,
                run_directory=str(self.run_directory.path),
                devices=config.devices,
            )
        if config.recorder is not None:
            self._cleanups.append(config.recorder.close)
            threads = plan.rank_environment(0)["OMP_NUM_THREADS"]
            config.recorder.starting(config, self._epoch, self._worker_args, omp_num_threads=threads)
        order = Start(
            ranks=tuple(RankStart(r.rank, plan.rank_environment(r.rank), self._secret(r.rank)) for r in plan.ranks),
            start_method=config.start_method,
            argv=(sys.executable, "-m", "zspmd.workers.main"),
            preload=("zspmd.workers.main", *config.preload),
            cwd=os.getcwd(),
            sys_path=tuple(map(os.path.abspath, sys.path)),
            log_dir=config.log_dir,
            kill_s=config.deadlines.kill_s,
        )
        await self._supervisor.start(order, self.run_directory, config.deadlines.ready_s + START_MARGIN_S)

    async def stop(self, *, grace_s: float) -> None:
        """End the ranks within ``grace_s`` and twice ``deadlines.kill_s``; works half-started."""
        if self._supervisor is not None:
            await self._supervisor.stop(grace_s, self._config.deadlines.kill_s)
        if self.is_open:
            self._result_reader.drain()  # what a rank said last

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing: the kernel's word, and the Python stacks of its threads."""
        return {} if self._supervisor is None else await self._supervisor.dump_stacks(timeout_s)

    def kill_nowait(self) -> None:
        """Have every rank ended at once; ``stop`` waits for it."""
        if self._supervisor is not None:
            self._supervisor.kill_nowait()

    def close(self) -> None:
        """Close the sockets and remove the run directory; the processes must have ended."""
        with contextlib.ExitStack() as stack:  # the last first, and each of them whatever another raises
            for cleanup in self._cleanups:
                stack.callback(cleanup)
            self._cleanups.clear()

    def publish(self, kind: StepKind, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> int:
        """Publish one frame to every rank; raises as ``StepPublisher.publish``."""
        seq = self.publisher.publish(kind, body, buffers)
        if self._config.recorder is not None:
            self._config.recorder.published(kind, seq, body, buffers)
        self._subscription_reader.poke()
        return seq

    def replay(self, rank: int, seq: int) -> None:
        """Send frame ``seq`` and what followed it to one rank again; raises as ``StepPublisher.replay``."""
        count = self.publisher.replay(rank, seq)
        self._subscription_reader.poke()
        self._events.emit("replayed", rank, f"{count} frames from {seq} on")

    def tick(self) -> None:
        """Remind the ranks of the last frame's number; raises as ``StepPublisher.tick``."""
        self.publisher.tick()
        self._subscription_reader.poke()

    @property
    def impostor_frames(self) -> int:
        """How many messages ranks have sent in the name of others."""
        return 0 if self._door is None else self._door.impostor_frames

    def log_tail(self, rank: int) -> list[str]:
        """Return the last lines that a rank printed."""
        return list(self._log_tails[rank])

    def not_ready(self, missing: Sequence[int] | None) -> ReadyTimeoutError:
        """Return the error that says how far each of the missing ranks got; None stands for those that have not subscribed."""
        late = [r for r in range(self._config.parallel.world_size) if r not in self._subscribed] if missing is None else missing
        listed = "; ".join(f"rank {rank} {self.reports.progress(rank, has_subscribed=rank in self._subscribed)}" for rank in late)
        limit = self._config.deadlines.ready_s
        return ReadyTimeoutError(f"not ready within {limit:g} s: {listed}; raise Deadlines.ready_s if they only need longer", missing=late)

    def _open_sockets(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._cleanups.append(lambda: context.destroy(linger=0))
        self._open_door(context)
        self.publisher = StepPublisher(context, self._endpoint("step"), epoch=self._epoch, door=self._door)
        self._cleanups.append(self.publisher.close)
        self.collector = ResultCollector(context, self._endpoint("result"), epoch=self._epoch, door=self._door)
        self._cleanups.append(self.collector.close)
        server = ControlServer(context, self._endpoint("control"), self._door)
        self._control_endpoint = server.endpoint
        self.control = ControlHub(
            server,
            token=self._token,
            world_size=self._config.parallel.world_size,
            on_hello=self._welcome,
            on_progress=self._report_progress,
            on_error=self._on_error,
        )
        self._cleanups.append(self.control.close)
        self._subscription_reader = SocketReader(self.control.loop, self.publisher.socket, self._read_subscription, self._on_error)
        self._cleanups.append(self._subscription_reader.close)
        self._result_reader = SocketReader(self.control.loop, self.collector.socket, self._read_result, self._on_broken)
        self._cleanups.append(self._result_reader.close)
        self.is_open = True

    def _open_door(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Have somebody at the door before there is one; within a host there is none."""
        if self._config.bind is None:
            return
        self._door = Door(context, self._config.parallel.world_size, self._events.emit)
        self._cleanups.append(self._door.close)
        reader = SocketReader(asyncio.get_running_loop(), self._door.socket, self._door.answer_one, self._on_error)
        self._cleanups.append(reader.close)

    def _endpoint(self, name: str) -> str:
        bind = self._config.bind
        return self.run_directory.endpoint(name) if bind is None else tcp_endpoint(bind)

    def _secret(self, rank: int) -> bytes:
        """Return what opens the door for one rank, and for it alone where there are keys."""
        bootstrap = Bootstrap(launch_id=self._config.launch_id, control_endpoint=self._control_endpoint, token=self._token)
        if self._door is not None:
            keys = self._door.rank_keys(rank)
            bootstrap = replace(bootstrap, public_key=keys.public, secret_key=keys.secret, server_key=keys.server)
        return pack_record(bootstrap)

    def _read_result(self) -> None:
        frame = self.collector.receive()
        if frame is not None:
            if self._config.recorder is not None:
                self._config.recorder.answered(frame)
            self._on_result(frame)

    def _read_subscription(self) -> None:
        change = self.publisher.read_subscription()
        if change is None:
            return
        rank, has_joined = change
        if not has_joined:
            return  # its process ended or is about to: the agent tells how
        self._subscribed.add(rank)
        if len(self._subscribed) == self._config.parallel.world_size:
            self._subscription_reader.close()  # nobody else joins, and a poke after each step would cost it 3 us
            self._on_subscribed()

    def _welcome(self, rank: RankRecord) -> None:
        config = self._config
        self._events.emit("connected", rank.rank, f"pid {rank.pid} on {rank.host}")
        welcome = Welcome(
            epoch=self._epoch,
            step_endpoint=self.publisher.endpoint,
            result_endpoint=self.collector.endpoint,
            worker=config.worker,
            main_path=config.main_path,
            output_ranks=config.output_ranks,
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            dp=config.parallel.dp,
            ep=config.parallel.ep,
            device=config.devices[rank.rank],
            communicator=config.communicator,
            beat_s=config.deadlines.beat_s,
            collective_s=config.deadlines.collective_s,
            recording=config.recorder.path if config.recorder is not None else "",
        )
        assert rank.connection is not None
        self.control.send(rank.connection, welcome, *self._worker_args)

    def _report_progress(self, rank: RankRecord) -> None:
        if self._config.on_progress is not None and rank.progress is not None:
            self._config.on_progress(rank.rank, rank.progress.done, rank.progress.total, rank.progress.what)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RankLog):
            self._log_tails[event.rank].extend(event.lines)
            for line in event.lines:
                self._log(event.rank, event.stream, line)
        elif isinstance(event, RankExited):
            self._result_reader.drain()  # an error that the rank sent before it ended comes first
            self._events.emit("exited", event.rank, f"pid {event.pid} {describe_exit(event.exit_code)}")
            if not self._has_launch_failed:  # else the agent has ended it, and ``start`` raises why
                self._on_exit(event.rank, event.exit_code)
        elif isinstance(event, LaunchFailed):
            self._has_launch_failed = True
        elif isinstance(event, RankStarted):
            self.control.ranks[event.rank].pid = event.pid
            self._events.emit("started", event.rank, f"pid {event.pid}")
        elif isinstance(event, AgentLost):
            self._on_error(PeerLostError(f"the agent that supervises the ranks is gone: {event.reason}"))
        elif isinstance(event, AgentGone) and event.left:
            self._on_error(LaunchError(f"pids {', '.join(map(str, event.left))} did not end even after SIGKILL; see their state in /proc"))
        elif isinstance(event, AgentWarning):
            print(f"zspmd: {self._config.launch_id}: {event.reason}", file=sys.stderr)

    def _log(self, rank: int, stream: str, line: str) -> None:
        if self._config.on_log is not None:
            self._config.on_log(rank, stream, line)
        else:
            print(f"[rank {rank}] {line}", file=sys.stderr)
