"""A rank in virtual time: the real ends of the sockets and the real ``StepLoop``, around a process that is simulated."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import zspmd
from zspmd.errors import ZspmdError
from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.frames import ResultKind, StepFrame, StepKind
from zspmd.transport.records import Beat, Bootstrap, Hello, Progress, Welcome
from zspmd.transport.schema import pack_record
from zspmd.transport.sockets import ResultPusher, StepSubscriber
from zspmd.workers.context import RankStatus
from zspmd.workers.loop import StepLoop, describe_failure

from .sockets import SimulatedContext, SimulatedSocket
from .work import SimulatedWorker

if TYPE_CHECKING:
    from .launch import SimulatedLaunch
    from .options import Fault

SIGKILL, SIGTERM, SIGSEGV = -int(signal.SIGKILL), -int(signal.SIGTERM), -int(signal.SIGSEGV)


class SimulatedRank:
    """One process from its start to its end.

    Attributes:
        doing: what a look at the process would find: starting, setup, idle, busy, hung, waiting (for peers), ended; or stopped.
    """

    def __init__(self, launch: SimulatedLaunch, rank: int, bootstrap: Bootstrap) -> None:
        self.rank = rank
        self.is_alive = True
        self.exit_code: int | None = None
        self.ignores_sigterm = False
        self.worker = SimulatedWorker(rank)
        self.status = RankStatus()
        self._launch = launch
        self._world = launch.world
        self._bootstrap = bootstrap
        self._context = SimulatedContext(launch.network)
        self._doing = "starting"
        self._is_silent = False
        self._loop: StepLoop | None = None
        self._num_done = 0
        self._faults: Mapping[str, Any] = {fault.what: fault for fault in launch.options.faults if fault.rank == rank}

    @property
    def doing(self) -> str:
        if not self.is_alive:
            return "ended"
        if self._context.stopped_until > self._world.now:
            return "stopped"
        return "waiting" if self._launch.collectives.is_waiting(self.rank) else self._doing

    def start(self) -> None:
        """Connect a little later, as the imports have been done."""
        if "killed_at_start" in self._faults:
            self._after(self._world.chance.uniform(0, 0.05), self._die, "killed_at_start", SIGKILL)
        self._after(self._world.chance.uniform(1e-3, 30e-3), self._connect)

    def end(self, exit_code: int) -> None:
        """End the process, whatever it does."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.exit_code = exit_code
        self._world.note(f"rank {self.rank} ends with {exit_code} while {self._doing}")
        if exit_code < 0 and self._world.happens(0.3):  # what its I/O thread had not written is lost
            for socket in self._context.sockets:
                for link in socket.links:
                    link.queue.clear()
        self._context.destroy()
        self._launch.collectives.lost()
        self._launch.agent.rank_ended(self)

    # starting

    def _connect(self) -> None:
        self._control = ControlClient(self._context, self._bootstrap.control_endpoint)  # type: ignore[arg-type]
        socket = cast(SimulatedSocket, self._control.socket)
        socket.on_message = self._guarded(self._receive_welcome)
        self._control.send(self._hello("rank"))

    def _hello(self, purpose: str) -> Hello:
        return Hello(
            token=self._bootstrap.token, rank=self.rank, pid=self.rank + 1, host="simulated", version=zspmd.__version__, purpose=purpose
        )

    def _receive_welcome(self) -> None:
        record, _ = self._control.receive(0.0)
        assert isinstance(record, Welcome), record
        self._doing = "setup"
        context: Any = self._context
        self._pusher = ResultPusher(context, record.result_endpoint, epoch=record.epoch, rank=self.rank)
        self._subscriber = StepSubscriber(
            context, record.step_endpoint, epoch=record.epoch, rank=self.rank, on_gap=lambda seq: self._pusher.push(ResultKind.GAP, seq)
        )
        self._subscription = cast(SimulatedSocket, self._subscriber.socket)
        self._launch.rank_has_connected(self.rank, self._subscription, cast(SimulatedSocket, self._pusher.socket))
        self._beats = ControlClient(context, self._bootstrap.control_endpoint)
        self._beats.send(self._hello("beat"))
        self._beat(record.beat_s)
        self._control.send(Progress(done=1, total=2, what="parts"))
        self._after(self._world.chance.uniform(1e-3, 50e-3), self._set_up, record)

    def _set_up(self, welcome: Welcome) -> None:
        if "killed_in_setup" in self._faults:
            self._die("killed_in_setup", SIGKILL)
        elif "raised_in_setup" in self._faults:
            self._world.fail_root("raised_in_setup", self.rank)
            self._give_up(ValueError("no weights"))
        elif "hung_in_setup" in self._faults:
            self._world.reach("hung_in_setup")
            self._doing = "hung"
        else:
            self._loop = StepLoop(
                self.worker,
                self._subscriber,
                self._pusher,
                self.status,
                output_ranks=welcome.output_ranks,
                check_parent=lambda: None,
            )
            self._doing = "idle"
            self._subscription.on_message = self._guarded(self._take)
            self._take()

    def _beat(self, period_s: float) -> None:
        if not self._is_silent and not self._world.happens(self._launch.options.lose_beats):
            status, subscriber = self.status, self._subscriber
            beat = Beat(
                phase=status.phase,
                seq=status.seq,
                done_seq=status.done_seq,
                step_id=status.step_id,
                memory_bytes=1,
                done_step_id=status.done_step_id,
                foreign_frames=subscriber.dropped_foreign,
                duplicate_frames=subscriber.dropped_duplicates,
                gaps=subscriber.gaps,
            )
            self._beats.send(beat)
        self._after(period_s, self._beat, period_s)

    # serving

    def _take(self) -> None:
        """Begin the next frame, if the last one is done."""
        if self._doing != "idle" or self._loop is None:
            return
        try:
            frame = self._loop.take(0)
        except ZspmdError as error:
            self._world.fail_root("frame_refused", self.rank)
            self._give_up(error)
            return
        if frame is None:
            return
        self._launch.checks.taken(self.rank, frame)
        self._doing = "busy"
        fault = self._launch.fault_at_frame(self.rank, frame.seq)
        took_s = self._world.chance.uniform(20e-6, self._launch.options.longest_step_s)
        if fault is not None and fault.what in ("killed_before", "killed_within", "exited_within"):
            code = 3 if fault.what == "exited_within" else self._world.chance.choice((SIGKILL, SIGSEGV))
            delay_s = 0.0 if fault.what == "killed_before" else took_s * self._world.chance.random()
            self._after(delay_s, self._die, fault.what, code)
        elif fault is not None and fault.what in ("hung", "hung_with_lock"):
            self._world.reach(fault.what, f"rank {self.rank}")
            self._doing = "hung"
            self._is_silent = fault.what == "hung_with_lock"
        elif frame.kind is StepKind.STOP:
            self._after(took_s, self._stop, frame)
        else:
            self._after(took_s + self._delay(fault), self._compute, frame, "" if fault is None else fault.what)

    def _delay(self, fault: Fault | None) -> float:
        """Stop the process if that befalls it; returns what a slow rank takes longer."""
        if fault is None or fault.what not in ("stopped", "stopped_for", "slowed"):
            return 0.0
        self._world.reach(fault.what, f"rank {self.rank}")
        if fault.what == "slowed":
            return min(fault.for_s, 0.3 * self._launch.options.deadlines.step_s)
        self._context.stopped_until = math.inf if fault.what == "stopped" else self._world.now + fault.for_s
        return 0.0

    def _compute(self, frame: StepFrame, fault: str) -> None:
        """Fail, or meet the others, if it is a step in which they do; else answer."""
        if fault == "raised" and frame.kind is StepKind.STEP:
            self._world.fail_root("raised", self.rank)
            self.worker.error = ValueError("out of range")
            self._answer(frame, fault)
        elif frame.kind is StepKind.STEP and self._launch.is_collective(frame.seq):
            leave = functools.partial(self._leave, frame, fault)
            self._launch.collectives.enter(self.rank, frame.seq, leave)
        else:
            self._answer(frame, fault)

    def _leave(self, frame: StepFrame, fault: str, error: Exception | None) -> None:
        if error is not None and self.is_alive:
            self._world.reach("peer_lost", f"noticed by rank {self.rank}")
            self.worker.error = error
        self._after(0.0, self._answer, frame, fault)

    def _answer(self, frame: StepFrame, fault: str) -> None:
        assert self._loop is not None
        try:
            self._loop.serve(frame)
        except Exception as error:  # as in workers.main: the driver is told whatever it was
            self._give_up(error)
            return
        self._doing = "idle"
        if fault == "killed_after":
            self._after(self._world.chance.expovariate(100.0), self._die, fault, SIGKILL)
        self._take()

    # ending

    def _stop(self, frame: StepFrame) -> None:
        assert self._loop is not None
        if "killed_at_stop" in self._faults or "exited_at_stop" in self._faults:
            what = "killed_at_stop" if "killed_at_stop" in self._faults else "exited_at_stop"
            self._die(what, SIGSEGV if what == "killed_at_stop" else 3)
            return
        self._loop.serve(frame)
        if "raised_in_teardown" in self._faults:
            self._world.fail_root("raised_in_teardown", self.rank)
            self._give_up(ValueError("teardown"))
        elif "ignored_stop" in self._faults or "ignored_signals" in self._faults:
            self.ignores_sigterm = "ignored_signals" in self._faults
            self._world.fail_root("ignored_signals" if self.ignores_sigterm else "ignored_stop", self.rank)
            self._doing = "hung"
        else:
            self._after(self._world.chance.uniform(0, 5e-3), self.end, 0)

    def _give_up(self, error: Exception) -> None:
        """Tell the driver and end, as ``workers.main`` does."""
        self._doing = "ending"
        self._pusher.push(ResultKind.ERROR, max(self.status.seq, 0), pack_record(describe_failure(error, self.status)))
        self._after(self._world.chance.uniform(0, 10e-3), self.end, 1)

    def _die(self, what: str, exit_code: int) -> None:
        self._world.fail_root(what, self.rank)
        self.end(exit_code)

    # time

    def _after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self._world.after(delay_s, self._when_running, action, args)

    def _when_running(self, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Do something unless the process has ended; where it is stopped, once it goes on."""
        goes_on_at = self._context.stopped_until
        if not self.is_alive or goes_on_at == math.inf:
            return
        if goes_on_at > self._world.now:
            self._world.at(goes_on_at, self._when_running, action, args)
        else:
            action(*args)

    def _guarded(self, action: Callable[[], None]) -> Callable[[], None]:
        return lambda: self._when_running(action, ())
