"""The first law with speculation: drafts are agreed on without a word, and the collectives of a step follow from the steps before it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from support import counted_model
from support.checkpoints import save_checkpoint
from support.engines import assert_idle, build_engine, complete
from support.leaks import LeakCheck
from support.polling import wait_until
from support.speculation_cases import PROPOSERS, make_requests, speculate
from support.speculation_collectives import SpeculationLog
from support.step_collectives import ModelSizes, predict_collectives

import zspmd
from zspmd.speculation_config import DraftConfig

LAYOUTS = [
    pytest.param("llama", "target", 2, (2, 1, 1, 1), "batch", "auto", id="tp 2, a draft over both"),
    pytest.param("llama", "target", 1, (2, 1, 1, 1), "fixed", "auto", id="tp 2, a draft on each", marks=pytest.mark.long),
    pytest.param("mixtral", "ngram", 1, (1, 1, 2, 2), "fixed", "auto", id="dp 2 x ep 2"),
    pytest.param("mixtral", "ngram", 1, (1, 1, 2, 2), "batch", "all_to_all", id="dp 2 x ep 2, all-to-all", marks=pytest.mark.long),
    pytest.param("llama", "target", 2, (2, 2, 1, 1), "goodput", "auto", id="tp 2 x pp 2, a draft over both", marks=pytest.mark.long),
    pytest.param("llama", "target", 4, (4, 1, 1, 1), "goodput", "auto", id="tp 4, a draft over all", marks=pytest.mark.long),
    pytest.param("llama", "target", 1, (1, 2, 1, 1), "fixed", "auto", id="pp 2", marks=pytest.mark.long),
    pytest.param("llama", "ngram", 1, (1, 1, 2, 1), "fixed", "auto", id="dp 2", marks=pytest.mark.long),
]
K = 4


async def check_steps(engine: zspmd.Engine, sizes: ModelSizes, log: SpeculationLog) -> list[str]:
    """Return in which steps and on which ranks the collectives are others than they should be."""
    wrong = []
    wanted = list(log.take())
    answers = await engine.group.call("counted")
    for rank, (steps, _) in enumerate(answers):
        assert len(steps) == len(wanted), f"rank {rank} did {len(steps)} steps of {len(wanted)}"
        replica = rank // (engine.parallel.pp * engine.parallel.tp)
        for number, ((parts, drafting), found) in enumerate(zip(wanted, steps, strict=True)):
            target = predict_collectives(sizes, engine.parallel, parts, rank, engine.config.expert_dispatch)
            if found != drafting.get(replica, []) + target:
                wrong.append(f"rank {rank}, step {number} of {parts}: {found}, not {drafting.get(replica)} and {target}")
    return wrong


@pytest.mark.parametrize(("family", "proposer", "draft_tp", "layout", "policy", "dispatch"), LAYOUTS)
async def test_the_collectives_of_each_step_follow_from_the_steps_before(
    leak_check: LeakCheck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    proposer: str,
    draft_tp: int,
    layout: tuple[int, int, int, int],
    policy: str,
    dispatch: str,
) -> None:
    save_checkpoint(tmp_path, family)
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", counted_model.WORKER)
    config = PROPOSERS[proposer](tmp_path, tmp_path, K, draft_tp)
    tp, pp, dp, ep = layout
    async with build_engine(
        tmp_path,
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
        block_size=4,
        num_blocks=200,  # room for all, so that nobody's draft begins anew
        max_num_seqs=8,
        max_num_batched_tokens=48,
        enable_prefix_cache=False,
        speculation=speculate(config, policy),
        expert_dispatch=dispatch,
    ) as engine:
        sizes = ModelSizes.read(tmp_path)
        await engine.group.call("start_counting")
        log = SpeculationLog(engine, monkeypatch, sizes if isinstance(config, DraftConfig) and draft_tp > 1 else None)
        chance, tasks = random.Random(1), []
        for request in make_requests():
            tasks.append(asyncio.create_task(complete(engine, request.prompt, request.params)))
            await asyncio.sleep(chance.random() * 0.004)
        await asyncio.gather(*tasks)
        await wait_until(lambda: not engine.statistics().num_steps_in_flight)
        assert_idle(engine)
        noted = [one for step in log.steps for one in step]
        assert any(max(one.drafts, default=0) > 1 for one in noted)
        if isinstance(config, DraftConfig) and pp == 1:
            assert any(0 in one.counts for one in noted), "a sequence in a step though it had all its tokens"
        assert await check_steps(engine, sizes, log) == []
        sent = [{kind for kind in kinds if kind != "Beat"} for _, kinds in await engine.group.call("counted")]
        assert sent == [set()] * engine.parallel.world_size

        await engine.group.call("add_collective")  # what is not as it should be is seen, on each rank
        await complete(engine, [1, 2, 3], zspmd.SamplingParams(max_tokens=1))
        assert len(await check_steps(engine, sizes, log)) == engine.parallel.world_size
