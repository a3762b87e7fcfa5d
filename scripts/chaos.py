"""Kills random workers under an engine that serves, says what it does, and compares what came with an undisturbed run.

Exit code 0 if every request finished with the same tokens, text and reason, and no stream ever shrank; 130 after Ctrl-C; else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import zspmd

MAX_TOKENS = 480  # the demo model has 512 positions
MAX_KILLS = 999  # each costs a restart, of which a policy allows 1,000
MAX_S = 86_400.0
PROMPTS = ("zspmd is", "123+456=", "A worker", "The driver", "Every rank", "A step", "640+360=", "7+85=")
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
)


@dataclass
class Stream:
    """What one request has shown, and how often it took something back."""

    output: zspmd.RequestOutput | None = None
    num_shrunk: int = 0


class Clock:
    """Prints lines with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", flush=True)


def build_engine(clock: Clock, arguments: argparse.Namespace) -> zspmd.Engine:
    num_kills = int(arguments.duration_s / arguments.period_s) + 1
    return zspmd.Engine(
        "demo",
        parallel=zspmd.ParallelConfig(tp=2),
        config=zspmd.EngineConfig(max_num_seqs=arguments.max_num_seqs),
        devices="cpu",
        restart=zspmd.RestartPolicy(max_restarts=num_kills, window_s=2 * arguments.duration_s),
        on_log=lambda rank, stream, line: None,
        on_restart=clock.say,
    )


def sampling_params(number: int) -> zspmd.SamplingParams:
    return zspmd.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=number, **WAYS[number % len(WAYS)])


async def follow(engine: zspmd.Engine, number: int, stream: Stream) -> None:
    """Read one request to its end, and note where an output is not the last one with more behind it."""
    prompt = PROMPTS[number % len(PROMPTS)]
    async for output in engine.generate(prompt, sampling_params(number), request_id=f"chaos-{number}"):
        before = stream.output
        if before is not None:
            kept = output.token_ids[: len(before.token_ids)] == before.token_ids and output.text.startswith(before.text)
            stream.num_shrunk += not kept
        stream.output = output


async def serve(engine: zspmd.Engine, streams: Sequence[Stream]) -> None:
    await asyncio.gather(*(follow(engine, number, stream) for number, stream in enumerate(streams)))


async def kill_workers(engine: zspmd.Engine, clock: Clock, arguments: argparse.Namespace, streams: Sequence[Stream]) -> None:
    """SIGKILL a random worker every ``period_s``, wherever the engine is: in a step, or in the start of its new workers."""
    chance = random.Random(arguments.seed)
    for turn in range(int(arguments.duration_s / arguments.period_s)):
        await asyncio.sleep(arguments.period_s if turn else min(1.0, arguments.period_s))
        num_tokens = sum(len(stream.output.token_ids) for stream in streams if stream.output is not None)
        pids = worker_pids(engine)
        if not pids:
            clock.say(f"after {num_tokens:,} tokens: no worker to kill, the next ones are on their way")
            continue
        rank = chance.choice(sorted(pids))
        clock.say(f"after {num_tokens:,} tokens: SIGKILL to rank {rank} (pid {pids[rank]})")
        with contextlib.suppress(ProcessLookupError):  # it has just ended with a peer that was killed
            os.kill(pids[rank], signal.SIGKILL)


def worker_pids(engine: zspmd.Engine) -> dict[int, int]:
    """Return the workers that there are, by rank."""
    try:
        return {rank.rank: rank.pid for rank in engine.group.health() if rank.pid is not None}
    except zspmd.ClosedError:  # between two groups
        return {}


async def run(clock: Clock, arguments: argparse.Namespace, *, with_kills: bool) -> list[Stream]:
    streams = [Stream() for _ in range(arguments.num_requests)]
    async with build_engine(clock, arguments) as engine:
        tasks = [asyncio.create_task(serve(engine, streams))]
        if with_kills:
            tasks.append(asyncio.create_task(kill_workers(engine, clock, arguments, streams)))
        try:
            await wait_all(clock, *tasks)
        finally:  # also after Ctrl-C: the engine ends its streams when it is closed, and they would be told of that
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        statistics = engine.statistics()
        clock.say(f"all have ended: {statistics.num_generated_tokens:,} tokens, {statistics.num_restarts} restarts")
    return streams


