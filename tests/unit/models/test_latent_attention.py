"""Attention over cached latents: absorbed decode rows against expanded chunks, padding, halves, and what a cache takes.

That it computes what Transformers does is tested with whole models in ``test_llama.py``.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import save_checkpoint
from support.paging import PagedSequences, run_step
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.latent_config import LatentConfig
from zspmd.model_config import ModelConfig, read_model_config
from zspmd.models.attention import AttentionInputs, ChunkSpan, KvLayer, RowSpread
from zspmd.models.latent_attention import LatentLayer, PagedLatentAttention
from zspmd.models.latent_expansion import LatentExpansion, is_expansion_cheaper
from zspmd.models.llama import LlamaModel
from zspmd.models.loading import load_weights

CPU = torch.device("cpu")
NUM_HEADS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("deepseek-v3")
    save_checkpoint(directory, "deepseek-v3")
    return directory, read_model_config(directory)


def build(config: ModelConfig, dtype: torch.dtype, num_blocks: int, block_size: int) -> tuple[PagedLatentAttention, LatentLayer]:
    """Return a backend and a layer with random weights."""
    latent = config.latent
    assert latent is not None
    expansion = LatentExpansion("kv_b_proj", latent, NUM_HEADS, 0, dtype=dtype, device=CPU)
    expansion.weight.copy_(torch.randn(expansion.weight.shape, generator=torch.Generator().manual_seed(1)) / latent.rank**0.5)
    backend = PagedLatentAttention(NUM_HEADS, latent, latent.head_dim**-0.5, dtype=dtype, device=CPU)
    return backend, LatentLayer(num_blocks, block_size, expansion, dtype=dtype, device=CPU)


def attend_in_parts(config: ModelConfig, dtype: torch.dtype, sizes: list[int]) -> Tensor:
    """Return the outputs of one sequence's tokens [T, H * V], computed in parts: a part of one token as a decode row."""
    assert config.latent is not None
    num_tokens, block_size = sum(sizes), 4
    chance = torch.Generator().manual_seed(2)
    query = torch.randn(num_tokens, NUM_HEADS, config.latent.head_dim, generator=chance).to(dtype)
    cached = torch.randn(num_tokens, 1, config.latent.cached_size, generator=chance).to(dtype)
    table = torch.tensor([5, 2, 7, 1, 4])
    backend, layer = build(config, dtype, 8, block_size)
    outputs, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)
        blocks = table[: -(-(start + size) // block_size)]
        is_decode = size == 1
        inputs = AttentionInputs(
            block_size=block_size,
            positions=positions,
            max_length=start + size,
            write_blocks=table[positions // block_size],
            write_places=positions % block_size,
            chunks=() if is_decode else (ChunkSpan(0, size, start + size, blocks),),
            decode_start=0 if is_decode else size,
            decode_blocks=blocks[None] if is_decode else torch.empty(0, 0, dtype=torch.int64),
            decode_lengths=torch.tensor([start + 1] if is_decode else [], dtype=torch.int64),
        )
        part = slice(start, start + size)
        outputs.append(backend.begin_step(inputs)(query[part], cached[part], layer))
        start += size
    return torch.cat(outputs)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("sizes", [[1] * 13, [5, 1, 1, 6], [2, 11]], ids=["decodes", "absorbed-chunk", "expanded-chunk"])
def test_absorbed_and_expanded_agree(checkpoint: tuple[Path, ModelConfig], sizes: list[int], dtype: torch.dtype, atol: float) -> None:
    """However a sequence is cut into decode rows and chunks; in halves within their rounding of the float32 result."""
    wanted = attend_in_parts(checkpoint[1], torch.float32, [13])
    found = attend_in_parts(checkpoint[1], dtype, sizes)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, atol=atol, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decode_rows_of_several_tokens_see_one_position_more_each(checkpoint: tuple[Path, ModelConfig], dtype: torch.dtype) -> None:
    """Rows of 3 and 1 tokens, against the same tokens in steps of their own."""
    config = checkpoint[1]
    assert config.latent is not None
    backend, layer = build(config, dtype, 5, 4)
    chance = torch.Generator().manual_seed(3)
    layer.cache[1:] = torch.randn(layer.cache[1:].shape, generator=chance)
    query = torch.randn(4, NUM_HEADS, config.latent.head_dim, generator=chance).to(dtype)
    cached = torch.randn(4, 1, config.latent.cached_size, generator=chance).to(dtype)
    blocks, places, lengths = torch.tensor([[4, 1], [2, 0]]), torch.tensor([2, 3, 0, 1]), torch.tensor([3, 4, 5, 2])
    rows, write_blocks = torch.tensor([0, 0, 0, 1]), torch.tensor([4, 4, 1, 2])

    def attend(tokens: slice, decode_rows: slice, spread: RowSpread | None) -> Tensor:
        inputs = AttentionInputs(
            block_size=4,
            positions=lengths[tokens] - 1,
            max_length=5,
            write_blocks=write_blocks[tokens],
            write_places=places[tokens],
            chunks=(),
            decode_start=0,
            decode_blocks=blocks[decode_rows],
            decode_lengths=torch.stack([lengths[tokens][rows[tokens] == row][0] for row in range(2)[decode_rows]]),
            decode_spread=spread,
        )
        return backend.begin_step(inputs)(query[tokens], cached[tokens], layer)

    wanted = [attend(slice(i, i + 1), slice(int(rows[i]), int(rows[i]) + 1), None) for i in range(4)]
    layer.cache[4, :, 2:], layer.cache[1], layer.cache[2, :, 1] = 7.0, 7.0, 7.0  # what the step is to write, and what it must not see
    spread = RowSpread(3, sources=torch.tensor([[0, 1, 2], [3, 3, 3]]), places=torch.tensor([0, 1, 2, 3]))
    found = attend(slice(0, 4), slice(0, 2), spread)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


V3 = LatentConfig(query_rank=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128, rotates_pairs=True)


@pytest.mark.parametrize(
    ("num_tokens", "context", "is_expanded"),
    [
        pytest.param(1, 1, True, id="first-token"),
        pytest.param(1, 4096, False, id="decode"),
        pytest.param(16, 4096, False, id="end-of-a-prompt"),
        pytest.param(150, 4096, False, id="short-of-it"),
        pytest.param(180, 4096, True, id="long"),
        pytest.param(4096, 4096, True, id="whole-prompt"),
    ],
)
def test_what_takes_fewer_products(num_tokens: int, context: int, is_expanded: bool) -> None:
    assert is_expansion_cheaper(V3, num_tokens, context) == is_expanded


def load(checkpoint: tuple[Path, ModelConfig], communicator: ThreadCommunicator, dtype: torch.dtype = torch.float32) -> LlamaModel:
    model = LlamaModel(checkpoint[1], communicator, dtype=dtype, device=CPU)
    load_weights(model, checkpoint[0], progress=lambda done, total: None)
    return model


@torch.inference_mode()
def test_padding_reads_are_masked(checkpoint: tuple[Path, ModelConfig]) -> None:
    """Wider decode tables than the contexts, and anything finite in block 0, change nothing."""
    model = run_ranks(1, lambda communicator: load(checkpoint, communicator))[0]
    pages = PagedSequences(1, max_tokens=8)
    cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
    run_step(model, pages, cache, [[1, 2, 3, 4, 5, 6]], [(0, 5)], [])
    inputs = pages.build_inputs([], [0])
    wanted = model(torch.tensor([6]), inputs, cache)
    for layer in cache:
        layer.cache[0] = 100.0
    padded = replace(inputs, decode_blocks=F.pad(inputs.decode_blocks, (0, 7)))
    torch.testing.assert_close(model(torch.tensor([6]), padded, cache), wanted)


@pytest.mark.parametrize("tp", [1, 4])
def test_every_rank_caches_latents_and_nothing_of_heads(checkpoint: tuple[Path, ModelConfig], tp: int) -> None:
    latent = checkpoint[1].latent
    assert latent is not None

    def allocate(communicator: ThreadCommunicator) -> tuple[list[KvLayer], int]:
        model = LlamaModel(checkpoint[1], communicator, dtype=torch.bfloat16, device=CPU)
        return model.allocate_kv_cache(num_blocks=3, block_size=4), model.kv_bytes_per_block(block_size=4)

    for cache, bytes_per_block in run_ranks(tp, allocate):
        assert [layer.cache.shape for layer in cache] == [(3, 1, 4, latent.rank + latent.rope_dim)] * 2
        assert sum(layer.cache.nbytes for layer in cache) == 3 * bytes_per_block
        assert not any(layer.cache.any() for layer in cache)


@torch.inference_mode()
def test_half_precision_stays_close(tmp_path: Path) -> None:
    """Weights near their usual size (std 0.02): logits of a 2-layer model in bfloat16 within 5e-2 of Transformers' there."""
    sizes: dict[str, Any] = {
        "initializer_range": 0.02,
        "moe_intermediate_size": 48,
    }  # whose rows are whole 16 bytes, as the reference needs them
    reference: Any = save_checkpoint(tmp_path, "deepseek-v2-lite", dtype=torch.bfloat16, **sizes)
    checkpoint = tmp_path, read_model_config(tmp_path)
    model = run_ranks(1, lambda communicator: load(checkpoint, communicator, torch.bfloat16))[0]
    tokens = [random.Random(2).choices(range(checkpoint[1].vocab_size), k=20)]
    pages = PagedSequences(1, max_tokens=20)
    cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
    rows = [run_step(model, pages, cache, tokens, [(0, 12)], [])] + [run_step(model, pages, cache, tokens, [], [0]) for _ in range(8)]
    logits = torch.stack([row for step in rows for _, _, row in step])[:, : checkpoint[1].vocab_size]
    torch.testing.assert_close(logits, reference(torch.tensor(tokens)).logits[0].float(), atol=5e-2, rtol=0)


def test_packing_frees_the_weights_but_those_that_are_used_as_they_are(checkpoint: tuple[Path, ModelConfig]) -> None:
    """The expansion's stays, since it is used as matrices of heads, and the norms."""

    def pack(communicator: ThreadCommunicator) -> LlamaModel:
        model = load(checkpoint, communicator)
        model.pack_weights()
        return model

    model = run_ranks(1, pack)[0]
    prefix = "layers.0.attention."
    left = {name.removeprefix(prefix) for name, _ in model.named_parameters() if name.startswith(prefix)}
    assert left == {"query_norm.weight", "norm.weight", "expansion.weight", "down.bias", "output.bias"}
