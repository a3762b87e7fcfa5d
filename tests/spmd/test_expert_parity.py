"""Experts in several copies, and both ways to reach those of other replicas, against Transformers' generate in float32.

What ``test_engine_parity`` compares is compared here too; layouts with one copy of each expert, and "auto", are there.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, build_engine, complete_all

import zspmd

PROMPT_LENGTHS = (1, 2, 5, 17, 33)
MAX_TOKENS = 10
NUM_TOP = 20
ATOL = 1e-4
SENT = {"expert_dispatch": "all_to_all"}
CASES = [
    pytest.param(
        "mixtral",
        [
            {"dp": 2, "ep": 2, **SENT},
            {"tp": 2, "redundant_experts": 3},
        ],
        id="mixtral",
    ),
    pytest.param("dots1", [{"tp": 2, "dp": 2, "ep": 4, "redundant_experts": 2, **SENT}], id="dots1"),
    pytest.param("qwen3-moe", [{"dp": 4, "ep": 2}], id="qwen3-moe"),
    pytest.param("mixtral", [{"tp": 2, "dp": 4, "ep": 4}, {"dp": 4, "ep": 2, **SENT}], id="mixtral, pairs", marks=pytest.mark.long),
    *(
        pytest.param(
            family,
            [
                {"dp": 2, "ep": 2, "redundant_experts": 1, "expert_dispatch": "gather"},
                {"dp": 2, "ep": 2, "redundant_experts": 3, "pack_weights": False, **SENT},
                {"dp": 4, "ep": 4, **SENT},
                {"tp": 2, "dp": 2, "ep": 4, **SENT},
                {"pp": 2, "dp": 2, "ep": 2, **SENT},
                {"tp": 2, "pp": 2, "redundant_experts": 2},
            ],
            id=f"{family}, every way",
            marks=pytest.mark.long,
        )
        for family in ("mixtral", "qwen2-moe", "qwen3-moe", "dots1", "glm4-moe")
    ),
]

torch.set_num_threads(1)


def make_prompts() -> list[list[int]]:
    chance = random.Random(8)
    return [[chance.randrange(SIZES["vocab_size"]) for _ in range(length)] for length in PROMPT_LENGTHS]


PROMPTS = make_prompts()


async def ask_engine(directory: Path, config: dict[str, Any]) -> list[zspmd.RequestOutput]:
    async with build_engine(directory, max_num_seqs=len(PROMPTS), block_size=8, **config) as engine:
        params = zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=NUM_TOP)
        outputs = await complete_all(engine, PROMPTS, params)
        assert_idle(engine)
        return outputs


async def ask_engines(directory: Path, configs: list[dict[str, Any]]) -> list[list[zspmd.RequestOutput]]:
    return list(await asyncio.gather(*(ask_engine(directory, config) for config in configs)))


def ask_transformers(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return the tokens that follow a prompt and the log-probabilities [V] of the first of them."""
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=SIZES["eos_token_id"]
    )
    return whole[0, len(prompt) :].tolist(), model(ids).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize(("family", "configs"), CASES)
def test_tokens_and_first_logprobs_equal_transformers(tmp_path: Path, family: str, configs: list[dict[str, Any]]) -> None:
    model = save_checkpoint(tmp_path, family, num_hidden_layers=3)
    wanted = [ask_transformers(model, prompt) for prompt in PROMPTS]
    for config, outputs in zip(configs, asyncio.run(ask_engines(tmp_path, configs)), strict=True):
        assert [output.token_ids for output in outputs] == [tokens for tokens, _ in wanted], config
        for output, (_, logprobs) in zip(outputs, wanted, strict=True):
            assert output.outputs[0].logprobs is not None
            top = output.outputs[0].logprobs[0].top
            torch.testing.assert_close(torch.tensor(list(top.values())), logprobs[list(top)], atol=ATOL, rtol=0)
