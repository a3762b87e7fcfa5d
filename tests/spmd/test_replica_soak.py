"""Replicas that share experts, under requests at random: none is ever left alone in a collective, nothing leaks, every token is right.

The small pool of blocks has sequences preempted, and most of the load comes in bursts, so that replicas are idle now and then.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import late_model
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, build_engine, complete, complete_all
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd
from zspmd.runtime.engine.plan import ScheduledStep

BLOCK_SIZE = 4
NUM_BLOCKS = 28  # of each replica; the largest request takes 15
NUM_KINDS = 64  # different requests; each is sent many times
MAX_TOKENS = 20
REQUEST_LIMIT_S = 60.0  # until a request is at its end, however many are before it
MAX_GROWTH_BYTES = 16 << 20  # of a rank's memory, between the second third and the last; in the first, kernels are made for each shape
SHARED_TOKENS = 8  # at the beginning of every third prompt
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 12, "logprobs": 1},
    {"temperature": 0.8, "repetition_penalty": 1.2},
)
ENDS = ("whole", "whole", "whole", "abort", "leave", "cancel")  # how a request ends: half of them early
CONFIG: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "max_num_seqs": 8, "max_num_batched_tokens": 32}


@dataclass(frozen=True)
class Kind:
    """A request, and the tokens that one process gives to it alone."""

    prompt: list[int]
    params: zspmd.SamplingParams
    tokens: list[int]


@dataclass
class Soak:
    """What has happened so far; its end is what the test looks at.

    Attributes:
        ends: how many requests ended in which way.
        num_steps: published steps by how many replicas had work in them.
        memory: of each look, the bytes that each rank holds.
    """

    engine: zspmd.Engine
    kinds: list[Kind]
    chance: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    num_steps: Counter[int] = field(default_factory=Counter)
    memory: list[list[int]] = field(default_factory=list)

    async def request(self) -> None:
        """Send one request of some kind, see to its end, and compare what came of it."""
        kind, end, after = self.chance.choice(self.kinds), self.chance.choice(ENDS), self.chance.randint(0, MAX_TOKENS)
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

    async def _consume(self, kind: Kind, name: str, tokens: list[int], leave_after: int | None) -> None:
        async with aclosing(self.engine.generate(kind.prompt, kind.params, request_id=name)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                tokens[:] = output.token_ids
                if leave_after is not None and len(tokens) >= leave_after:
                    return

    async def round(self) -> None:
        """One request alone, some after one another or a burst; then all is quiet, and the engine empty."""
        size, pause_s = self.chance.choice(((1, 0.0), (8, 0.01), (12, 0.0), (24, 0.002)))
        tasks = []
        for _ in range(size):
            tasks.append(asyncio.create_task(self.request()))
            await asyncio.sleep(self.chance.random() * pause_s)
        await asyncio.gather(*tasks)
        await wait_until(lambda: not self.engine.statistics().num_steps_in_flight)  # of requests that ended early
        assert_idle(self.engine)
        self.memory.append([rank.memory_bytes for rank in self.engine.group.health()])

    def growth_bytes(self) -> list[int]:
        """Return by how much each rank has grown from the second third of the looks to the last."""
        third = len(self.memory) // 3
        second, last = zip(*self.memory[third : 2 * third]), zip(*self.memory[-third:])
        return [int(statistics.median(after) - statistics.median(before)) for before, after in zip(second, last, strict=True)]


def count_steps(soak: Soak, patch: pytest.MonkeyPatch) -> None:
    """Have the steps that are published counted, by how many replicas have work in them."""
    schedule = soak.engine._scheduler.schedule

    def counting() -> list[ScheduledStep]:
        steps = schedule()
        soak.num_steps[len(steps)] += bool(steps)
        return steps

    patch.setattr(soak.engine._scheduler, "schedule", counting)


def make_requests() -> tuple[list[list[int]], list[zspmd.SamplingParams]]:
    chance = random.Random(23)
    prompts = [[chance.randrange(SIZES["vocab_size"]) for _ in range(chance.choice((1, 4, 13, 40)))] for _ in range(NUM_KINDS)]
    shared = prompts[-1][:1] * SHARED_TOKENS
    prompts = [prompt if number % 3 else shared + prompt[: 40 - SHARED_TOKENS] for number, prompt in enumerate(prompts)]
    params = [
        zspmd.SamplingParams(max_tokens=chance.randint(1, MAX_TOKENS), seed=number, ignore_eos=True, **WAYS[number % len(WAYS)])
        for number in range(NUM_KINDS)
    ]
    return prompts, params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    save_checkpoint(directory, "mixtral")
    return directory


@pytest.fixture(scope="module")
def kinds(checkpoint: Path) -> list[Kind]:
    """Each request by itself in one process."""

    async def run() -> list[Kind]:
        async with build_engine(checkpoint, block_size=BLOCK_SIZE, enable_prefix_cache=False) as engine:
            prompts, params = make_requests()
            outputs = [await complete(engine, prompt, one) for prompt, one in zip(prompts, params, strict=True)]
            return [Kind(prompt, one, output.token_ids) for prompt, one, output in zip(prompts, params, outputs, strict=True)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(20, id="20 s"),
        pytest.param(60, id="60 s", marks=pytest.mark.long),
        pytest.param(1800, id="30 min", marks=[pytest.mark.long, pytest.mark.timeout(2400)]),
    ],
)
async def test_replicas_that_share_experts_outlive_any_traffic(
    leak_check: LeakCheck, checkpoint: Path, kinds: list[Kind], monkeypatch: pytest.MonkeyPatch, duration_s: float
) -> None:
    async with build_engine(checkpoint, dp=2, ep=2, **CONFIG) as engine:
        soak = Soak(engine, kinds, random.Random(duration_s))
        count_steps(soak, monkeypatch)
        until = time.monotonic() + duration_s
        while time.monotonic() < until:
            await soak.round()
        counted = engine.statistics()
    assert min(soak.num_steps[count] for count in (1, 2)) > 20, soak.num_steps  # with an idle replica, and with none
    assert min(soak.ends[end] for end in set(ENDS)) > 3, soak.ends
    assert counted.num_preemptions > 0
    assert counted.num_prefix_hits > 0
    assert max(soak.growth_bytes()) < MAX_GROWTH_BYTES, soak.growth_bytes()


async def test_answers_of_a_replica_are_taken_in_their_order_whichever_replica_is_late(
    leak_check: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage has no experts here, so that its ranks never meet those of the other replica, and one replica can be far ahead."""
    save_checkpoint(tmp_path, "qwen3-moe", mlp_only_layers=[1])
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", late_model.WORKER)
    params = zspmd.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[number + 1] * 5 for number in range(3)]  # two with one replica, each in a step of its own, and one with the other
    async with build_engine(tmp_path, dp=2, pp=2, ep=2, enable_prefix_cache=False) as engine:
        together = await asyncio.wait_for(complete_all(engine, prompts, params), REQUEST_LIMIT_S)
        alone = [await asyncio.wait_for(complete(engine, prompt, params), REQUEST_LIMIT_S) for prompt in prompts]
        assert_idle(engine)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
