"""The engine over models that run through Transformers' code, against Transformers' own generate: tokens, logprobs, invariance, refusals.

The quick tests have one family on two ranks and one on two stages: more of them, without processes, are in ``tests/unit/models``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_checkpoint
from support.compared_requests import make_prompts
from support.engines import assert_idle, build_engine, complete, complete_all, process_starts

import zspmd
from zspmd.errors import CheckpointError, TopologyError, WorkerRaisedError
from zspmd.runtime.engine.statistics import SchedulerStatistics

Layout = tuple[int, int, int]  # tp, pp, dp

EVERY_LAYOUT: tuple[Layout, ...] = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2))
CASES = [
    pytest.param("granite", ((2, 1, 1),), None, id="granite on two ranks"),
    pytest.param("phi3", ((1, 2, 1),), None, id="phi3 on two stages"),
    pytest.param("gemma3", ((2, 1, 1), (1, 2, 1)), "ngram:k=3", id="gemma3 with proposed tokens", marks=pytest.mark.long),
    *(
        pytest.param(family, EVERY_LAYOUT, None, id=f"{family}, every layout", marks=pytest.mark.long)
        for family in ("granite", "phi3", "gemma", "gemma3", "olmo2", "gpt-neox", "starcoder2")
    ),
]
PROMPT_LENGTHS = (1, 2, 5, 11, 16, 17, 33, 60)
ALONE = (2, 6)
MAX_TOKENS, NUM_TOP, ATOL = 14, 20, 1e-4
CUT_UP: dict[str, Any] = {  # chunks of prompts, and too few blocks for all requests at once
    "max_num_batched_tokens": 24,
    "num_blocks": 30,
    "block_size": 4,
    "enable_prefix_cache": False,
}
GREEDY = zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
DESCRIBED = zspmd.SamplingParams(max_tokens=1, temperature=0, logprobs=NUM_TOP)
SEEDED = zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.9, seed=5, ignore_eos=True)
NUM_LAYERS = 4

pytestmark = pytest.mark.filterwarnings("ignore:.* runs through Transformers' modelling code:UserWarning")
torch.set_num_threads(1)
PROMPTS = make_prompts(PROMPT_LENGTHS)


@dataclass
class Run:
    """What an engine says of each prompt: greedily and by chance, all at once and some alone; and the first step's logprobs."""

    tokens: list[list[int]]
    alone: list[list[int]]
    seeded: list[list[int]]
    seeded_alone: list[list[int]]
    described: list[zspmd.RequestOutput]
    statistics: SchedulerStatistics


@torch.inference_mode()
def ask_transformers(model: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return the greedy continuation of each prompt and the log-probabilities [V] after it."""
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(MAX_TOKENS):
            logits = model(torch.tensor([ids])).logits[0, -1]
            if len(ids) == len(prompt):
                logprobs.append(logits.float().log_softmax(-1))
            ids.append(int(logits.argmax()))
        tokens.append(ids[len(prompt) :])
    return tokens, logprobs


async def ask_engine(directory: Path, layout: Layout, speculation: str | None) -> Run:
    tp, pp, dp = layout
    cut_up = {**CUT_UP, "speculation": speculation}
    async with build_engine(directory, tp=tp, pp=pp, dp=dp, max_num_seqs=len(PROMPTS), **cut_up) as engine:
        tokens = [output.token_ids for output in await complete_all(engine, PROMPTS, GREEDY)]
        seeded = [output.token_ids for output in await complete_all(engine, PROMPTS, SEEDED)]
        statistics = engine.statistics()
        alone = [(await complete(engine, PROMPTS[i], GREEDY)).token_ids for i in ALONE]
        seeded_alone = [(await complete(engine, PROMPTS[i], SEEDED)).token_ids for i in ALONE]
        described = await complete_all(engine, PROMPTS, DESCRIBED)
        assert_idle(engine)
    return Run(tokens, alone, seeded, seeded_alone, described, statistics)


@pytest.mark.parametrize(("family", "layouts", "speculation"), CASES)
def test_tokens_equal_transformers_whatever_runs_beside(
    tmp_path: Path, family: str, layouts: tuple[Layout, ...], speculation: str | None
) -> None:
    """Chunked prefill, several requests at once, preemption; greedy tokens, and logprobs of the first within 1e-4 in float32."""
    wanted, logprobs = ask_transformers(save_checkpoint(tmp_path, family, num_hidden_layers=NUM_LAYERS))

    async def ask() -> list[Run]:
        return list(await asyncio.gather(*(ask_engine(tmp_path, layout, speculation) for layout in layouts)))

    runs = asyncio.run(ask())
    for layout, run in zip(layouts, runs):
        assert run.tokens == wanted, "tp {}, pp {}, dp {}".format(*layout)
        assert run.alone == [wanted[i] for i in ALONE]
        assert run.seeded == runs[0].seeded
        assert run.seeded_alone == [run.seeded[i] for i in ALONE]
        assert run.statistics.num_preemptions > 0 or layout[2] > 1  # replicas have blocks of their own
        for output, expected in zip(run.described, logprobs, strict=True):
            assert output.outputs[0].logprobs is not None
            top = output.outputs[0].logprobs[0].top
            torch.testing.assert_close(torch.tensor(list(top.values())), expected.topk(NUM_TOP).values, atol=ATOL, rtol=0)
            torch.testing.assert_close(torch.tensor(list(top.values())), expected[list(top)], atol=ATOL, rtol=0)


async def test_what_only_a_rank_can_see_ends_the_start_with_its_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "opt")
    with pytest.raises(WorkerRaisedError, match=r"OPTForCausalLM has no tensor-parallel plan or no attention interface"):
        async with build_engine(tmp_path):
            pass


@pytest.mark.parametrize(
    ("family", "layout", "error", "message"),
    [
        pytest.param("gemma2", {}, CheckpointError, r"Gemma2ForCausalLM caps attention scores", id="softcap"),
        pytest.param("granite-moe", {}, CheckpointError, r"GraniteMoeForCausalLM has a mixture of experts", id="experts"),
        pytest.param("granite", {"ep": 2, "tp": 2}, TopologyError, r"ep is 2, and the model has no experts", id="ep"),
        pytest.param("granite", {"tp": 4}, TopologyError, r"tp 4 must divide 8 heads and 2 KV heads", id="tp"),
    ],
)
async def test_what_config_json_shows_is_refused_before_a_process_starts(
    tmp_path: Path, family: str, layout: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_checkpoint(tmp_path, family)
    with process_starts() as started, pytest.raises(error, match=message):
        async with build_engine(tmp_path, **layout):
            pass
    assert started == []
