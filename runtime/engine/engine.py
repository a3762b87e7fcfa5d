"""``zspmd.Engine``: requests in, text out, over a worker group.

    generate() -> RequestStream -> Scheduler -> step -> WorkerGroup -> ranks
                       ^--- Detokenizer <--- tokens <------'

The engine is a user of the worker group like any other. One task schedules, publishes and takes answers in; it keeps up to
``window`` steps in flight, so that ranks go from step to step without waiting for the driver.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...config import Deadlines, EngineConfig, ParallelConfig, SamplingParams
from ...errors import ClosedError, InternalError, RequestError, TransportError, WorkerError, ZspmdError
from ...transport.batch import encode_batch_step
from ..driver.group import WorkerGroup
from ..driver.launching import OnLog, OnProgress, launch
from ..driver.pending import PendingReply
from .checkpoint import choose_num_blocks, open_checkpoint
from .outputs import RequestOutput, TokenLogprob
from .plan import ScheduledStep
from .scheduler import Scheduler
from .statistics import SchedulerStatistics
from .streams import Completion, RequestStream, build_stream

WORKER = "zspmd.workers.model_worker:ModelWorker"
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Engine:
    """Serves a checkpoint with continuous batching; enter it with ``async with``.

    Args:
        model: a Hugging Face directory, or "demo" for the small model that ships with zspmd.
        parallel: how the model is spread; the engine uses tp.
        config: slots, blocks, budgets and dtype.
        launch_id, devices, deadlines, log_dir, start_method, on_log, on_progress: as in ``zspmd.launch``.
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
    ) -> None:
        self.config = config or EngineConfig()
        self.parallel = parallel or ParallelConfig()
        self._model = model
        self._launch_options: dict[str, Any] = {
            "launch_id": launch_id,
            "devices": devices,
            "deadlines": deadlines,
            "log_dir": log_dir,
            "start_method": start_method,
            "on_log": on_log,
            "on_progress": on_progress,
        }
        self._streams: dict[str, RequestStream] = {}
        self._completions: dict[str, tuple[RequestStream, Completion]] = {}
        self._in_flight: deque[tuple[ScheduledStep, PendingReply]] = deque()
        self._request_ids = itertools.count()
        self._wake = asyncio.Event()
        self._is_started = False
        self._group: WorkerGroup | None = None
        self._task: asyncio.Task[None] | None = None
        self._fault: Exception | None = None

    async def __aenter__(self) -> Engine:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose(abort=error is not None)

    @property
    def group(self) -> WorkerGroup:
        """The worker group under the engine; raises ClosedError before ``start``."""
        if self._group is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")
        return self._group

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
        self._checkpoint = open_checkpoint(self._model, self.parallel, self.config)
        group = launch(
            WORKER,
            parallel=self.parallel,
            worker_args={
                "model": str(self._checkpoint.directory),
                "dtype": self.config.dtype,
                "block_size": self.config.block_size,
                "max_num_seqs": self.config.max_num_seqs,
                "max_model_len": self._checkpoint.max_model_len,
            },
            window=max(self.config.window, 2),
            preload=("torch", WORKER.partition(":")[0]),
            **self._launch_options,
        )
        await group.start()
        self._group = group
        try:
            capacities = await group.call("kv_capacity")
            num_blocks = choose_num_blocks(capacities, group.config.devices, self._checkpoint.max_model_len, self.config)
            self._scheduler = Scheduler(
                self.config,
                num_blocks=num_blocks,
                max_model_len=self._checkpoint.max_model_len,
                eos_token_ids=self._checkpoint.model.eos_token_ids,
            )
            await group.call("allocate_kv_cache", num_blocks)
        except BaseException:
            await group.aclose(abort=True)
            raise
        self._task = asyncio.create_task(self._run(), name=f"zspmd-engine-{group.launch_id}")

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
            RequestError: an empty prompt, one beyond ``max_model_len``, or a name in use. The engine lives on.
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
                completion.push([], "abort", [])  # brings out text that was held back
        stream.notify()
        self._wake.set()
        return True

    def statistics(self) -> SchedulerStatistics:
        """Return the scheduler's counters; ``engine.group.statistics()`` has the wire's. Raises ClosedError before ``start``."""
        if self._group is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")
        return self._scheduler.statistics()

    def validate(self) -> None:
        """Check the scheduler's invariants; raises InternalError where one is broken, ClosedError before ``start``."""
        if self._group is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")
        self._scheduler.validate()

    async def aclose(self, *, abort: bool = False) -> None:
        """End requests that still run with ClosedError, and the ranks; may be called again."""
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
        finally:  # cancelled or not, no stream waits for ever and no rank stays
            self._fail(self._fault or ClosedError("the engine is closed; make a new one"))
            if self._group is not None:
                await self._group.aclose(abort=abort)

    # requests

    def _admit(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> RequestStream:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if self._task is None:
            raise ClosedError("the engine has not been started; enter it with 'async with'")
        made_up = (f"request-{number}" for number in self._request_ids)
        name = next(n for n in made_up if n not in self._streams) if request_id is None else request_id
        if name in self._streams:
            raise RequestError(f"request id {name!r} is in use; choose another", request_id=name)
        try:
            text, token_ids = self._encode(prompt)
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

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the prompt's text, if it has one, and its tokens."""
        tokenizer, text = self._checkpoint.tokenizer, None
        if not isinstance(prompt, str) and not _is_chat(prompt):
            token_ids = _whole_numbers(prompt)
        elif tokenizer is None:
            raise RequestError(f"{self._checkpoint.directory} has no tokenizer.json; give the prompt as token ids")
        elif isinstance(prompt, str):
            text, token_ids = prompt, tokenizer.encode(prompt)
        else:
            text = tokenizer.render_chat(prompt)  # type: ignore[arg-type]  # mappings by the check above, or it says no
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token of text")
        limit = self._checkpoint.model.vocab_size
        if (highest := max(token_ids)) >= limit or min(token_ids) < 0:
            worst = highest if highest >= limit else min(token_ids)
            raise RequestError(f"token id {worst} of the prompt is outside the vocabulary: give ids from 0 to {limit - 1}")
        return text, token_ids

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
                await self._turn()
        except ZspmdError as error:
            self._fail(error)
            if not isinstance(error, (WorkerError, TransportError)):
                raise
        except Exception as error:
            self._fail(InternalError(f"the engine's loop failed: {type(error).__name__}: {error}"))
            raise

    async def _turn(self) -> None:
        """Publish a step if there is room and work, else take in the oldest answer, else wait for an answer or a request."""
        step = self._scheduler.schedule() if len(self._in_flight) < self.config.window else None
        if step is not None:
            pending = await self.group.submit(encode_batch_step(step.batch))
            pending.add_done_callback(self._wake.set)
            self._in_flight.append((step, pending))
        elif self._in_flight and self._in_flight[0][1].is_done:
            published, pending = self._in_flight.popleft()
            (answer,) = await pending
            self._take_in(published, answer)
        elif not self._in_flight and self._scheduler.has_work():
            raise InternalError(f"nothing can be scheduled although there is work: {self._scheduler.statistics()}")
        else:
            self._wake.clear()
            await self._wake.wait()

    def _take_in(self, step: ScheduledStep, answer: list[Any]) -> None:
        tokens, logprobs = answer
        rows = {} if logprobs is None else {id(sequence): logprobs[row] for row, sequence in enumerate(step.sampled)}
        for sequence, token_ids, finish_reason in self._scheduler.apply(step, tokens):
            found = self._completions.get(sequence.sequence_id)
            if found is None:
                continue  # nobody listens any more; the sequence was aborted as its consumer left
            stream, completion = found
            reported = [_logprob(token, row) for token in token_ids if (row := rows.get(id(sequence))) is not None]
            stop = completion.push(token_ids, finish_reason, reported)
            if stop is not None and not self._scheduler.finish(sequence.sequence_id, "stop", stop):
                sequence.finish_reason, sequence.stop_reason = "stop", stop  # its last token completed the stop text as well
            stream.notify()

    def _fail(self, error: Exception) -> None:
        if self._fault is None:
            self._fault = error
        for stream in list(self._streams.values()):
            stream.fail(self._fault)


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _whole_numbers(prompt: Any) -> list[int]:
    """Return token ids as int, from any iterable of whole numbers; ``int()`` would cut floats down without a word."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise RequestError(f"the prompt is a {type(prompt).__name__}; decode it to text, or give a list of token ids")
    try:
        if any(isinstance(token, bool) for token in prompt):
            raise TypeError("it holds a bool")
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(f"the prompt is no text, list of token ids or list of chat messages: {error}") from error


def _logprob(token_id: int, row: list[Any]) -> TokenLogprob:
    logprob, top = row
    return TokenLogprob(token_id, logprob, dict(top))
