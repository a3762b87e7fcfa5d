"""How many passes of the target speculation saves on the demo model: counts, which no load of the machine changes."""

from __future__ import annotations

from collections.abc import Sequence

from support.engines import build_engine, complete_all
from support.leaks import LeakCheck

import zspmd
from zspmd.runtime.engine.checkpoint import DEMO_MODEL
from zspmd.runtime.engine.prompts import Prompt
from zspmd.runtime.programs.bench.speculation_prompts import SpeculationPrompts
from zspmd.speculation_config import parse_speculation

PARAMS = zspmd.SamplingParams(max_tokens=64, temperature=0)


def prompts(kind: str, count: int) -> list[Prompt]:
    return list(SpeculationPrompts(kind, 0, 0, 384).draw(0, count))


async def count(workload: Sequence[Prompt], proposer: str) -> tuple[float, float]:
    """Answer all prompts together, four tokens proposed in every step; returns the mean accepted length, and how many times fewer rows
    the target computed than without, where each token takes one."""
    async with build_engine(
        DEMO_MODEL, dtype="float32", num_blocks=400, max_num_seqs=32, speculation=parse_speculation(proposer, "fixed")
    ) as engine:
        outputs = await complete_all(engine, workload, PARAMS)
        told = engine.statistics().speculation
        assert told is not None
        metrics = [output.metrics for output in outputs if output.metrics is not None]
        assert len(metrics) == len(outputs)
        num_tokens = sum(len(output.token_ids) for output in outputs)
        return told.mean_accepted_length, num_tokens / sum(each.num_steps for each in metrics)


async def test_the_demo_model_and_its_draft_agree_on_sums_and_known_lines(leak_check: LeakCheck) -> None:
    mean_accepted_length, times_fewer = await count([*prompts("lines", 5), *prompts("sums", 20)], "draft:demo,k=4")
    assert mean_accepted_length >= 2.5
    assert times_fewer >= 2


async def test_ngrams_find_a_text_that_is_written_again(leak_check: LeakCheck) -> None:
    mean_accepted_length, times_fewer = await count(prompts("edits", 4), "ngram:k=4")
    assert mean_accepted_length >= 2
    assert times_fewer >= 2
