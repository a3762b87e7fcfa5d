"""What an engine on one node generates, to compare other ways of running it with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from support.engines import complete

import zspmd

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("123+456=", {"temperature": 0, "max_tokens": 40, "ignore_eos": True}),
    "seeded": ("zspmd is", {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}),
    "penalised": (
        "zspmd is",
        {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 11, "max_tokens": 40, "ignore_eos": True},
    ),
}


def generate_here(tp: int, requests: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, list[int]]:
    """Return the tokens of each request, on this machine alone."""

    async def run() -> dict[str, list[int]]:
        async with zspmd.Engine("demo", parallel=zspmd.ParallelConfig(tp=tp), devices="cpu", on_log=lambda *_: None) as engine:
            ends = await asyncio.gather(*(complete(engine, prompt, zspmd.SamplingParams(**params)) for prompt, params in requests.values()))
        return {name: list(end.outputs[0].token_ids) for name, end in zip(requests, ends)}

    return asyncio.run(run())
