"""What only a CUDA device can show; docs/gpu.md says when it was last seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import save_checkpoint

import zspmd

NUM_DEVICES = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES < 1, reason="needs a CUDA device")]
PROMPTS = [list(range(1, 3 + 2 * i)) for i in range(8)]


async def generate_all(engine: zspmd.Engine, params: zspmd.SamplingParams) -> list[list[int]]:
    import asyncio

    async def one(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate(prompt, params):
            tokens = output.token_ids
        return tokens

    return list(await asyncio.gather(*(one(prompt) for prompt in PROMPTS)))


@pytest.mark.parametrize("tp", [1, 2, 4])
async def test_greedy_tokens_equal_transformers(tp: int, tmp_path: Path) -> None:
    if tp > NUM_DEVICES:
        pytest.skip(f"needs {tp} CUDA devices, there are {NUM_DEVICES}")
    model = save_checkpoint(tmp_path, "qwen3")
    config = zspmd.EngineConfig(dtype="float32")
    async with zspmd.Engine(tmp_path, parallel=zspmd.ParallelConfig(tp=tp), config=config, devices="cuda") as engine:
        found = await generate_all(engine, zspmd.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    for prompt, tokens in zip(PROMPTS, found):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == wanted[0, len(prompt) :].tolist()


async def test_seeded_tokens_equal_those_of_a_cpu(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    config = zspmd.EngineConfig(dtype="float32")
    params = zspmd.SamplingParams(max_tokens=12, temperature=0.8, seed=7, ignore_eos=True)
    found = []
    for devices in ("cuda", "cpu"):
        async with zspmd.Engine(tmp_path, config=config, devices=devices) as engine:
            found.append(await generate_all(engine, params))
    assert found[0] == found[1]


@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices: NCCL takes one rank a device")
async def test_nccl_sums_over_the_axis() -> None:
    async with zspmd.launch("support.workers:TorchReducer", world_size=2, output_ranks="all", devices="cuda") as group:
        sums = await group.step({"size": 1024})
    assert sums == [3.0 * 1024, 3.0 * 1024]
