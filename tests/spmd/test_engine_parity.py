"""The engine against Transformers' generate: every family, over 1, 2 and 4 tensor-parallel processes and pipelines of them, in float32.

The quick tests have some of it: the families' modules are compared with Transformers in ``tests/unit/models``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, SIZES, save_checkpoint
from support.compared_requests import make_prompts
from support.engines import assert_idle, build_engine, complete_all

import zspmd

Layout = tuple[int, int, int, int]  # tp, pp, dp, ep

EVERY_TP: tuple[Layout, ...] = ((1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 1, 1))
EVERY_OTHER: tuple[Layout, ...] = ((1, 2, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (1, 2, 2, 1))
EVERY_EP: tuple[Layout, ...] = (
    *((2, 1, 1, ep) for ep in (1, 2)),
    *((1, 1, 2, ep) for ep in (1, 2)),
    *((2, 1, 2, ep) for ep in (1, 2, 4)),
    *((2, 2, 1, ep) for ep in (1, 2)),
)
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "dots1", "glm4-moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3")
QUICK: dict[str, tuple[Layout, ...]] = {
    "llama": EVERY_TP,
    "qwen3": EVERY_TP,
    "mistral": ((2, 1, 1, 1), (1, 2, 1, 1)),
    "qwen2": ((2, 1, 1, 1), (1, 1, 2, 1)),
    "tied": ((2, 1, 1, 1), (1, 2, 1, 1)),
    "mixtral": ((1, 1, 1, 1), (2, 1, 2, 4), (2, 2, 1, 2)),
    "qwen2-moe": ((1, 1, 1, 1), (2, 1, 1, 1)),
    "qwen3-moe": ((2, 1, 1, 2), (1, 2, 2, 2)),
    "dots1": ((2, 1, 1, 1), (1, 1, 2, 2)),
    "glm4-moe": ((2, 1, 1, 1), (1, 2, 1, 1)),
    "deepseek-v2": ((1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 2)),
    "deepseek-v3": ((2, 1, 1, 2), (1, 2, 1, 1), (1, 1, 2, 1)),
}
CASES = [
    *(pytest.param((family, layouts, 2), id=family) for family, layouts in QUICK.items()),
    pytest.param(("llama", ((1, 2, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1)), 5), id="llama of 5 layers in stages and replicas"),
    pytest.param(("qwen3", ((1, 4, 1, 1), (1, 2, 2, 1)), 5), id="qwen3 of 5 layers in stages and replicas"),
    *(
        pytest.param((family, EVERY_TP, 2), id=f"{family}, every size", marks=pytest.mark.long)
        for family in FAMILIES
        if QUICK.get(family) != EVERY_TP
    ),
    *(pytest.param((family, EVERY_OTHER, 5), id=f"{family}, stages and replicas", marks=pytest.mark.long) for family in FAMILIES),
    *(pytest.param((family, EVERY_EP, 3), id=f"{family}, experts", marks=pytest.mark.long) for family in MIXTURES),
]
PROMPT_LENGTHS = (1, 2, 5, 11, 16, 17, 33, 60)
SEEDS = {"qwen3-moe": 1}
"""Of the weights, where 0 will not do: with it, the third and fourth of a token's experts are 1.5e-8 apart, so that rounding picks one."""
MAX_TOKENS = 10
NUM_TOP = 20
ATOL = 1e-4

torch.set_num_threads(1)
PROMPTS = make_prompts(PROMPT_LENGTHS)


@dataclass
class Reference:
    """What Transformers says of each prompt."""

    tokens: list[list[int]]
    logprobs: list[torch.Tensor]  # [n + 1, V] a prompt: after the prompt, and after each generated token


@dataclass
class Run:
    """What an engine says of each prompt: greedily, and with log-probabilities."""

    plain: list[zspmd.RequestOutput]
    described: list[zspmd.RequestOutput]


def ask_transformers(model: Any) -> Reference:
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        # without the mask, generate takes tokens of the prompt that happen to equal its padding token for padding
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=SIZES["eos_token_id"]
        )
        tokens.append(whole[0, len(prompt) :].tolist())
        logits = model(whole).logits[0, len(prompt) - 1 :]
        logprobs.append(logits.float().log_softmax(-1))
    return Reference(tokens, logprobs)


async def ask_engine(directory: Path, layout: Layout) -> Run:
    """Prompts are computed anew for the second answer: without prefix reuse."""
    tp, pp, dp, ep = layout
    async with build_engine(
        directory, tp=tp, pp=pp, dp=dp, ep=ep, max_num_seqs=len(PROMPTS), block_size=8, enable_prefix_cache=False
    ) as engine:
        plain = await complete_all(engine, PROMPTS, zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0))
        params = zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=NUM_TOP)
        described = await complete_all(engine, PROMPTS, params)
        assert_idle(engine)
        return Run(plain, described)


async def ask_engines(directory: Path, layouts: tuple[Layout, ...]) -> dict[Layout, Run]:
    return dict(zip(layouts, await asyncio.gather(*(ask_engine(directory, layout) for layout in layouts)), strict=True))


@pytest.fixture(scope="module", params=CASES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, dict[Layout, Run]]:
    """Start the engines of a family together: each spends most of its time importing torch on one core."""
    family, layouts, num_layers = request.param
    directory = tmp_path_factory.mktemp(family)
    model = save_checkpoint(directory, family, seed=SEEDS.get(family, 0), num_hidden_layers=num_layers)
    return ask_transformers(model), asyncio.run(ask_engines(directory, layouts))


def test_greedy_tokens_equal_transformers(answers: tuple[Reference, dict[Layout, Run]]) -> None:
    reference, runs = answers
    for layout, run in runs.items():
        assert [output.token_ids for output in run.plain] == reference.tokens, "tp {}, pp {}, dp {}, ep {}".format(*layout)
        assert [output.token_ids for output in run.described] == reference.tokens, "tp {}, pp {}, dp {}, ep {}".format(*layout)


def described(answers: tuple[Reference, dict[Layout, Run]]) -> Iterator[tuple[zspmd.RequestOutput, torch.Tensor]]:
    """Yield each answer that every engine gave, with the log-probabilities that it should have."""
    reference, runs = answers
    for run in runs.values():
        yield from zip(run.described, reference.logprobs, strict=True)


def test_logprobs_of_the_first_step_equal_transformers(answers: tuple[Reference, dict[Layout, Run]]) -> None:
    for output, wanted in described(answers):
        assert output.outputs[0].logprobs is not None
        first = output.outputs[0].logprobs[0]
        top = torch.tensor(list(first.top.values()))
        torch.testing.assert_close(top, wanted[0].topk(NUM_TOP).values, atol=ATOL, rtol=0)
        torch.testing.assert_close(top, wanted[0, list(first.top)], atol=ATOL, rtol=0)


def test_logprobs_of_all_chosen_tokens_equal_transformers(answers: tuple[Reference, dict[Layout, Run]]) -> None:
    for output, wanted in described(answers):
        assert output.outputs[0].logprobs is not None
        assert [entry.token_id for entry in output.outputs[0].logprobs] == output.token_ids
        found = torch.tensor([entry.logprob for entry in output.outputs[0].logprobs])
        chosen = wanted[range(len(output.token_ids)), output.token_ids]
        torch.testing.assert_close(found, chosen, atol=ATOL, rtol=0)