async def wait_all(clock: Clock, serving: asyncio.Task[None], killing: asyncio.Task[None] | None = None) -> None:
    """Wait for every stream and, while there are some, for every kill."""
    if killing is not None:
        await asyncio.wait([serving, killing], return_when=asyncio.FIRST_COMPLETED)
        if killing.done():
            await killing
        else:
            clock.say("all requests have ended before the last kill; raise --num-requests")
            killing.cancel()
    try:
        await serving
    except zspmd.ZspmdError as error:
        clock.say(f"a stream raised {type(error).__name__}: {error}")


@dataclass
class Comparison:
    """What distinguishes a disturbed run from an undisturbed one; ``num_repeated`` counts every token that should not be there."""

    num_finished: int = 0
    num_lost: int = 0
    num_repeated: int = 0
    num_shrunk: int = 0
    num_other: int = 0

    @property
    def is_clean(self) -> bool:
        return not (self.num_lost or self.num_repeated or self.num_shrunk or self.num_other)


def compare(wanted: Sequence[Stream], got: Sequence[Stream]) -> Comparison:
    comparison = Comparison()
    for one, other in zip(wanted, got):
        assert one.output is not None, "the undisturbed run did not finish"
        comparison.num_shrunk += other.num_shrunk
        tokens = [] if other.output is None else other.output.token_ids
        num_equal = next((i for i, (a, b) in enumerate(zip_longest(one.output.token_ids, tokens)) if a != b), len(tokens))
        comparison.num_lost += len(one.output.token_ids) - num_equal
        comparison.num_repeated += len(tokens) - num_equal
        if other.output is not None and other.output.finished:
            comparison.num_finished += 1
            comparison.num_other += (one.output.text, one.output.finish_reason) != (other.output.text, other.output.finish_reason)
    return comparison


async def main(arguments: argparse.Namespace) -> int:
    clock = Clock()
    clock.say(f"{arguments.num_requests} requests on two ranks, undisturbed")
    wanted = await run(clock, arguments, with_kills=False)
    clock.say(f"the same again, with a kill every {arguments.period_s:g} s for {arguments.duration_s:g} s (seed {arguments.seed})")
    comparison = compare(wanted, await run(clock, arguments, with_kills=True))
    if comparison.num_shrunk or comparison.num_other:
        print(f"{comparison.num_shrunk} outputs took something back, {comparison.num_other} texts or reasons differ")
    counts = f"{comparison.num_finished} of {arguments.num_requests} finished"
    print(f"{counts}, {comparison.num_lost} tokens lost, {comparison.num_repeated} repeated")
    return 0 if comparison.is_clean and comparison.num_finished == arguments.num_requests else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=count, default=64, metavar="N", help="requests of 480 tokens each (64)")
    parser.add_argument("--max-num-seqs", type=count, default=8, metavar="N", help="requests that run at once (8)")
    parser.add_argument("--period-s", type=seconds, default=3.0, metavar="S", help="seconds between kills (3)")
    parser.add_argument("--duration-s", type=seconds, default=30.0, metavar="S", help="seconds of kills (30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of victims (0)")
    arguments = parser.parse_args()
    if arguments.duration_s / arguments.period_s > MAX_KILLS:
        parser.error(
            f"a kill every {arguments.period_s:g} s for {arguments.duration_s:g} s is more than {MAX_KILLS}, the most that are outlived"
        )
    return arguments


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= MAX_S:
        raise argparse.ArgumentTypeError(f"{number:g} is not above 0 and at most {MAX_S:g}")
    return number


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(parse_arguments())))
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(128 + signal.SIGINT)
