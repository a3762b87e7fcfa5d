"""The Llama family against Transformers on tiny random checkpoints, alone and over 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import FAMILIES, save_checkpoint
from support.paging import PagedSequences, run_step
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.errors import TopologyError
from zspmd.model_config import ModelConfig, read_model_config, tensor_shapes
from zspmd.models.attention import KvLayer
from zspmd.models.llama import LlamaModel
from zspmd.models.loading import load_weights

PROMPT_LENGTHS = (5, 23, 38)
NUM_NEW = 10
STEP_TOKENS = 9  # below the prompts' lengths, so that they are computed in chunks beside decodes
CPU = torch.device("cpu")


@dataclass
class Reference:
    """What Transformers says of a checkpoint: greedy continuations of the prompts, and the logits of all their positions."""

    directory: Path
    config: ModelConfig
    tokens: list[list[int]]
    logits: list[Tensor]


def greedy_reference(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    tokens = list(prompt)
    for _ in range(NUM_NEW):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens, model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(directory, request.param)
    config = read_model_config(directory)
    draw = random.Random(1)
    prompts = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
    with torch.inference_mode():
        pairs = [greedy_reference(model, prompt) for prompt in prompts]
    return Reference(directory, config, [tokens for tokens, _ in pairs], [logits for _, logits in pairs])


def load(reference: Reference, communicator: ThreadCommunicator, *, is_packed: bool = True) -> LlamaModel:
    model = LlamaModel(reference.config, communicator, dtype=torch.float32, device=CPU)
    load_weights(model, reference.directory, progress=lambda done, total: None)
    if is_packed:
        model.pack_weights()
    return model


def gather_logits(shard: Tensor, communicator: ThreadCommunicator, vocab_size: int) -> Tensor:
    whole = communicator.all_gather(shard).flatten()
    assert torch.isneginf(whole[vocab_size:]).all()
    return whole[:vocab_size]


@torch.inference_mode()
def generate_greedily(
    reference: Reference, communicator: ThreadCommunicator, *, is_packed: bool
) -> tuple[list[list[int]], list[dict[int, Tensor]]]:
    """Run the prompts as a mixed batch: decodes first, the rest of each step filled with chunks."""
    model = load(reference, communicator, is_packed=is_packed)
    tokens = [whole[:length] for whole, length in zip(reference.tokens, PROMPT_LENGTHS)]
    pages = PagedSequences(len(tokens), max_tokens=max(PROMPT_LENGTHS) + NUM_NEW)
    cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
    wanted = [length + NUM_NEW for length in PROMPT_LENGTHS]
    seen: list[dict[int, Tensor]] = [{} for _ in tokens]
    while any(len(have) < want for have, want in zip(tokens, wanted)):
        decodes = [s for s, have in enumerate(tokens) if len(have) - pages.computed[s] == 1 and len(have) < wanted[s]]
        room, chunks = STEP_TOKENS - len(decodes), []
        for s, length in enumerate(PROMPT_LENGTHS):
            count = min(room, length - pages.computed[s])
            if count > 0 and s not in decodes:
                chunks.append((s, count))
                room -= count
        for s, position, shard in run_step(model, pages, cache, tokens, chunks, decodes):
            seen[s][position] = gather_logits(shard, communicator, reference.config.vocab_size)
            if position == len(tokens[s]) - 1:
                tokens[s].append(int(seen[s][position].argmax()))
    return tokens, seen


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mixed_batch_equals_transformers(reference: Reference, tp: int, is_packed: bool) -> None:
    """Chunked prefill beside decodes over shuffled blocks: the same greedy tokens, logits within 1e-4 in float32."""
    for tokens, seen in run_ranks(tp, lambda communicator: generate_greedily(reference, communicator, is_packed=is_packed)):
        assert tokens == reference.tokens
        for logits, wanted in zip(seen, reference.logits):
            assert list(logits) == list(range(len(wanted) - 1))
            torch.testing.assert_close(torch.stack(list(logits.values())), wanted[:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_whole_prompt_equals_transformers(reference: Reference, tp: int) -> None:
    """Several whole prompts in one step, the longest beyond the sliding window."""

    @torch.inference_mode()
    def prefill(communicator: ThreadCommunicator) -> None:
        model = load(reference, communicator)
        pages = PagedSequences(len(reference.tokens), max_tokens=max(map(len, reference.tokens)))
        cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
        chunks = [(s, len(tokens)) for s, tokens in enumerate(reference.tokens)]
        for s, position, shard in run_step(model, pages, cache, reference.tokens, chunks, []):
            whole = gather_logits(shard, communicator, reference.config.vocab_size)
            torch.testing.assert_close(whole, reference.logits[s][position], atol=1e-4, rtol=0)

    run_ranks(tp, prefill)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_name_every_tensor(reference: Reference, tp: int) -> None:
    """The ranks together ask for exactly the tensors that ``tensor_shapes`` demands of the checkpoint."""
    models = run_ranks(tp, lambda communicator: LlamaModel(reference.config, communicator, dtype=torch.float32, device=CPU))
    assert {shard.name for model in models for shard in model.shards()} == set(tensor_shapes(reference.config))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp("llama")
    save_checkpoint(directory, "llama", vocab_size=9)
    return Reference(directory, read_model_config(directory), [], [])


def test_vocabulary_spans_tile_the_padded_vocabulary(llama: Reference) -> None:
    """9 tokens over 4 ranks: 3 rows each, and the last rank has padding only, which embeds to zero and is never likely."""

    @torch.inference_mode()
    def inspect(communicator: ThreadCommunicator) -> tuple[int, int, Tensor, Tensor]:
        model = load(llama, communicator)
        assert model.embedding is not None
        rows = model.embedding.lookup(torch.arange(9))
        return model.vocab_start, model.vocab_end, model.compute_logits(torch.ones(1, llama.config.hidden_size)), rows

    whole = run_ranks(1, inspect)[0]
    ranks = run_ranks(4, inspect)
    assert [(start, end) for start, end, _, _ in ranks] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert torch.isneginf(ranks[3][2]).all()
    torch.testing.assert_close(torch.cat([logits for _, _, logits, _ in ranks[:3]], 1), whole[2])
    for _, _, _, rows in ranks:
        torch.testing.assert_close(rows, whole[3])


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_cache_size_follows_the_ranks_kv_heads(llama: Reference, tp: int, kv_heads: int) -> None:
    def allocate(communicator: ThreadCommunicator) -> tuple[list[KvLayer], int]:
        model = LlamaModel(llama.config, communicator, dtype=torch.bfloat16, device=CPU)
        return model.allocate_kv_cache(num_blocks=3, block_size=4), model.kv_bytes_per_block(block_size=4)

    for cache, bytes_per_block in run_ranks(tp, allocate):
        assert [layer.cache.shape for layer in cache] == [(3, 2 * kv_heads, 4, 8)] * 2
        assert sum(layer.cache.nbytes for layer in cache) == 3 * bytes_per_block
        assert not any(layer.cache.any() for layer in cache)


def test_unfit_communicator_is_refused(llama: Reference) -> None:
    with pytest.raises(TopologyError, match=r"tp 3 does not fit 8 heads, 4 KV heads .* choose one of 1, 2, 4, 8"):
        run_ranks(3, lambda communicator: LlamaModel(llama.config, communicator, dtype=torch.float32, device=CPU))


@torch.inference_mode()
def test_padding_reads_are_masked(llama: Reference) -> None:
    """Wider decode tables than the contexts, and anything finite in block 0, change nothing."""
    communicator = run_ranks(1, lambda communicator: communicator)[0]
    model = load(llama, communicator)
    pages = PagedSequences(1, max_tokens=8)
    cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
    tokens = [[1, 2, 3, 4, 5, 6]]
    run_step(model, pages, cache, tokens, [(0, 5)], [])
    inputs = pages.build_inputs([], [0])
    wanted = model(torch.tensor([6]), inputs, cache)
    for layer in cache:
        layer.cache[0] = 100.0
    padded = replace(inputs, decode_blocks=F.pad(inputs.decode_blocks, (0, 7)))
    torch.testing.assert_close(model(torch.tensor([6]), padded, cache), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_stays_close(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights near their usual size (std 0.02): logits of a 2-layer model within 5e-2 of Transformers in the same dtype."""
    reference_model = save_checkpoint(tmp_path, "qwen3", dtype=dtype, initializer_range=0.02)
    config = read_model_config(tmp_path)
    communicator = run_ranks(1, lambda communicator: communicator)[0]
    model = LlamaModel(config, communicator, dtype=dtype, device=CPU)
    load_weights(model, tmp_path, progress=lambda done, total: None)
    tokens = [random.Random(2).choices(range(config.vocab_size), k=20)]
    pages = PagedSequences(1, max_tokens=20)
    cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
    rows = [run_step(model, pages, cache, tokens, [(0, 12)], [])] + [run_step(model, pages, cache, tokens, [], [0]) for _ in range(8)]
    logits = torch.stack([row for step in rows for _, _, row in step])[:, : config.vocab_size]
    torch.testing.assert_close(logits, reference_model(torch.tensor(tokens)).logits[0].float(), atol=5e-2, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_kept_contexts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Sequences of different lengths decode past the room of the contexts gathered first, and once more with one that comes and goes."""
    save_checkpoint(tmp_path, family)
    reference = Reference(tmp_path, read_model_config(tmp_path), [], [])
    draw = random.Random(3)
    tokens = [draw.choices(range(reference.config.vocab_size), k=120) for _ in range(3)]
    steps = [[0, 1]] * 70 + [[0, 1, 2]] * 3 + [[1, 0]] * 3 + [[2]] * 5

    def run() -> list[Tensor]:
        model = load(reference, run_ranks(1, lambda communicator: communicator)[0])
        pages = PagedSequences(3, max_tokens=120)
        cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
        run_step(model, pages, cache, tokens, [(0, 9), (1, 2), (2, 30)], [])
        return [row for decodes in steps for _, _, row in run_step(model, pages, cache, tokens, [], decodes)]

    kept = run()
    monkeypatch.setattr("zspmd.models.attention._MAX_KEPT_BYTES", 0)
    gathered = run()
    torch.testing.assert_close(torch.stack(kept), torch.stack(gathered), atol=1e-5, rtol=0)


def test_packing_frees_the_weights(llama: Reference) -> None:
    """What stays: the embedding, the norms, and nothing that a packed product has a copy of."""
    model = run_ranks(1, lambda communicator: load(llama, communicator))[0]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()} == {
        "embedding",
        "attention_norm",
        "mlp_norm",
        "norm",
    }
