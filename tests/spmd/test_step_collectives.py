"""The first law: after the start no rank asks another for anything but tensors, whose number and shapes follow from the step alone."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import counted_model
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, build_engine, complete
from support.leaks import LeakCheck
from support.polling import wait_until
from support.step_collectives import ModelSizes, ReplicaPart, TokensOnTheWay, needs_whole, predict_collectives

import zspmd
from zspmd.runtime.engine.plan import ScheduledStep

BLOCK_SIZE = 4
NUM_BLOCKS = 48  # room for three of the longest requests
MAX_STEP_TOKENS = 24
LONG_PROMPT = 40  # is cut
LIMIT_S = 60.0
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "top_p": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.3},
)
LAYOUTS = [
    pytest.param("llama", (2, 1, 1, 1), "auto", id="tp 2"),
    pytest.param("llama", (1, 2, 1, 1), "auto", id="pp 2"),
    pytest.param("mixtral", (1, 1, 2, 2), "auto", id="dp 2 x ep 2"),
    pytest.param("mixtral", (1, 1, 2, 2), "all_to_all", id="dp 2 x ep 2, all-to-all"),
    pytest.param("llama", (2, 2, 1, 1), "auto", id="tp 2 x pp 2"),
    pytest.param("dots1", (2, 1, 2, 4), "auto", id="tp 2 x dp 2 x ep 4", marks=pytest.mark.long),
    pytest.param("dots1", (1, 2, 2, 2), "auto", id="pp 2 x dp 2 x ep 2", marks=pytest.mark.long),
    pytest.param("dots1", (2, 1, 2, 4), "all_to_all", id="tp 2 x dp 2 x ep 4, all-to-all", marks=pytest.mark.long),
    pytest.param("llama", (1, 1, 2, 1), "auto", id="dp 2", marks=pytest.mark.long),
    pytest.param("mixtral", (1, 1, 4, 2), "auto", id="dp 4 x ep 2", marks=pytest.mark.long),
    pytest.param("mixtral", (1, 1, 4, 2), "all_to_all", id="dp 4 x ep 2, all-to-all", marks=pytest.mark.long),
]


@dataclass
class Published:
    """What the driver published, noted where it decides: of each step the parts of the replicas, and whether somebody was cut short."""

    num_replicas: int
    num_stages: int
    parts: list[list[ReplicaPart]] = field(default_factory=list)
    num_cut_prompts: int = 0

    def __post_init__(self) -> None:
        self._on_the_way = [TokensOnTheWay(self.num_stages) for _ in range(self.num_replicas)]

    def add(self, steps: list[ScheduledStep]) -> None:
        if not steps:
            return
        parts = [ReplicaPart()] * self.num_replicas
        for step in steps:
            num_whole = sum(needs_whole(sequence.params) for sequence in step.sampled)
            taken = self._on_the_way[step.replica].take(step) if self.num_stages > 1 else ()
            is_handed_on = self.num_stages > 1 and bool(step.sampled)
            num_by_shard = len(step.sampled) - num_whole
            parts[step.replica] = ReplicaPart(step.num_tokens, num_by_shard, num_whole, taken=taken, is_handed_on=is_handed_on)
            self.num_cut_prompts += len(step.unsampled)
        self.parts.append(parts)


def watch_published(engine: zspmd.Engine, patch: pytest.MonkeyPatch) -> Published:
    """Have each step that an engine decides on noted."""
    schedule, published = engine._scheduler.schedule, Published(engine.parallel.dp, engine.parallel.pp)

    def noting() -> list[ScheduledStep]:
        steps = schedule()
        published.add(steps)
        return steps

    patch.setattr(engine._scheduler, "schedule", noting)
    return published


async def request(engine: zspmd.Engine, chance: random.Random, way: dict[str, Any]) -> None:
    """Send one request; a third is left early or aborted."""
    prompt = [chance.randrange(SIZES["vocab_size"]) for _ in range(chance.choice((1, 3, 9, 18, LONG_PROMPT)))]
    count, end, after = chance.randint(8, 24), chance.choice(("", "", "", "", "leave", "abort")), chance.randint(1, 8)
    params = zspmd.SamplingParams(max_tokens=count, seed=chance.randrange(1 << 30), ignore_eos=True, **way)
    name = f"request {chance.random()}"
    async with aclosing(engine.generate(prompt, params, request_id=name)) as outputs:  # type: ignore[type-var]  # it is a generator
        async for output in outputs:
            if len(output.token_ids) >= after and end == "leave":
                return
            if len(output.token_ids) >= after and end == "abort":
                engine.abort(name)


async def run_workload(engine: zspmd.Engine, chance: random.Random) -> None:
    """Requests alone, which leave other replicas idle, then many at a time, which take all slots and blocks, then a few again."""
    await complete(engine, [7] * LONG_PROMPT, zspmd.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    for size in (12, 1, 12, 6):
        tasks = []
        for number in range(size):
            tasks.append(asyncio.create_task(request(engine, chance, WAYS[number % len(WAYS)])))
            await asyncio.sleep(chance.random() * 0.004)  # joins whatever step is running by then
        await asyncio.gather(*tasks)
    await wait_until(lambda: not engine.statistics().num_steps_in_flight)  # of requests that ended early
    assert_idle(engine)


async def check_steps(engine: zspmd.Engine, sizes: ModelSizes, published: Published) -> list[str]:
    """Return in which steps and on which ranks the collectives are others than the step says; takes note of all of them."""
    wrong = []
    answers = await engine.group.call("counted")
    for rank, (steps, _) in enumerate(answers):
        assert len(steps) == len(published.parts), f"rank {rank} did {len(steps)} steps of {len(published.parts)}"
        for number, (parts, found) in enumerate(zip(published.parts, steps, strict=True)):
            wanted = predict_collectives(sizes, engine.parallel, parts, rank, engine.config.expert_dispatch)
            if found != wanted:
                wrong.append(f"rank {rank}, step {number} of {parts}: {found}, not {wanted}")
    published.parts.clear()
    return wrong


async def control_records(engine: zspmd.Engine) -> list[dict[str, int]]:
    """Return by rank what it has sent to the driver beside its answers, but for its beats, which nobody else reads."""
    answers = await engine.group.call("counted")
    return [{kind: count for kind, count in sent.items() if kind != "Beat"} for _, sent in answers]


@pytest.mark.parametrize(("family", "layout", "dispatch"), LAYOUTS)
async def test_the_collectives_of_each_step_follow_from_the_step(
    leak_check: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: tuple[int, int, int, int], dispatch: str
) -> None:
    save_checkpoint(tmp_path, family, num_hidden_layers=3)  # stages of two layers and one
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", counted_model.WORKER)
    sizes = ModelSizes.read(tmp_path)
    tp, pp, dp, ep = layout
    config: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_blocks": NUM_BLOCKS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": MAX_STEP_TOKENS,
        "expert_dispatch": dispatch,
    }
    async with build_engine(tmp_path, tp=tp, pp=pp, dp=dp, ep=ep, **config) as engine:
        await engine.group.call("start_counting")
        published = watch_published(engine, monkeypatch)
        await asyncio.wait_for(run_workload(engine, random.Random(str(layout))), LIMIT_S)
        parts = [part for step in published.parts for part in step]
        assert published.num_cut_prompts
        assert any(part.num_by_shard and part.num_whole for part in parts), "rows of both kinds in one step"
        assert any(part.num_tokens and not part.num_by_shard and not part.num_whole for part in parts), "a step that samples nothing"
        assert any(not part.num_tokens for part in parts) == (dp > 1), "an idle replica, where there are several"
        has_joint_steps = any(min(part.num_tokens for part in step) for step in published.parts)
        assert has_joint_steps == (dp == 1 or ep > tp), "a step of all replicas, where they share experts"
        assert await check_steps(engine, sizes, published) == []
        assert await control_records(engine) == [{}] * engine.parallel.world_size

        await engine.group.call("add_collective")  # what is not as predicted is seen, on each rank
        await complete(engine, [1, 2, 3], zspmd.SamplingParams(max_tokens=1))
        assert len(await check_steps(engine, sizes, published)) == engine.parallel.world_size
        assert all(await control_records(engine))
