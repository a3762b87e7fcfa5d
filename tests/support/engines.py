"""Engines over real worker processes, and many requests at once."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zspmd

PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"}
_process_starts: list[str] = []
_is_hooked = False


def build_engine(
    directory: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    devices: str | Sequence[str] = "cpu",
    launch_id: str | None = None,
    **config: Any,
) -> zspmd.Engine:
    """Return an engine, on CPUs whatever the machine has; ``config`` are fields of ``EngineConfig``."""
    return zspmd.Engine(
        directory,
        parallel=zspmd.ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep),
        config=zspmd.EngineConfig(**config),
        launch_id=launch_id,
        devices=devices,
        deadlines=zspmd.Deadlines(ready_s=100.0, step_s=60.0),
    )


def greedy(**fields: Any) -> zspmd.SamplingParams:
    """Return parameters for the likeliest tokens, 40 at most."""
    return zspmd.SamplingParams(**{"max_tokens": 40, "temperature": 0, **fields})


async def complete(
    engine: zspmd.Engine, prompt: Any, params: zspmd.SamplingParams | None = None, *, request_id: str | None = None
) -> zspmd.RequestOutput:
    """Return the last output of a request."""
    return (await collect(engine, prompt, params, request_id=request_id))[-1]


async def collect(
    engine: zspmd.Engine, prompt: Any, params: zspmd.SamplingParams | None = None, *, request_id: str | None = None
) -> list[zspmd.RequestOutput]:
    """Return every output of a request."""
    return [output async for output in engine.generate(prompt, params, request_id=request_id)]


async def complete_all(
    engine: zspmd.Engine, prompts: Sequence[Any], params: Sequence[zspmd.SamplingParams] | zspmd.SamplingParams
) -> list[zspmd.RequestOutput]:
    """Return the last outputs of requests that run together, in the order of ``prompts``."""
    each = [params] * len(prompts) if isinstance(params, zspmd.SamplingParams) else params
    return list(await asyncio.gather(*(complete(engine, prompt, one) for prompt, one in zip(prompts, each, strict=True))))


def assert_idle(engine: zspmd.Engine) -> None:
    """Check that an engine whose requests have ended holds no sequence, no step and no block."""
    engine.validate()
    statistics = engine.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_steps_in_flight) == (0, 0, 0)
    assert statistics.num_free_blocks == statistics.num_blocks


@contextlib.contextmanager
def process_starts() -> Iterator[list[str]]:
    """Give the list of processes that this one starts inside the block, one audit event each."""
    global _is_hooked
    if not _is_hooked:  # an audit hook stays for good, so there is one for all blocks
        sys.addaudithook(_on_audit_event)
        _is_hooked = True
    _process_starts.clear()
    yield _process_starts


def _on_audit_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event in PROCESS_EVENTS:
        _process_starts.append(f"{event}{arguments!r}")
