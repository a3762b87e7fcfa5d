"""Redundant experts, and their move to where the work is while requests run: no token changes, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from support import placed_model
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, complete, complete_all
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd
from zspmd.runtime.engine.expert_balance import Rebalance

NUM_REQUESTS = 32
NUM_TOKENS = 24
WAIT_S = 60.0
WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 9, "logprobs": 1})
LAYOUTS = [
    pytest.param("mixtral", {"tp": 2}, 1, id="tp 2, mixtral"),
    pytest.param("mixtral", {"dp": 2, "ep": 2}, 2, id="dp 2 x ep 2, mixtral"),
    pytest.param("dots1", {"tp": 2, "dp": 2, "ep": 4}, 5, id="tp 2 x dp 2 x ep 4, dots1", marks=pytest.mark.long),
    pytest.param("mixtral", {"tp": 2, "pp": 2}, 0, id="tp 2 x pp 2, mixtral without copies", marks=pytest.mark.long),
    pytest.param("qwen2-moe", {"tp": 2, "dp": 2}, 4, id="tp 2 x dp 2, qwen2-moe", marks=pytest.mark.long),
]


def build(directory: Path, layout: dict[str, int], num_redundant: int, **config: Any) -> zspmd.Engine:
    """Few blocks for many sequences, so that some are preempted; no shared prefixes, so that every run computes the same."""
    return zspmd.Engine(
        directory,
        parallel=zspmd.ParallelConfig(**layout),
        config=zspmd.EngineConfig(
            redundant_experts=num_redundant,
            block_size=4,
            num_blocks=400,
            max_num_seqs=NUM_REQUESTS,
            max_num_batched_tokens=128,
            enable_prefix_cache=False,
            **config,
        ),
        devices="cpu",
        deadlines=zspmd.Deadlines(beat_s=0.2, ready_s=100.0, step_s=60.0, drain_s=1.0, kill_s=0.5),
        on_log=lambda rank, stream, line: None,
        restart=zspmd.RestartPolicy(),
        on_restart=lambda line: None,
    )


def make_requests() -> tuple[list[list[int]], list[zspmd.SamplingParams]]:
    chance = random.Random(11)
    prompts = [[chance.randrange(SIZES["vocab_size"]) for _ in range(chance.choice((2, 9, 30)))] for _ in range(NUM_REQUESTS)]
    ways = (WAYS[number % len(WAYS)] for number in range(NUM_REQUESTS))
    return prompts, [zspmd.SamplingParams(max_tokens=NUM_TOKENS, seed=n, ignore_eos=True, **way) for n, way in enumerate(ways)]


REQUESTS = make_requests()


async def run_all(engine: zspmd.Engine) -> list[list[int]]:
    return [output.token_ids for output in await complete_all(engine, *REQUESTS)]


async def rebalance_amid(engine: zspmd.Engine) -> tuple[Rebalance, list[list[int]]]:
    """Run all requests and rebalance when a third of their tokens are there."""
    goal = engine.statistics().num_generated_tokens + NUM_REQUESTS * NUM_TOKENS // 3
    running = asyncio.create_task(run_all(engine))
    await wait_until(lambda: engine.statistics().num_generated_tokens >= goal, WAIT_S)
    done = await engine.rebalance_experts()
    assert not running.done()
    return done, await running


async def placed(engine: zspmd.Engine) -> list[list[list[int]]]:
    """Return the experts of each rank's mixtures."""
    return await engine.group.call("placed")


@pytest.mark.parametrize(("family", "layout", "num_redundant"), LAYOUTS)
async def test_a_rebalance_amid_running_requests_changes_no_token(
    leak_check: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: dict[str, int], num_redundant: int
) -> None:
    """Nor does the loss of a rank after it, whose successors have the experts where they were moved."""
    save_checkpoint(tmp_path, family)
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", placed_model.WORKER)
    async with build(tmp_path, layout, num_redundant) as engine:
        first, wanted = await placed(engine), await run_all(engine)
        done, tokens = await rebalance_amid(engine)
        assert tokens == wanted
        assert (done.num_layers > 0, done.num_loaded > 0) == (True, True), done
        assert 1 <= done.imbalance_after < done.imbalance_before
        moved = await placed(engine)
        assert moved != first
        running = asyncio.create_task(run_all(engine))
        await wait_until(lambda: engine.statistics().num_running > 0, WAIT_S)
        pid = engine.group.health()[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await running == wanted
        assert engine.statistics().num_restarts == 1
        assert await placed(engine) == moved
        assert_idle(engine)


async def test_experts_that_cannot_be_loaded_stay_where_they_are(leak_check: LeakCheck, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral")
    prompt, params = REQUESTS[0][0], zspmd.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    async with build(tmp_path, {"tp": 2}, 3, pack_weights=False) as engine:
        nothing = await engine.rebalance_experts()
        assert nothing == Rebalance(0, 0, 0, 0.0, 0.0)
        wanted = await complete(engine, prompt, params)
        (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
        with pytest.raises(zspmd.WorkerRaisedError, match=r"has neither model\.safetensors nor"):
            await engine.rebalance_experts()
        assert (await complete(engine, prompt, params)).token_ids == wanted.token_ids
        (tmp_path / "elsewhere").rename(tmp_path / "model.safetensors")
        assert (await engine.rebalance_experts()).num_loaded > 0
        assert (await complete(engine, prompt, params)).token_ids == wanted.token_ids
        assert engine.statistics().num_restarts == 0


async def test_a_model_without_experts_says_so() -> None:
    async with zspmd.Engine("demo", devices="cpu") as engine:
        with pytest.raises(zspmd.ConfigError, match="there is nothing to rebalance: the model has no experts"):
            await engine.rebalance_experts()
