"""Speculation on one GPU: rows of several tokens in attention, and engines whose draft and target share the device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_checkpoint
from torch import Tensor

import zspmd
from zspmd.models.attention import AttentionInputs, KvLayer, PagedAttention, RowSpread

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 16, 4
STARTS = (3, 14, 8)  # positions that each sequence has computed before
COUNTS = (3, 1, 4)  # tokens of each row
BLOCKS = ((1, 2), (3, 4, 5, 6), (7, 8, 9))
PROMPTS = [list(range(1, 3 + i)) * 2 for i in range(8)]
K = 3
SIZES: dict[str, Any] = {"vocab_size": 32, "eos_token_id": None}  # so few that any draft is right at times


def attend(device: torch.device, dtype: torch.dtype, window: int | None) -> Tensor:
    """Return what the new tokens of each sequence see, [all tokens, H * E], computed in one step."""
    generator = torch.Generator().manual_seed(0)
    layer = KvLayer(10, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype, device=device)
    layer.cache.copy_(torch.randn(layer.cache.shape, generator=generator))
    query = torch.randn(sum(COUNTS), HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    keys_values = torch.randn(sum(COUNTS), 2 * KV_HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    places = [(row, start + i) for row, (start, count) in enumerate(zip(STARTS, COUNTS)) for i in range(count)]
    ends, columns = [3, 4, 8], range(max(COUNTS))
    inputs = AttentionInputs(
        block_size=BLOCK_SIZE,
        positions=torch.tensor([position for _, position in places], device=device),
        max_length=15,
        write_blocks=torch.tensor([BLOCKS[row][position // BLOCK_SIZE] for row, position in places], device=device),
        write_places=torch.tensor([position % BLOCK_SIZE for _, position in places], device=device),
        chunks=(),
        decode_start=0,
        decode_blocks=torch.tensor([[*blocks, 0, 0][:4] for blocks in BLOCKS], device=device),
        decode_lengths=torch.tensor(STARTS, device=device) + 1,
        decode_spread=RowSpread(
            len(columns),
            sources=torch.tensor([[end - max(count - i, 1) for i in columns] for end, count in zip(ends, COUNTS)], device=device),
            places=torch.tensor([row * len(columns) + i for row, count in enumerate(COUNTS) for i in range(count)], device=device),
        ),
    )
    backend = PagedAttention(HEADS, KV_HEADS, HEAD_DIM, 1, sliding_window=window, dtype=dtype, device=device)
    return backend.begin_step(inputs)(query, keys_values, layer).float().cpu()


@pytest.mark.parametrize("window", [None, 5], ids=["all", "window"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_rows_of_several_tokens_are_those_of_a_cpu(dtype: torch.dtype, atol: float, window: int | None) -> None:
    torch.testing.assert_close(attend(CUDA, dtype, window), attend(CPU, torch.float32, window), atol=atol, rtol=0)


async def generate_all(
    directory: Path, devices: str, speculation: zspmd.SpeculationConfig | None, params: zspmd.SamplingParams
) -> list[list[int]]:
    """Return the tokens of all prompts at once; an engine that speculates must have accepted drafts."""

    async def one(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate(prompt, params):
            tokens = output.token_ids
        return tokens

    config = zspmd.EngineConfig(dtype="float32", num_blocks=256, speculation=speculation)
    async with zspmd.Engine(directory / "target", config=config, devices=devices) as engine:
        found = list(await asyncio.gather(*map(one, PROMPTS)))
        counted = engine.statistics().speculation
    assert counted is None or sum(counted.accepted) > 0, counted
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "target", "qwen3", seed=1, **SIZES)
    save_checkpoint(tmp_path / "draft", "llama", seed=2, num_hidden_layers=1, **SIZES)
    return tmp_path


def proposer(directory: Path, name: str) -> zspmd.NgramConfig | zspmd.DraftConfig:
    """Return "ngram"; "twin", a draft that is the target; or "other+ngram", a draft that is not, itself sped up."""
    if name == "ngram":
        return zspmd.NgramConfig(K, 1)
    if name == "twin":
        return zspmd.DraftConfig(str(directory / "target"), K)
    return zspmd.DraftConfig(str(directory / "draft"), K, inner=zspmd.NgramConfig(2, 1))


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["ngram", "twin", "other+ngram"])
async def test_tokens_are_those_without_speculation(name: str, temperature: float, directory: Path) -> None:
    params = zspmd.SamplingParams(max_tokens=16, temperature=temperature, seed=7, ignore_eos=True)
    speculation = zspmd.SpeculationConfig(proposer(directory, name), policy="fixed")
    assert await generate_all(directory, "cuda", speculation, params) == await generate_all(directory, "cuda", None, params)


async def test_rejection_draws_what_a_cpu_draws(directory: Path) -> None:
    params = zspmd.SamplingParams(max_tokens=16, temperature=0.8, top_k=50, seed=7, ignore_eos=True)
    speculation = zspmd.SpeculationConfig(proposer(directory, "other+ngram"), policy="fixed", verify="rejection")
    assert await generate_all(directory, "cuda", speculation, params) == await generate_all(directory, "cpu", speculation, params)
