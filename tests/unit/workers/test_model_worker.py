"""The model worker on its own, with a stand-in context: whole sequences against Transformers, over one and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import save_checkpoint
from support.local_engine import StandInContext, StandInMesh
from support.threads import ThreadCommunicator, run_ranks

from zspmd.config import ParallelConfig
from zspmd.errors import BadFrameError, ConfigError, InternalError
from zspmd.topology import axis_group
from zspmd.transport.batch import BatchStep, SlotAdd, encode_batch_step
from zspmd.workers.communicators.solo import SoloCommunicator
from zspmd.workers.dtypes import choose_dtype
from zspmd.workers.model_worker import ModelWorker
from zspmd.workers.worker import find_rpc

BLOCK_SIZE = 4
PROMPTS = ([5, 100, 508, 3, 3, 77, 12, 9, 40, 41, 42], [200, 7, 8])
NUM_NEW = 12
TOKENS_A_CHUNK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, save_checkpoint(directory, "llama")


def make_worker(directory: Path, communicator: ThreadCommunicator, *, num_blocks: int | None = 32) -> ModelWorker:
    worker = ModelWorker()
    one_stage = SoloCommunicator(axis_group(ParallelConfig(), "pp", 0))
    worker.ctx = StandInContext(StandInMesh(tp=communicator, pp=one_stage), communicator.rank)  # type: ignore[assignment]  # a stand-in
    worker.setup(model=str(directory), dtype="auto", block_size=BLOCK_SIZE, max_num_seqs=4, max_model_len=64)
    if num_blocks is not None:
        worker.allocate_kv_cache(num_blocks)
    return worker


def run_alone(directory: Path, use: Any, **options: Any) -> Any:
    return run_ranks(1, lambda communicator: use(make_worker(directory, communicator, **options)))[0]


def make_step(**fields: Any) -> bytes:
    arrays: dict[str, Any] = {name: np.array(fields.pop(name, []), dtype) for name, dtype in ARRAYS.items()}
    return encode_batch_step(BatchStep(**arrays, **fields))


ARRAYS = {"block_slots": "u2", "block_ids": "u4", "chunk_slots": "u2", "chunk_tokens": "u4", "decode_slots": "u2"}


def make_add(slot: int, prompt: list[int], **params: Any) -> SlotAdd:
    num_blocks = -(-(len(prompt) + NUM_NEW) // BLOCK_SIZE)
    blocks = np.arange(1 + slot * 8, 1 + slot * 8 + num_blocks, dtype=np.uint32)
    return SlotAdd(slot, np.array(prompt, np.int32), len(prompt), 0, blocks, **params)


def generate(worker: ModelWorker, **params: Any) -> tuple[list[list[int]], list[Any]]:
    """Run the prompts, the first in chunks while the second decodes already, and return tokens and log-probabilities."""
    adds = [make_add(slot, prompt, seed=slot, **params) for slot, prompt in enumerate(PROMPTS)]
    outputs: list[list[int]] = [[] for _ in PROMPTS]
    logprobs: list[Any] = []
    computed = [0] * len(PROMPTS)
    while min(len(output) for output in outputs) < NUM_NEW:
        chunks = [(slot, min(TOKENS_A_CHUNK, len(p) - computed[slot])) for slot, p in enumerate(PROMPTS) if computed[slot] < len(p)]
        decodes = [slot for slot, prompt in enumerate(PROMPTS) if computed[slot] >= len(prompt) and len(outputs[slot]) < NUM_NEW]
        for slot, count in chunks:
            computed[slot] += count
        sampled = [slot for slot, _ in chunks if computed[slot] == len(PROMPTS[slot])] + decodes
        fields = {"chunk_slots": [slot for slot, _ in chunks], "chunk_tokens": [count for _, count in chunks], "decode_slots": decodes}
        tokens, row_logprobs = worker.step(make_step(adds=adds, **fields))
        adds = []
        assert isinstance(tokens, np.ndarray)
        assert tokens.dtype == np.int32
        assert len(tokens) == len(sampled)
        for slot, token in zip(sampled, tokens.tolist()):
            outputs[slot].append(token)
        logprobs.append(row_logprobs)
    return outputs, logprobs


def reference_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("size", [1, 2])
def test_greedy_tokens_equal_transformers(checkpoint: tuple[Path, Any], size: int) -> None:
    directory, reference = checkpoint
    expected = [reference_tokens(reference, prompt) for prompt in PROMPTS]
    for outputs, logprobs in run_ranks(size, lambda communicator: generate(make_worker(directory, communicator))):
        assert outputs == expected
        assert logprobs == [None] * len(logprobs)


def test_sampled_tokens_are_the_same_over_one_and_two_ranks(checkpoint: tuple[Path, Any]) -> None:
    directory, _ = checkpoint

    def use(communicator: ThreadCommunicator) -> list[list[int]]:
        return generate(make_worker(directory, communicator), temperature=1.0)[0]

    alone, sharded = run_ranks(1, use), run_ranks(2, use)
    assert sharded == alone * 2


def test_logprobs_of_a_greedy_token_lead_its_list(checkpoint: tuple[Path, Any]) -> None:
    outputs, logprobs = run_alone(checkpoint[0], lambda worker: generate(worker, logprobs=2))
    rows = [row for step in logprobs if step is not None for row in step]
    assert len(rows) == sum(len(output) for output in outputs)
    for chosen, top in rows:
        assert top[0][1] == chosen
        assert len(top) == 2


def test_step_without_rows_gives_no_tokens_and_enters_no_collective(checkpoint: tuple[Path, Any]) -> None:
    """Only rank 0 of two takes the step: a collective would wait for the other."""

    def use(communicator: ThreadCommunicator) -> list[object] | None:
        worker = make_worker(checkpoint[0], communicator)
        return worker.step(make_step(adds=[make_add(0, [1, 2])])) if communicator.rank == 0 else None

    output = run_ranks(2, use)[0]
    assert output is not None
    tokens, logprobs = output
    assert isinstance(tokens, np.ndarray)
    assert (tokens.dtype, tokens.shape, logprobs) == (np.int32, (0,), None)


def test_chunk_short_of_the_prompt_samples_nothing(checkpoint: tuple[Path, Any]) -> None:
    step = make_step(adds=[make_add(0, [1, 2, 3])], chunk_slots=[0], chunk_tokens=[2])
    tokens, logprobs = run_alone(checkpoint[0], lambda worker: worker.step(step))
    assert len(tokens) == 0
    assert logprobs is None


def test_capacity_and_progress(checkpoint: tuple[Path, Any]) -> None:
    def use(worker: ModelWorker) -> tuple[dict[str, int], list[tuple[int, int, str]]]:
        return find_rpc(worker, "kv_capacity")(), worker.ctx.progress  # type: ignore[attr-defined]  # of the stand-in

    capacity, progress = run_alone(checkpoint[0], use)
    layers, kv_heads, head_dim, itemsize = 2, 4, 8, 4
    assert capacity["bytes_per_block"] == layers * 2 * BLOCK_SIZE * kv_heads * head_dim * itemsize
    assert capacity["free_bytes"] > 1 << 20
    done, total, what = progress[-1]
    assert (done, what) == (total, "weights")
    assert [d for d, _, _ in progress] == sorted({d for d, _, _ in progress})


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_pool_needs_a_block_beside_the_reserved_one(checkpoint: tuple[Path, Any], num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"num_blocks is {num_blocks}; at least 2"):
        run_alone(checkpoint[0], lambda worker: worker.allocate_kv_cache(num_blocks), num_blocks=None)


def test_step_before_the_cache_is_refused(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(InternalError, match="before allocate_kv_cache"):
        run_alone(checkpoint[0], lambda worker: worker.step(make_step()), num_blocks=None)


def test_malformed_step_is_refused(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(BadFrameError, match="a batch step has 3 B"):
        run_alone(checkpoint[0], lambda worker: worker.step(b"abc"))
    with pytest.raises(BadFrameError, match="the inputs of a step are a list that is none for dp 1"):
        run_alone(checkpoint[0], lambda worker: worker.step([[1], [make_step()]]))


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda:0", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda:0", torch.float32),
    ],
)
def test_auto_is_float32_on_a_cpu_and_the_checkpoint_elsewhere(dtype: str, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(dtype, "float16", torch.device(device)) is expected


def test_unknown_dtype_names_those_that_work() -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'int32'.*choose one of auto, float32, bfloat16, float16"):
        choose_dtype("int32", "float16", torch.device("cpu"))
