"""Prints what a trace costs: the same steps and the same generation with and without one, taking turns in one run. Asserts nothing.

Each side has its own ranks, which wait while the others' turns last, so that a busy machine slows all alike. Two of the three sides are
not traced: what they differ by is the noise of this run. A ratio is that of the lower quartiles of the turns, which say least of what else
the machine did. A step here does nothing but come and go, so that its ratio is the worst there is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import uvloop

import zspmd

STEP_BYTES = 512
Turn = Callable[[], Awaitable[None]]


class Acknowledger(zspmd.Worker):
    """Answers each step with nothing, as soon as it is there."""

    def step(self, inputs: Any) -> None:
        return None


async def time_turns(sides: Sequence[Turn], turns: int) -> list[list[float]]:
    """Return the seconds of each turn of each side, after one that does not count; who goes first changes."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(turns + 1):
        for side in (*range(number % len(sides), len(sides)), *range(number % len(sides))):
            begun = time.perf_counter()
            await sides[side]()
            if number:
                times[side].append(time.perf_counter() - begun)
    return times


async def bench_steps(path: str, ranks: int, turns: int, steps: int) -> dict[str, Any]:
    """Round trips of a step that is acknowledged at once."""
    payload = bytes(STEP_BYTES)

    def turn(group: zspmd.WorkerGroup) -> Turn:
        async def run() -> None:
            for _ in range(steps):
                await group.step(payload)

        return run

    def launch(trace: str | None) -> zspmd.WorkerGroup:
        return zspmd.launch(Acknowledger, world_size=ranks, output_ranks="all", preload=(), trace=trace)

    async with launch(path) as traced, launch(None) as plain, launch(None) as other:
        return outcome(f"step, {ranks} ranks, {STEP_BYTES} B", await time_turns(list(map(turn, (traced, plain, other))), turns), steps)


async def bench_generation(path: str, ranks: int, turns: int, tokens: int, batch: int) -> dict[str, Any]:
    """Decoding with the demo model."""
    params = zspmd.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    def turn(engine: zspmd.Engine) -> Turn:
        async def complete(number: int) -> None:
            async for _ in engine.generate([1 + number, 2, 3], params):
                pass

        async def run() -> None:
            await asyncio.gather(*map(complete, range(batch)))

        return run

    def build(trace: str | None) -> zspmd.Engine:
        config = zspmd.EngineConfig(num_blocks=512)
        return zspmd.Engine("demo", parallel=zspmd.ParallelConfig(tp=ranks), config=config, devices="cpu", trace=trace)

    async with build(path) as traced, build(None) as plain, build(None) as other:
        return outcome(f"generate, tp {ranks}, batch {batch}", await time_turns(list(map(turn, (traced, plain, other))), turns), tokens)


def outcome(case: str, times: list[list[float]], steps: int) -> dict[str, Any]:
    """Return what is printed of one case: a step's lower quartile, of each side, and the ratios."""
    traced, plain, other = (1e6 * statistics.quantiles(side, n=4)[0] / steps for side in times)
    figures = {"traced_us": traced, "plain_us": plain, "ratio": traced / plain, "noise": other / plain}
    return {"case": case, **{name: round(value, 3) for name, value in figures.items()}}


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the outcome of every case."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "trace.json")
        for ranks in arguments.ranks:
            rows.append(await bench_steps(path, ranks, arguments.turns, arguments.steps))
            rows += [await bench_generation(path, ranks, arguments.turns, arguments.tokens, batch) for batch in arguments.batch]
    return rows


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="prompts that are completed at once")
    parser.add_argument("--turns", type=int, default=100, metavar="N", help="of each side (100)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="in a turn (200)")
    parser.add_argument("--tokens", type=int, default=50, metavar="N", help="of each prompt in a turn (50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    rows = uvloop.run(run(arguments))
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        times = f"traced {row['traced_us']:9.1f} us  plain {row['plain_us']:9.1f} us"
        print(f"{row['case']:<28} {times}  {row['ratio']:.3f}x  (two that are not traced: {row['noise']:.3f}x)")


if __name__ == "__main__":
    main()
