"""Mixtures with redundant copies of experts, and their change to another placement, against the plain mixture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_checkpoint
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.errors import CheckpointError, ConfigError
from zspmd.expert_placement import copies_of_rank, first_placement
from zspmd.model_config import read_model_config
from zspmd.models.expert_axis import ExpertAxis
from zspmd.models.expert_copies import ExpertCopies
from zspmd.models.llama import LlamaModel
from zspmd.models.loading import load_weights
from zspmd.models.mixture_layers import MixtureLayers
from zspmd.models.moe import Mixture

CPU = torch.device("cpu")
PLACEMENT = (6, 5, 4, 3, 0, 2, 1, 0, 6, 6)  # 7 experts and three more copies
SIZE = 2


def test_copies_of_an_expert_take_its_tokens_in_turn() -> None:
    copies = ExpertCopies((0, 1, 2, 0, 0), 3, CPU)
    experts = torch.tensor([[0, 1], [2, 0], [0, 2], [0, 1]])
    assert copies.choose(experts, 0).tolist() == [[0, 1], [2, 3], [4, 2], [0, 1]]
    assert copies.choose(experts[2:], 2).tolist() == [[4, 2], [0, 1]]  # whoever looks at a part of the step finds the same
    assert copies.choose(experts[:0], 4).shape == (0, 2)


def test_without_redundant_copies_there_is_nothing_to_choose() -> None:
    experts = torch.tensor([[0, 1], [2, 0]])
    assert ExpertCopies((0, 1, 2), 3, CPU).choose(experts, 0) is experts
    assert ExpertCopies((2, 0, 1), 3, CPU).choose(experts, 0).tolist() == [[1, 2], [0, 1]]


def load(directory: Path, communicator: ThreadCommunicator, num_redundant: int) -> LlamaModel:
    axis = ExpertAxis(communicator, num_redundant=num_redundant)
    model = LlamaModel(read_model_config(directory), communicator, dtype=torch.float32, device=CPU, expert_axis=axis)
    load_weights(model, directory, progress=lambda done, total: None)
    return model


def mixture_of(model: LlamaModel, layer: int) -> Mixture:
    mixture = model.layers[layer].mlp
    assert isinstance(mixture, Mixture)
    return mixture


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("stacks_experts", [False, True], ids=["apart", "stacked"])
def test_outputs_stay_when_experts_move(tmp_path: Path, stacks_experts: bool, is_packed: bool) -> None:
    """With first placements, staged but not changed, and changed; the other layer keeps its own."""
    save_checkpoint(tmp_path, "mixtral", stacks_experts=stacks_experts)
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def compute(communicator: ThreadCommunicator, num_redundant: int) -> Iterator[Tensor]:
        model = load(tmp_path, communicator, num_redundant)
        if is_packed:
            model.pack_weights()
        layers = MixtureLayers(model, tmp_path, 10)  # as on a later stage
        outputs = [mixture_of(model, 0).forward(x)]
        if num_redundant:
            layers.stage(10, PLACEMENT)
            outputs.append(mixture_of(model, 0).forward(x))
            layers.change(10)
            outputs.append(mixture_of(model, 0).forward(x))
            layers.change(10)  # nothing is staged any more
            assert mixture_of(model, 0).experts.placed == copies_of_rank(PLACEMENT, communicator.rank, SIZE)
            assert mixture_of(model, 1).experts.placed == copies_of_rank(first_placement(7, 3), communicator.rank, SIZE)
            outputs.append(mixture_of(model, 0).forward(x[:1]))
        return iter(outputs)

    wanted = next(run_ranks(1, lambda communicator: compute(communicator, 0))[0])
    for outputs in run_ranks(SIZE, lambda communicator: compute(communicator, 3)):
        first, staged, changed, alone = outputs
        torch.testing.assert_close(first, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(staged, first)
        torch.testing.assert_close(changed, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone, wanted[:1], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_each_token_is_counted_once_for_each_of_its_experts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral")
    x = torch.randn(20, 64)

    def compute(communicator: ThreadCommunicator) -> tuple[list[int], list[int]]:
        model = load(tmp_path, communicator, 5)
        mixture = mixture_of(model, 1)
        mixture.forward(x)
        chosen = mixture.router.forward(x)[1].flatten()
        (_, *first), (number, *second) = MixtureLayers(model, tmp_path, 0).take_loads()
        assert (number, sum(first)) == (1, 0)
        return second, chosen.bincount(minlength=7).tolist()

    (left, wanted), (right, _) = run_ranks(SIZE, compute)
    assert [a + b for a, b in zip(left, right)] == wanted
    assert min(sum(left), sum(right)) > 0


@torch.inference_mode()
def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral")
    x, gone = torch.randn(5, 64), threading.Barrier(SIZE)

    def compute(communicator: ThreadCommunicator) -> None:
        model = load(tmp_path, communicator, 3)
        layers, before = MixtureLayers(model, tmp_path, 0), mixture_of(model, 0).forward(x)
        with pytest.raises(ConfigError, match="a placement of 7 copies; it must have 10"):
            layers.stage(0, first_placement(7, 0))
        if gone.wait() == 0:
            (tmp_path / "model.safetensors").unlink()
        gone.wait()
        with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
            layers.stage(0, PLACEMENT)
        layers.change(0)
        assert torch.equal(mixture_of(model, 0).forward(x), before)

    run_ranks(SIZE, compute)
