"""Requests at random to replicas that share experts, and what the processes hold meanwhile.

A soak is made of rounds: one request alone, which leaves a replica idle, some after one another, or a burst; then all is quiet. Half of
the requests end early, in one of three ways. Whatever was sent beside it, each has the tokens that it has alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

from support.engines import assert_idle
from support.holdings import SHARED_MEMORY
from support.memory import resident_bytes
from support.polling import wait_until

import zspmd

REQUEST_LIMIT_S = 60.0  # until a request is at its end, however many are before it
ENDS = ("whole", "whole", "whole", "abort", "leave", "cancel")  # how a request ends: half of them early
ROUNDS = ((1, 0.0), (8, 0.01), (12, 0.0), (24, 0.002))  # requests, and the longest pause between two of them in seconds
LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Kind:
    """A request, and the tokens that one process gives to it alone."""

    prompt: list[int]
    params: zspmd.SamplingParams
    tokens: list[int]


@dataclass(frozen=True)
class Look:
    """What the processes of a launch hold while no request runs, the driver first and then each rank.

    Attributes:
        at_s: seconds since the soak began.
        memory: resident bytes.
        descriptors: how many are open.
        shared: how many pieces of shared memory are mapped.
    """

    at_s: float
    memory: list[int]
    descriptors: list[int]
    shared: list[int]

    @classmethod
    def now(cls, engine: zspmd.Engine, at_s: float) -> Look:
        """Look at this process, which is the driver, and at the ranks."""
        pids = [os.getpid(), *(rank.pid for rank in engine.group.health() if rank.pid is not None)]
        return cls(
            at_s, [resident_bytes(pid) for pid in pids], [_count_descriptors(pid) for pid in pids], [_count_shared(pid) for pid in pids]
        )

    def __str__(self) -> str:
        memory = "+".join(f"{size / 1e6:.1f}" for size in self.memory)
        descriptors, shared = ("+".join(map(str, counts)) for counts in (self.descriptors, self.shared))
        return f"{memory} MB, {descriptors} descriptors, {shared} pieces of shared memory after {self.at_s:.0f} s"


@dataclass
class Soak:
    """What has happened so far; its end is what a test looks at.

    Attributes:
        engine, kinds, chance: where the requests go, which there are, and what chooses among them.
        ends: how many requests ended in which way.
        num_tokens: that reached whoever had asked for them.
        num_steps: published steps by how many replicas had work in them.
        looks: one a second at most, each between two rounds.
    """

    engine: zspmd.Engine
    kinds: list[Kind]
    chance: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_steps: Counter[int] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)

    async def run(self, duration_s: float, *, rest_s: float) -> None:
        """Run rounds until the time is over, with a rest of 0 to ``2 * rest_s`` seconds after each."""
        started = time.monotonic()
        while (at_s := time.monotonic() - started) < duration_s:
            if not self.looks or at_s >= self.looks[-1].at_s + LOOK_EVERY_S:
                self.looks.append(Look.now(self.engine, at_s))
            await self.round()
            await asyncio.sleep(self.chance.uniform(0, 2 * rest_s))
        self.looks.append(Look.now(self.engine, time.monotonic() - started))

    async def round(self) -> None:
        """One request alone, some after one another or a burst; then all is quiet, and the engine empty."""
        size, pause_s = self.chance.choice(ROUNDS)
        tasks = []
        for _ in range(size):
            tasks.append(asyncio.create_task(self.request()))
            await asyncio.sleep(self.chance.random() * pause_s)
        await asyncio.gather(*tasks)
        await wait_until(lambda: not self.engine.statistics().num_steps_in_flight)  # of requests that ended early
        assert_idle(self.engine)

    async def request(self) -> None:
        """Send one request of some kind, see to its end, and compare what came of it."""
        kind, end, after = self.chance.choice(self.kinds), self.chance.choice(ENDS), self.chance.randint(0, 20)
        name, tokens = f"request {self.chance.getrandbits(64)}", list[int]()
        consumer = asyncio.create_task(self._consume(kind, name, tokens, after if end == "leave" else None))
        if end in ("abort", "cancel"):
            await asyncio.sleep(after * 0.002)
            if end == "abort":
                self.engine.abort(name)
            else:
                consumer.cancel()
        (result,) = await asyncio.wait_for(asyncio.gather(consumer, return_exceptions=True), REQUEST_LIMIT_S)
        if isinstance(result, BaseException) and not (end == "cancel" and isinstance(result, asyncio.CancelledError)):
            raise result
        assert tokens == kind.tokens[: len(tokens)], f"{end}: {tokens} of {kind}"
        assert end != "whole" or len(tokens) == len(kind.tokens)
        self.ends["whole" if len(tokens) == len(kind.tokens) else end] += 1
        self.num_tokens += len(tokens)

    async def _consume(self, kind: Kind, name: str, tokens: list[int], leave_after: int | None) -> None:
        async with aclosing(self.engine.generate(kind.prompt, kind.params, request_id=name)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                tokens[:] = output.token_ids
                if leave_after is not None and len(tokens) >= leave_after:
                    return

    def between(self, start: float, end: float) -> list[Look]:
        """Return the looks from one share of the time that has passed to another, such as the last third."""
        whole_s = self.looks[-1].at_s
        return [look for look in self.looks if start * whole_s <= look.at_s <= end * whole_s]

    def describe(self) -> str:
        """Return the figures in one line: what was done, and what was held at a sixth of the time and at its end."""
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items(), key=lambda item: -item[1]))
        counted = self.engine.statistics()
        done = f"{self.ends.total()} requests ({ends}), {self.num_tokens} tokens, {counted.num_preemptions} preemptions"
        sixth = self.between(1 / 6, 1)[0]
        return f"{done}, {counted.num_restarts} restarts; {sixth}; {self.looks[-1]}"


def _count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _count_shared(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as file:
        return sum("/memfd:" in line or f"{SHARED_MEMORY}/" in line for line in file)
