"""Replicas that share experts, under requests at random: none is ever left alone in a collective, nothing leaks, every token is right.

The small pool of blocks has sequences preempted, and most of the load comes in bursts, so that replicas are idle now and then.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from support import late_model
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, build_engine, complete, complete_all
from support.leaks import LeakCheck
from support.replica_soak import ENDS, REQUEST_LIMIT_S, Kind, Look, Soak

import zspmd
from zspmd.runtime.engine.plan import ScheduledStep

BLOCK_SIZE = 4
NUM_BLOCKS = 28  # of each replica; the largest request takes 15
NUM_KINDS = 64  # different requests; each is sent many times
MAX_TOKENS = 20
MIB = 1 << 20
SHARED_TOKENS = 8  # at the beginning of every third prompt
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 12, "logprobs": 1},
    {"temperature": 0.8, "repetition_penalty": 1.2},
)
CONFIG: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "max_num_seqs": 8, "max_num_batched_tokens": 32}


def count_steps(soak: Soak, patch: pytest.MonkeyPatch) -> None:
    """Have the steps that are published counted, by how many replicas have work in them."""
    schedule = soak.engine._scheduler.schedule

    def counting() -> list[ScheduledStep]:
        steps = schedule()
        soak.num_steps[len(steps)] += bool(steps)
        return steps

    patch.setattr(soak.engine._scheduler, "schedule", counting)


def growth(before: list[Look], after: list[Look], what: str) -> list[int]:
    """Return by how much each process, the driver first, has grown from some looks to later ones, in the median."""
    medians = [[statistics.median(values) for values in zip(*(getattr(look, what) for look in looks))] for looks in (before, after)]
    return [int(later - earlier) for earlier, later in zip(*medians, strict=True)]


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


@pytest.mark.first
@pytest.mark.parametrize(
    ("duration_s", "rest_s", "max_growth_bytes"),  # of a process from the second third to the last
    [
        # its rests leave the processors to the tests beside it; kernels are still being made for shapes that are new
        pytest.param(60, 0.3, 48 * MIB, id="60 s", marks=pytest.mark.timeout(240)),
        pytest.param(1800, 0.0, 16 * MIB, id="30 min", marks=[pytest.mark.long, pytest.mark.timeout(2400)]),
    ],
)
async def test_replicas_that_share_experts_outlive_any_traffic(
    leak_check: LeakCheck,
    checkpoint: Path,
    kinds: list[Kind],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    duration_s: float,
    rest_s: float,
    max_growth_bytes: int,
) -> None:
    async with build_engine(checkpoint, dp=2, ep=2, **CONFIG) as engine:
        soak = Soak(engine, kinds, random.Random(duration_s))
        count_steps(soak, monkeypatch)
        await soak.run(duration_s, rest_s=rest_s)
        counted = engine.statistics()
        second, last = soak.between(1 / 3, 2 / 3), soak.between(2 / 3, 1)
        grown = growth(second, last, "memory")
        request.node.user_properties.append(("figures", f"replicas that share experts: {soak.describe()}; growth {grown} B"))
    assert min(soak.num_steps[count] for count in (1, 2)) > 20, soak.num_steps  # with an idle replica, and with none
    assert min(soak.ends[end] for end in set(ENDS)) > 3, soak.ends
    assert counted.num_preemptions > 0
    assert counted.num_prefix_hits > 0
    assert counted.num_restarts == 0
    assert max(grown) < max_growth_bytes, soak.describe()
    assert max(growth(second, last, "descriptors")) <= 0, soak.describe()
    assert max(growth(second, last, "shared")) <= 0, soak.describe()


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
