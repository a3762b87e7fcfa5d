"""A model that runs through Transformers' code on a CUDA device, against the same on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import save_checkpoint
from support.threads import ThreadCommunicator, run_ranks

from zspmd.models.attention import AttentionInputs, ChunkSpan
from zspmd.models.loading import load_weights
from zspmd.models.transformers_model import TransformersModel
from zspmd.transformers_config import TransformersConfig, read_any_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]
NUM_TOKENS, BLOCK_SIZE = 21, 16


def prompt_inputs(device: torch.device) -> AttentionInputs:
    """One prompt in blocks 1 and 2."""
    places = torch.arange(NUM_TOKENS, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return AttentionInputs(
        block_size=BLOCK_SIZE,
        positions=places,
        max_length=NUM_TOKENS,
        write_blocks=1 + places // BLOCK_SIZE,
        write_places=places % BLOCK_SIZE,
        chunks=(ChunkSpan(0, NUM_TOKENS, NUM_TOKENS, torch.tensor([1, 2], device=device)),),
        decode_start=NUM_TOKENS,
        decode_blocks=nothing.view(0, 0),
        decode_lengths=nothing,
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["granite", "phi3", "gemma3"])
def test_logits_are_those_of_a_cpu(tmp_path: Path, family: str, tp: int) -> None:
    save_checkpoint(tmp_path, family, num_hidden_layers=4)
    config = read_any_config(tmp_path)
    assert isinstance(config, TransformersConfig)

    @torch.inference_mode()
    def compute(communicator: ThreadCommunicator, device: torch.device) -> torch.Tensor:
        model = TransformersModel(config, tmp_path, communicator, dtype=torch.float32, device=device)
        load_weights(model, tmp_path, progress=lambda done, total: None)
        model.pack_weights()
        cache = model.allocate_kv_cache(3, BLOCK_SIZE)
        hidden = model.forward(torch.arange(NUM_TOKENS, device=device), prompt_inputs(device), cache)
        return model.compute_logits(hidden).cpu()

    on_cpu = run_ranks(tp, lambda communicator: compute(communicator, torch.device("cpu")))
    on_gpu = run_ranks(tp, lambda communicator: compute(communicator, torch.device("cuda")))
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-3, rtol=1e-3)
