"""``zspmd.Engine``: requests in, text out, over a worker group.

    generate() -> RequestStream -> Scheduler -> step -> WorkerGroup -> ranks
                       ^--- Detokenizer <--- tokens <------'

The engine is a user of the worker group like any other. One task schedules, publishes and takes answers in; it keeps up to
``window`` steps in flight, so that ranks go from step to step without waiting for the driver. All that is known of a request is
here, so that the ranks can be replaced under it: ``recovery`` decides, ``ranks`` does it.

The file passes 350 lines because the class is what users see: its arguments and public docstrings are a third of it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...config import Deadlines, EngineConfig, NodesConfig, ParallelConfig, RestartPolicy, SamplingParams, TraceConfig
from ...errors import ClosedError, ConfigError, InternalError, LaunchError, RequestError, TransportError, WorkerError, ZspmdError
from ...expert_placement import check_movable, num_expert_ranks
from ...model_config import shares_experts
from ...transport.trace_spans import NO_TRACE, Trace
from ..driver.group import WorkerGroup
from ..driver.launching import Host, OnLog, OnProgress, launch
from ..driver.pending import PendingReply
from .alike_ranks import count_alike_ranks
from .checkpoint import open_checkpoint
from .evidence import is_from_inside
from .expert_balance import ExpertBalance, Rebalance
from .outputs import RequestOutput
from .pipeline_parts import most_in_flight
from .plan import ScheduledStep
from .prompts import Prompt, encode_prompt
from .ranks import EngineRanks
from .recovery import Recovery
from .replicas import Replicas
from .scheduler import Scheduler
from .speculation_meter import SpeculationMeter
from .start_times import Moment, StartTimes
from .statistics import SchedulerStatistics
from .step_values import StepAnswer, encode_steps
from .streams import Completion, RequestStream, build_stream
from .wakeup import Wakeup

if TYPE_CHECKING:
    from ..launch.dial.dial_place import DialPlace

_WINDOW_OF_REPLICAS = 256  # frames: by so many may one replica be ahead of another
WORKER = "zspmd.workers.model_worker:ModelWorker"


class Engine:
    """Serves a checkpoint with continuous batching; enter it with ``async with``.

    Args:
        model: a Hugging Face directory, or "demo" for the small model that ships with zspmd.
        parallel: how the model is spread; the engine uses tp, pp, dp and ep.
        config: slots, blocks, budgets and dtype.
        launch_id, devices, deadlines, log_dir, start_method, on_log, on_progress, record, trace, bind, hosts, nodes, launcher: as
            in ``zspmd.launch``. The trace goes on where workers are replaced.
        restart: replace workers that fail, and go on with every request where its stream stopped; None ends the engine with the fault.
            A node that is lost is left out from then on, so that hosts need slots to spare.
        on_restart: called with a line of text at each restart; None prints it to stderr.

    Raises:
        ConfigError: ``restart`` and ``record`` together.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        parallel: ParallelConfig | None = None,
        config: EngineConfig | None = None,
        launch_id: str | None = None,
        devices: str | Sequence[str] = "auto",
        deadlines: Deadlines | None = None,
        log_dir: str | None = None,
        start_method: str = "fork",
        on_log: OnLog | None = None,
        on_progress: OnProgress | None = None,
        record: str | Path | None = None,
        trace: str | Path | TraceConfig | None = None,
        bind: str | None = None,
        hosts: str | os.PathLike[str] | Sequence[str | Host] | None = None,
        nodes: NodesConfig | None = None,
        launcher: str | DialPlace = "agents",
        restart: RestartPolicy | None = None,
        on_restart: Callable[[str], None] | None = None,
    ) -> None:
        if restart is not None and launcher != "agents":
            raise ConfigError("restart is given, and processes that another launcher has started serve one launch: leave it out")
        if restart is not None and record is not None:
            raise ConfigError(f"record is {str(record)!r} and restart is given, but a recording holds one launch: leave one of them out")
        self.config = config or EngineConfig()
        self.parallel = parallel or ParallelConfig()
        tp, pp = self.parallel.tp, self.parallel.pp
        self._leaders = [(replica * pp + pp - 1) * tp for replica in range(self.parallel.dp)]  # the first rank of each last stage samples
        is_told = pp > 1 and self.config.speculation is not None
        self._window = most_in_flight(self.config.window, pp, is_told=is_told)
        self._model = model
        self._launch_options: dict[str, Any] = {
            "launch_id": launch_id,
            "devices": devices,
            "deadlines": deadlines,
            "log_dir": log_dir,
            "start_method": start_method,
            "on_log": on_log,
            "on_progress": self._on_progress,
            "record": record,
            "trace": trace,
            "bind": bind,
            "hosts": hosts,
            "nodes": nodes,
            "launcher": launcher,
        }
        self._tell_progress = on_progress
        self._times: StartTimes | None = None
        self._streams: dict[str, RequestStream] = {}
        self._completions: dict[str, tuple[RequestStream, Completion]] = {}
        self._in_flight: deque[tuple[list[ScheduledStep], PendingReply]] = deque()
        self._request_ids = itertools.count()
        self._wake = Wakeup()
        self._trace: Trace = NO_TRACE
        self._is_started = False
        self._restart_policy = restart
        self._say = on_restart or (lambda line: print(f"zspmd: {line}", file=sys.stderr))
        self._recovery: Recovery | None = None
        self._ranks: EngineRanks | None = None
        self._meter: SpeculationMeter | None = None
        self._experts: ExpertBalance | None = None
        self._task: asyncio.Task[None] | None = None
        self._fault: Exception | None = None

    async def __aenter__(self) -> Engine:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose(abort=error is not None)

    @property
    def group(self) -> WorkerGroup:
        """The worker group under the engine, after a restart another; raises ClosedError before ``start``."""
        if self._ranks is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")
        return self._ranks.group

    async def start(self) -> None:
        """Check the checkpoint, start the ranks, load the weights and size the KV pool; ``async with`` calls it.

        Raises:
            CheckpointError, TopologyError, ConfigError: before any process starts.
            WorkerError, LaunchError: as ``WorkerGroup.start``.
            ClosedError: the engine was started before.
        """
        if self._is_started or self._fault is not None:
            raise ClosedError("the engine was started before; make a new one")
        self._is_started = True
        self._times = times = StartTimes()
        times.mark("engine starts")
        self._checkpoint = open_checkpoint(self._model, self.parallel, self.config)
        times.mark("checkpoint and tokenizer read")
        group = launch(
            WORKER,
            parallel=self.parallel,
            worker_args={
                "model": str(self._checkpoint.directory),
                "dtype": self.config.dtype,
                "block_size": self.config.block_size,
                "max_num_seqs": self.config.max_num_seqs,
                "max_model_len": self._checkpoint.max_model_len,
                "pp_partition": None if self.config.pp_partition is None else list(self.config.pp_partition),
                "pack_weights": self.config.pack_weights,
                "speculation": None if self._checkpoint.speculation is None else self._checkpoint.speculation.to_plain(),
                "redundant_experts": self.config.redundant_experts,
                "expert_dispatch": self.config.expert_dispatch,
            },
            window=max(self._window, 2) if self.parallel.dp == 1 else _WINDOW_OF_REPLICAS,
            output_ranks=self._leaders,
            preload=("torch", WORKER.partition(":")[0], *self._checkpoint.preload),
            **self._launch_options,
        )
        self._trace = group.trace
        self._ranks = EngineRanks(group, self._wake.set, num_alike=count_alike_ranks(self._checkpoint, self.parallel))
        if (mixture := self._checkpoint.model.mixture) is not None:
            self._experts = ExpertBalance(self._ranks, mixture, self.config.redundant_experts, num_expert_ranks(self.parallel))
        num_blocks = await self._ranks.start(self.config, self._checkpoint.max_model_len)
        times.mark("KV pool made")
        await times.add_events(group.events())
        self._scheduler = self._build_schedulers(num_blocks)
        if self._checkpoint.speculation is not None:
            self._meter = SpeculationMeter(self._checkpoint.speculation.k, self.parallel.dp)
        if self._restart_policy is not None:
            self._recovery = Recovery(self._restart_policy, self._scheduler)
        self._task = asyncio.create_task(self._run(), name=f"zspmd-engine-{group.launch_id}")

    def _build_schedulers(self, num_blocks: int) -> Replicas:
        ages = itertools.count()
        schedulers = [
            Scheduler(
                self.config,
                num_blocks=num_blocks,
                max_model_len=self._checkpoint.max_model_len,
                eos_token_ids=self._checkpoint.model.eos_token_ids,
                num_stages=self.parallel.pp,
                replica=replica,
                ages=ages,
            )
            for replica in range(self.parallel.dp)
        ]
        return Replicas(schedulers, self._window, is_lockstep=shares_experts(self._checkpoint.model, self.parallel))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's growing output until it is finished; each ``RequestOutput`` holds everything so far.

        Leaving the loop, or cancelling the task, aborts the request and frees its blocks.

        Args:
            prompt: text, token ids, or chat messages (mappings with role and content).
            params: ``SamplingParams()`` if None.
            request_id: a name of its own, for outputs and errors; made up if None.

        Raises:
            RequestError: an empty prompt, one beyond ``max_model_len``, a name in use, or a request that ends its workers whenever it
                runs (``__cause__`` is their fault). The engine lives on.
            WorkerError, ClosedError: the engine is at its end.
        """
        stream = self._admit(prompt, params or SamplingParams(), request_id)
        try:
            while True:
                output = await stream.next_output()
                yield output
                if output.finished:
                    return
        finally:
            self._forget(stream)

    def abort(self, request_id: str) -> bool:
        """End a request with the finish reason "abort"; its iterator yields that and stops. False if it is not running."""
        stream = self._streams.get(request_id)
        if stream is None or stream.is_finished:
            return False
        for completion in stream.completions:
            if self._scheduler.abort(completion.sequence.sequence_id):
                completion.push([], "abort")  # brings out text that was held back
        stream.notify()
        self._wake.set()
        return True

    def statistics(self) -> SchedulerStatistics:
        """Return the scheduler's counters; ``engine.group.statistics()`` has the wire's. Raises ClosedError before ``start``."""
        self._check_started()
        statistics = self._scheduler.statistics()
        return statistics if self._meter is None else replace(statistics, speculation=self._meter.statistics())

    def start_times(self) -> tuple[Moment, ...]:
        """Return when what happened from the start of this process to the first token; what has not happened yet is not there."""
        return () if self._times is None else self._times.moments()

    def replica_statistics(self) -> list[SchedulerStatistics]:
        """Return the counters of each data-parallel replica, of which ``statistics`` has the sums; raises ClosedError before ``start``."""
        self._check_started()
        return self._scheduler.replica_statistics()

    async def rebalance_experts(self) -> Rebalance:
        """Move copies of experts so that the ranks have equal work, by what requests have asked of each expert since the last time.

        Requests go on meanwhile, and their tokens do not change: each rank loads what it lacks from the checkpoint, a layer at a time.

        Raises:
            ConfigError: the model has no experts, or one rank has all of them.
            WorkerRaisedError: a rank could not load an expert; that layer and those after it stay as they were.
            WorkerError, ClosedError: the ranks have failed, or the engine is at its end. New ranks begin with what had been moved.
        """
        self._check_started()
        check_movable(self._checkpoint.model.mixture, self.parallel)
        assert self._experts is not None, "it is there from the start where there are experts"
        return await self._experts.rebalance()

    def validate(self) -> None:
        """Check the scheduler's invariants; raises InternalError where one is broken, ClosedError before ``start``."""
        self._check_started()
        self._scheduler.validate()
        if self._recovery is not None:
            self._recovery.validate()

    async def aclose(self, *, abort: bool = False) -> None:
        """End requests that still run with ClosedError, and the ranks; may be called again."""
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
        finally:  # cancelled or not, no stream waits for ever and no rank stays
            self._fail(self._fault or ClosedError("the engine is closed; make a new one"))
            if self._ranks is not None:
                await self._ranks.aclose(abort=abort)

    # requests

    def _admit(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> RequestStream:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        self._check_started()
        made_up = (f"request-{number}" for number in self._request_ids)
        name = next(n for n in made_up if n not in self._streams) if request_id is None else request_id
        if name in self._streams:
            raise RequestError(f"request id {name!r} is in use; choose another", request_id=name)
        try:
            text, token_ids = encode_prompt(prompt, self._checkpoint)
        except RequestError as error:
            error.request_id = name
            raise
        if params.stop and self._checkpoint.tokenizer is None:
            raise RequestError("stop texts need a tokenizer.json in the checkpoint; use stop_token_ids", request_id=name)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        stream = build_stream(name, text, token_ids, params, seed, self._checkpoint.tokenizer)
        self._scheduler.add(*(completion.sequence for completion in stream.completions))
        self._streams[name] = stream
        self._completions.update((c.sequence.sequence_id, (stream, c)) for c in stream.completions)
        self._wake.set()
        return stream

    def _check_started(self) -> None:
        if self._task is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")

    def _forget(self, stream: RequestStream) -> None:
        if not stream.is_finished and self._fault is None:
            self.abort(stream.request_id)
        self._streams.pop(stream.request_id, None)
        for completion in stream.completions:
            self._completions.pop(completion.sequence.sequence_id, None)

    # steps

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._turn()
                except (WorkerError, TransportError) as error:
                    await self._recover(error)
        except ZspmdError as error:
            self._fail(error)
            if not isinstance(error, (WorkerError, TransportError, LaunchError)):
                raise
        except Exception as error:
            self._fail(InternalError(f"the engine's loop failed: {type(error).__name__}: {error}"))
            raise

    async def _turn(self) -> None:
        """Take in an answer if one is there, publish while there is room and work, then wait for an answer, a request or a fault."""
        in_flight = self._in_flight
        place = self._oldest_done()
        if place is not None:
            published, pending = in_flight[place]
            answers = await pending  # a fault finds the steps still there: they may be the ones that ended the ranks
            del in_flight[place]
            with self._trace.span("apply"):
                for step, answer in zip(published, answers, strict=True):
                    self._take_in(step, StepAnswer.read(answer))
        while steps := self._schedule():
            await self._publish(steps)
        if in_flight:
            if self._oldest_done() is not None:
                return
        elif self._scheduler.has_work():
            raise InternalError(f"nothing can be scheduled although there is work: {self._scheduler.statistics()}")
        if self.group.fault is not None:
            raise self.group.fault
        await self._wake.wait()

    def _oldest_done(self) -> int | None:
        """Return the place of steps in flight whose answers are there, and before which none of their replicas has others in flight."""
        is_behind: set[int] = set()  # replicas with older steps that are not done: where several compute in lockstep, one may be late
        for place, (steps, pending) in enumerate(self._in_flight):
            replicas = [step.replica for step in steps]
            if pending.is_done and is_behind.isdisjoint(replicas):
                return place
            is_behind.update(replicas)
        return None

    def _schedule(self) -> list[ScheduledStep]:
        if self._recovery is not None:
            self._recovery.advance(is_drained=not self._in_flight)
        with self._trace.span("schedule"):
            return self._scheduler.schedule()

    async def _publish(self, steps: list[ScheduledStep]) -> None:
        assert self._ranks is not None, "the loop runs only once it is started"
        if self._meter is not None:
            for step in steps:
                self._meter.published(step)
        leaders = [self._leaders[step.replica] for step in steps]
        pending = await self._ranks.submit(encode_steps(steps, len(self._leaders)), leaders, (pending for _, pending in self._in_flight))
        pending.add_done_callback(self._wake.set)
        self._in_flight.append((steps, pending))

    def _on_progress(self, rank: int, done: int, total: int, what: str) -> None:
        if self._times is not None:
            self._times.progressed(rank, done, total, what)
        if self._tell_progress is not None:
            self._tell_progress(rank, done, total, what)

    def _take_in(self, step: ScheduledStep, answer: StepAnswer) -> None:
        if self._recovery is not None:
            self._recovery.progressed()
        if self._times is not None and not self._times.is_whole and step.sampled:
            self._times.first_token()
        verified, counts, num_drafts = answer.verified, None, None
        if self._meter is not None and verified is not None:
            self._meter.answered(step, verified)
            if verified.counts is not None and verified.num_drafts is not None:
                counts, num_drafts = verified.counts.tolist(), verified.num_drafts.tolist()
        logprobs = answer.logprobs_of(step)
        for sequence, token_ids, finish_reason in self._scheduler.apply(step, answer.token_ids, counts, num_drafts):
            found = self._completions.get(sequence.sequence_id)
            if found is None:
                continue  # nobody listens any more; the sequence was aborted as its consumer left
            stream, completion = found
            if logprobs:
                completion.logprobs += logprobs[id(sequence)][: len(token_ids)]
            stop = completion.push(token_ids, finish_reason)
            if stop is not None and not self._scheduler.finish(sequence.sequence_id, "stop", stop):
                sequence.finish_reason, sequence.stop_reason = "stop", stop  # a token that came with it ended the sequence as well
            stream.notify()

    # faults

    async def _recover(self, error: ZspmdError) -> None:
        """Replace the ranks, and have every unfinished request go on; raises the fault where it may not be outlived."""
        if self._recovery is None or self._ranks is None or isinstance(error, ClosedError):
            raise error
        is_inside = is_from_inside(error, self._ranks.group)
        steps = [step for published, _ in self._in_flight for step in published]
        self._in_flight.clear()
        while True:
            ruling = self._recovery.faulted(error, steps, is_from_inside=is_inside, now=time.monotonic())
            if ruling.poison is not None:
                self._fail_request(ruling.poison, error)
            num_requests = sum(not stream.is_finished for stream in self._streams.values())
            self._say(ruling.describe(error, self._recovery.budget.policy, num_requests=num_requests))
            if not ruling.may_restart:
                raise error
            try:
                await self._ranks.replace()
                self._recovery.restarted()
                if self._meter is not None:
                    self._meter.restarted()
                return
            except (WorkerError, TransportError, LaunchError) as again:
                error, steps = again, []

    def _fail_request(self, request_id: str, fault: ZspmdError) -> None:
        """End a request that ends its workers."""
        error = RequestError(f"request {request_id} ended its workers twice while it ran alone: {fault}", request_id=request_id)
        error.__cause__ = fault
        stream = self._streams[request_id]
        stream.fail(error)
        for completion in stream.completions:
            self._scheduler.abort(completion.sequence.sequence_id)

    def _fail(self, error: Exception) -> None:
        if self._fault is None:
            self._fault = error
        for stream in list(self._streams.values()):
            stream.fail(self._fault)
