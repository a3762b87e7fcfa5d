"""Experts from either form of a checkpoint, on the ranks that they are placed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import save_checkpoint
from support.threads import ThreadCommunicator, run_ranks

from zspmd.errors import TopologyError
from zspmd.model_config import read_model_config
from zspmd.models.llama import LlamaModel
from zspmd.models.loading import load_weights
from zspmd.models.moe import Mixture

FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "dots1", "glm4-moe")
SIZE = 2


def load(directory: Path, size: int, *, dtype: torch.dtype = torch.float32) -> list[LlamaModel]:
    """Load a checkpoint on ``size`` ranks."""

    def build(communicator: ThreadCommunicator) -> LlamaModel:
        model = LlamaModel(read_model_config(directory), communicator, dtype=dtype, device=torch.device("cpu"))
        load_weights(model, directory, progress=lambda done, total: None)
        return model

    return run_ranks(size, build)


def mixture_of(model: LlamaModel) -> Mixture:
    """Return the mixture of the last layer."""
    mixture = model.layers[-1].mlp
    assert isinstance(mixture, Mixture)
    return mixture


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"max_shard_size": "40KB"}], ids=["one-file", "many-files"])
def test_stacked_experts_load_as_those_apart(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """What Transformers writes by default, and with save_original_format=False."""
    for form in ("apart", "stacked"):
        save_checkpoint(tmp_path / form, family, stacks_experts=form == "stacked", **changes)
    stored = {form: (tmp_path / form / "model.safetensors.index.json").exists() for form in ("apart", "stacked")}
    assert set(stored.values()) == {bool(changes)}
    for apart, stacked in zip(load(tmp_path / "apart", SIZE), load(tmp_path / "stacked", SIZE)):
        wanted = dict(apart.named_parameters())
        assert wanted.keys() == dict(stacked.named_parameters()).keys()
        for name, parameter in stacked.named_parameters():
            assert torch.equal(parameter, wanted[name]), name


def test_each_rank_has_its_experts_whole(tmp_path: Path) -> None:
    """7 experts on 2 ranks: 3 and 4, gate above up, one expert below another."""
    save_checkpoint(tmp_path, "mixtral")
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts"
    for model, experts in zip(load(tmp_path, SIZE), (range(3), range(3, 7))):
        ours = mixture_of(model).experts
        gate_up = [stored[f"{prefix}.{expert}.{name}.weight"] for expert in experts for name in ("w1", "w3")]
        assert torch.equal(ours.gate_up, torch.cat(gate_up))
        assert torch.equal(ours.down, torch.cat([stored[f"{prefix}.{expert}.w2.weight"] for expert in experts]))


def test_the_router_stays_in_float32(tmp_path: Path) -> None:
    """A bfloat16 model chooses experts as exactly as its weights were stored."""
    save_checkpoint(tmp_path, "dots1")
    stored = load_file(tmp_path / "model.safetensors")
    mixture = mixture_of(load(tmp_path, 1, dtype=torch.bfloat16)[0])
    assert mixture.experts.gate_up.dtype == torch.bfloat16
    assert torch.equal(mixture.router.score.weight, stored["model.layers.1.mlp.gate.weight"])
    bias = mixture.router.correction_bias
    assert bias is not None
    assert torch.equal(bias, stored["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen2-moe")
    with pytest.raises(TopologyError, match=r"tp 3 does not fit 8 heads, 2 KV heads and a shared expert of width 48"):
        load(tmp_path, 3)
