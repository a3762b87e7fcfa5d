"""Latent attention on a CUDA device, where no product of float32 matrices stands in for the attention kernel."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_checkpoint
from support.engines import complete_all

import zspmd

NUM_DEVICES = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")]
PROMPTS = [list(range(1, 2 + 7 * i)) for i in range(1, 8)]
PARAMS = zspmd.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3", "deepseek-v3-halves"])
@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_tokens_equal_transformers(family: str, tp: int, tmp_path: Path) -> None:
    """Prompts in chunks of 16 tokens, so that whole, expanded and absorbed ones stand beside decode rows."""
    if tp > NUM_DEVICES:
        pytest.skip(f"needs {tp} CUDA devices, there are {NUM_DEVICES}")
    model = save_checkpoint(tmp_path, family)
    config = zspmd.EngineConfig(dtype="float32", max_num_seqs=8, max_num_batched_tokens=16)

    async def ask() -> list[zspmd.RequestOutput]:
        async with zspmd.Engine(tmp_path, parallel=zspmd.ParallelConfig(tp=tp), config=config, devices="cuda") as engine:
            return await complete_all(engine, PROMPTS, PARAMS)

    for prompt, output in zip(PROMPTS, asyncio.run(ask())):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.token_ids == wanted[0, len(prompt) :].tolist()
