"""What a worker group owns while it lives: run directory, port, sockets, and the supervisor of its processes.

Start-up, in which no step can be lost: bind -> start the agent -> each rank says hello and is welcomed -> each subscribes, its own
topic last -> when all have, the group publishes SYNC -> each rank answers it once its set-up is done.

The file passes 350 lines because one owner opens all of it and closes all of it, whatever fails in between.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from ...backends import choose_communicator
from ...errors import LaunchError, PeerLostError, ReadyTimeoutError, describe_exit
from ...transport.codec import ValueEncoder
from ...transport.control_sockets import ControlServer
from ...transport.frames import Buffer, ResultFrame, StepKind
from ...transport.reader import SocketReader
from ...transport.records import Welcome
from ...transport.sockets import ResultCollector, StepPublisher
from ..launch.agent_protocol import AgentGone, AgentStarted, AgentWarning, LaunchFailed, RankExited, RankLog, RankStarted, Start
from ..launch.launch_supervisor import NodeEvent
from ..launch.nodes.node_records import RelayLost
from ..launch.nodes.nodes_request import NodesRequest
from ..launch.orders import node_order
from ..launch.resources import check_resources, shortages_named
from ..launch.supervisor import AgentLost
from .control import ControlHub, RankRecord
from .events import EventLog
from .launch_site import LaunchSite
from .launching import GroupConfig
from .reports import RankReports

if TYPE_CHECKING:
    from .tracing import GroupTracer

LOG_TAIL_LINES = 40
_CALL_SHARE = 0.9  # of ready_s for nodes to call in, so that who is missing is told before all that is not ready
START_MARGIN_S = 5.0  # beyond ready_s, so that the group, which knows more, speaks first


class GroupProcesses:
    """The processes and sockets of one launch. ``start`` opens them, ``stop`` ends the processes, ``close`` removes the rest.

    Calls back ``on_subscribed`` once every rank listens, ``on_result`` for each answer, which returns whether it woke a task,
    ``on_exit`` with (rank, exit code, when) for each ended rank, ``on_broken`` for an answer that cannot be read, and ``on_error`` for
    what is no rank's doing.
    """

    def __init__(
        self,
        config: GroupConfig,
        events: EventLog,
        *,
        on_subscribed: Callable[[], object],
        on_result: Callable[[ResultFrame], bool],
        on_exit: Callable[[int, int, float | None], None],
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
        self._site = self._make_site()
        self._subscribed: set[int] = set()
        self._log_tails = [deque[str](maxlen=LOG_TAIL_LINES) for _ in range(config.parallel.world_size)]
        self.reports = RankReports(lambda: self.control.ranks, self.log_tail)
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
        self.plan = await self._site.prepare()
        with shortages_named():
            self._open_sockets()
        if config.tracer is not None:
            config.tracer.starting(self.plan)
            self._site.cleanups.callback(self._finish_trace, config.tracer)
        if config.recorder is not None:
            self._site.cleanups.callback(config.recorder.close)
            threads = self.plan.rank_environment(0)["OMP_NUM_THREADS"]
            config.recorder.starting(config, self._epoch, self._worker_args, omp_num_threads=threads)
        timeout_s = config.deadlines.ready_s + START_MARGIN_S
        if trouble := await self._site.start(self._order, timeout_s, is_script=False, log_dir=config.log_dir):
            print(f"zspmd: {config.launch_id}: {trouble}", file=sys.stderr)

    def _make_site(self) -> LaunchSite:
        config = self._config
        request = NodesRequest(
            launch_id=config.launch_id,
            hosts=config.hosts,
            config=config.nodes,
            world_size=config.parallel.world_size,
            devices=config.devices,
            script=config.main_path,
            bind=config.bind,
        )
        return LaunchSite(
            request,
            self._on_event,
            lease_s=config.deadlines.lease_s,
            dial=config.dial,
            call_s=_CALL_SHARE * config.deadlines.ready_s,
            on_notice=self._on_notice,
            on_node_signal=self._on_node_signal,
        )

    def _on_notice(self, kind: str, text: str) -> None:
        if kind == "refused":
            self._events.emit("refused", None, text)
        else:
            print(f"zspmd: {self._config.launch_id}: {text}", file=sys.stderr)

    def _on_node_signal(self, node_rank: int, number: int) -> None:
        self._on_error(PeerLostError(f"the process of node {node_rank} got {signal.Signals(number).name}"))

    async def leave_callers(self, exit_code: int) -> None:
        """Have the processes of nodes that called in end with this code; after ``stop``."""
        await self._site.leave_callers(exit_code)

    def _order(self, node_rank: int) -> Start:
        config = self._config
        return node_order(
            self.plan,
            node_rank,
            config.nodes,
            secret=lambda rank: self._site.secret(rank, self._control_endpoints),
            start_method=config.start_method,
            argv=("-m", "zspmd.workers.main"),
            preload=("zspmd.workers.main", *config.preload),
            cwd=os.getcwd(),
            log_dir=config.log_dir,
            kill_s=config.deadlines.kill_s,
            relay=self._site.relay(node_rank, self.publisher.endpoints),
        )

    async def stop(self, *, grace_s: float) -> None:
        """End the ranks within ``grace_s`` and twice ``deadlines.kill_s``; works half-started."""
        await self._site.stop(grace_s, self._config.deadlines.kill_s)
        if self.is_open:
            self._drain_results()  # what a rank said last

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing: the kernel's word, and the Python stacks of its threads."""
        return await self._site.dump_stacks(timeout_s)

    def kill_nowait(self) -> None:
        """Have every rank ended at once; ``stop`` waits for it."""
        self._site.kill_nowait()

    def close(self) -> None:
        """Close the sockets and remove the run directory; the processes must have ended."""
        self._site.close()

    def publish(self, kind: StepKind, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> int:
        """Publish one frame to every rank; raises as ``StepPublisher.publish``."""
        seq = self.publisher.publish(kind, body, buffers)
        if self._config.recorder is not None:
            self._config.recorder.published(kind, seq, body, buffers)
        self._poke()
        return seq

    def replay(self, rank: int, seq: int) -> None:
        """Send frame ``seq`` and what followed it to one rank again; raises as ``StepPublisher.replay``."""
        count = self.publisher.replay(rank, seq)
        self._poke()
        self._events.emit("replayed", rank, f"{count} frames from {seq} on")

    def tick(self) -> None:
        """Remind the ranks of the last frame's number; raises as ``StepPublisher.tick``."""
        self.publisher.tick()
        self._poke()

    def _poke(self) -> None:
        for reader in self._subscription_readers:
            reader.poke()

    @property
    def impostor_frames(self) -> int:
        """How many messages ranks have sent in the name of others."""
        return 0 if self._site.door is None else self._site.door.impostor_frames

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
        self._site.cleanups.callback(lambda: context.destroy(linger=0))
        config = self._config
        is_all_tcp = config.bind is not None and config.hosts is None and config.dial is None
        site = self._site
        site.open_door(context, self._events.emit, self._on_error, is_all_tcp=is_all_tcp, relay_mode=config.nodes.relay)
        self.publisher = StepPublisher(context, site.endpoints("step"), epoch=self._epoch, door=site.door)
        self._site.cleanups.callback(self.publisher.close)
        self.collector = ResultCollector(context, site.endpoints("result"), epoch=self._epoch, door=site.door)
        self._site.cleanups.callback(self.collector.close)
        server = ControlServer(context, site.endpoints("control"), site.door)
        self._control_endpoints = server.endpoints
        self.control = ControlHub(
            server,
            token=site.token,
            world_size=self._config.parallel.world_size,
            on_hello=self._welcome,
            on_progress=self._report_progress,
            on_error=self._on_error,
            on_trace=None if config.tracer is None else config.tracer.told,
        )
        self._site.cleanups.callback(self.control.close)
        self._subscription_readers = self._read(self.publisher.sockets, self._read_subscription, self._on_error)
        self._result_readers = self._read(self.collector.sockets, self._read_result, self._on_broken)
        self.is_open = True

    def _read(
        self, sockets: Sequence[zmq.Socket[bytes]], read_one: Callable[[int], bool | None], on_error: Callable[[Exception], None]
    ) -> list[SocketReader]:
        """Have ``read_one`` called with the index of each socket that has something."""
        readers = [
            SocketReader(self.control.loop, socket, functools.partial(read_one, index), on_error) for index, socket in enumerate(sockets)
        ]
        for reader in readers:
            self._site.cleanups.callback(reader.close)
        return readers

    def _drain_results(self) -> None:
        for reader in self._result_readers:
            reader.drain()

    def _read_result(self, index: int) -> bool:
        frame = self.collector.receive(index)
        if frame is None:
            return False
        if self._config.recorder is not None:
            self._config.recorder.answered(frame)
        return self._on_result(frame)

    def _read_subscription(self, index: int) -> None:
        change = self.publisher.read_subscription(index)
        if change is None:
            return
        rank, has_joined = change
        if not has_joined:
            return  # its process ended or is about to: the agent tells how
        self._subscribed.add(rank)
        if len(self._subscribed) == self._config.parallel.world_size:
            for reader in self._subscription_readers:  # nobody else joins, and a poke after each step would cost it 3 us
                reader.close()
            self._subscription_readers = []
            self._on_subscribed()

    def _welcome(self, rank: RankRecord) -> None:
        config = self._config
        trace_events, trace_path = (0, "") if config.tracer is None else config.tracer.place_of(rank.rank)
        self._events.emit("connected", rank.rank, f"pid {rank.pid} on {rank.host}")
        welcome = Welcome(
            epoch=self._epoch,
            step_endpoint=self._site.routes.step_endpoint(rank.rank, self.publisher.endpoints),
            result_endpoint=self._site.routes.endpoint(rank.rank, self.collector.endpoints),
            worker=config.worker,
            main_path=config.main_path,
            output_ranks=config.output_ranks,
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            dp=config.parallel.dp,
            ep=config.parallel.ep,
            device=self.plan.ranks[rank.rank].device,
            communicator=self._communicator(is_one_node=len(self.plan.nodes) == 1),
            local_communicator=self._communicator(is_one_node=True),
            nodes=tuple(place.node_rank for place in self.plan.ranks),
            beat_s=config.deadlines.beat_s,
            collective_s=config.deadlines.collective_s,
            recording=config.recorder.path if config.recorder is not None else "",
            is_relayed=self._site.routes.is_relayed(rank.rank),
            trace_events=trace_events,
            trace_path=trace_path,
        )
        assert rank.connection is not None
        self.control.send(rank.connection, welcome, *self._worker_args)

    def _finish_trace(self, tracer: GroupTracer) -> None:
        def clock(node_rank: int) -> tuple[int, float]:
            assert self._site.supervisor is not None, "the plan comes from it"
            node = self._site.supervisor.nodes[node_rank]
            return node.clock_offset_ns, node.clock_error_s

        tracer.finish([rank.pid for rank in self.control.ranks], self._events.kept(), clock)

    def _communicator(self, *, is_one_node: bool) -> str:
        return choose_communicator(self._config.communicator, [place.device for place in self.plan.ranks], is_one_node=is_one_node)

    def _report_progress(self, rank: RankRecord) -> None:
        if self._config.on_progress is not None and rank.progress is not None:
            self._config.on_progress(rank.rank, rank.progress.done, rank.progress.total, rank.progress.what)

    def _on_event(self, event: NodeEvent, node_rank: int) -> None:
        if isinstance(event, RankLog):
            self._log_tails[event.rank].extend(event.lines)
            for line in event.lines:
                self._log(event.rank, event.stream, line)
        elif isinstance(event, RankExited):
            self._drain_results()  # an error that the rank sent before it ended comes first
            self._events.emit("exited", event.rank, f"pid {event.pid} {describe_exit(event.exit_code)}")
            if not self._has_launch_failed:  # else the agent has ended it, and ``start`` raises why
                self._on_exit(event.rank, event.exit_code, event.ended_ns / 1e9 if event.ended_ns else None)
        elif isinstance(event, LaunchFailed):
            self._has_launch_failed = True
        elif isinstance(event, AgentStarted):
            self._events.emit("serving", None, f"the agent of this node, pid {event.pid}")
        elif isinstance(event, RankStarted):
            self.control.ranks[event.rank].pid = event.pid
            self._events.emit("started", event.rank, f"pid {event.pid}")
        elif isinstance(event, AgentLost) and self.is_open:  # before, whoever makes the plan tells of it
            self._on_error(self._site.node_lost(node_rank, event))
        elif isinstance(event, RelayLost):
            self._on_error(PeerLostError(f"{self._site.node_name(node_rank)} takes no more steps: {event.reason}"))
        elif isinstance(event, AgentGone) and event.left:
            pids, name = ", ".join(map(str, event.left)), self._site.node_name(node_rank)
            where = f"{name}: " if name else ""
            self._on_error(LaunchError(f"{where}pids {pids} did not end even after SIGKILL; see their state in /proc"))
        elif isinstance(event, AgentWarning):
            print(f"zspmd: {self._config.launch_id}: {event.reason}", file=sys.stderr)

    def _log(self, rank: int, stream: str, line: str) -> None:
        if self._config.on_log is not None:
            self._config.on_log(rank, stream, line)
        else:
            print(f"[rank {rank}] {line}", file=sys.stderr)
