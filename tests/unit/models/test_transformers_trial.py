"""What a model is refused for when it is tried out: another attention than ours, or rows that do not keep to themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_checkpoint
from support.paging import PagedSequences
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.errors import CheckpointError
from zspmd.models.loading import load_weights
from zspmd.models.transformers_attention import HeadShare, MaskRequest, Trial, attend_trial
from zspmd.models.transformers_model import TransformersModel
from zspmd.transformers_config import TransformersConfig, read_any_config

CPU = torch.device("cpu")
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("granite")
    save_checkpoint(directory, "granite", num_hidden_layers=NUM_LAYERS)
    return directory


def try_out(directory: Path, change: Callable[[Any], None] = lambda model: None, *, tp: int = 1) -> list[int | None]:
    """Build the model, change it, and return the windows that it was found to have."""

    def run(communicator: ThreadCommunicator) -> list[int | None]:
        config = read_any_config(directory)
        assert isinstance(config, TransformersConfig)
        model = TransformersModel(config, directory, communicator, dtype=torch.float32, device=CPU)
        load_weights(model, directory, progress=lambda done, total: None)
        change(model)
        model.allocate_kv_cache(2, 4)
        return model._windows

    return run_ranks(tp, run)[0]


def test_windows_are_those_of_each_layer(granite: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gemma3", num_hidden_layers=4)
    assert try_out(granite) == [None] * NUM_LAYERS
    assert try_out(tmp_path) == [8, None, 8, None]


def look_at_other_rows(model: Any) -> None:
    """As a convolution or a recurrent layer does."""
    mlp = model.base.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x + x.roll(1, 1))


def skip_attention(model: Any) -> None:
    attention = model.base.layers[1].self_attn
    attention.forward = lambda hidden_states, **_others: (hidden_states, None)


def normalise_logits(model: Any) -> None:
    plain = model._head_model.forward

    def forward(**given: Any) -> Any:
        out = plain(**given)
        out.logits = out.logits.softmax(-1)
        return out

    model._head_model.forward = forward


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        pytest.param(look_at_other_rows, 1, r"gives a sequence other hidden states beside another than alone", id="rows"),
        pytest.param(skip_attention, 1, r"GraniteForCausalLM attends in layers 0, 2 where each of 0 to 2 must do so once", id="layer"),
        pytest.param(normalise_logits, 2, r"computes a token's logit from those of others; use tp 1", id="logits"),
    ],
)
def test_a_model_that_breaks_the_rules_is_refused(granite: Path, change: Callable[[Any], None], tp: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        try_out(granite, change, tp=tp)


def test_logits_of_one_rank_may_depend_on_each_other(granite: Path) -> None:
    assert try_out(granite, normalise_logits) == [None] * NUM_LAYERS


def test_capped_scores_are_refused_where_config_json_does_not_say_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gemma2")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attn_logit_softcapping"]  # Transformers takes 50 then
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layer 0 asks for softcap in its attention"):
        try_out(tmp_path)


def test_attention_must_get_the_keywords_of_the_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "nemotron")
    with pytest.raises(CheckpointError, match=r"NemotronAttention has none of the keywords that the model was given"):
        try_out(tmp_path)


def test_a_step_must_ask_for_what_the_trial_has_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "starcoder2", num_hidden_layers=NUM_LAYERS)

    @torch.inference_mode()
    def run(communicator: ThreadCommunicator) -> None:
        config = read_any_config(tmp_path)
        assert isinstance(config, TransformersConfig)
        model = TransformersModel(config, tmp_path, communicator, dtype=torch.float32, device=CPU)
        load_weights(model, tmp_path, progress=lambda done, total: None)
        pages = PagedSequences(1, max_tokens=4)
        cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
        model.base.config.sliding_window = 3
        model.forward(torch.tensor([1]), pages.build_inputs([(0, 1)], []), cache)

    with pytest.raises(CheckpointError, match=r"layer 0 asks for another attention than it did when the model was tried out"):
        run_ranks(1, run)


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def windowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return causal(batch, head, query, key) & (key > query - 4096)


def in_chunks(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return causal(batch, head, query, key) & (key // 8192 == query // 8192)


def by_token(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(3, dtype=torch.bool)[key] & (key <= query)


class Layer(torch.nn.Module):
    layer_idx = 5


def ask(mask: object, shape: tuple[int, ...] = (1, 2, 3, 4), **asked: Any) -> list[tuple[int, int | None]]:
    trial = Trial(HeadShare(2, 2, 4, 0, 1))
    heads = torch.zeros(shape)
    attend_trial(Layer(), heads, heads, heads, mask, zspmd_step=trial, **asked)
    return trial.windows


@pytest.mark.parametrize(
    ("mask", "asked", "message"),
    [
        pytest.param(MaskRequest(windowed), {}, r"layer 5 has a mask that is not causal", id="a-window-that-attention-is-not-told"),
        pytest.param(MaskRequest(causal), {"sliding_window": 8}, r"not that of a sliding window of 8", id="a-window-without-its-mask"),
        pytest.param(MaskRequest(windowed), {"sliding_window": 4095}, r"not that of a sliding window of 4095", id="one-position-off"),
        pytest.param(MaskRequest(in_chunks), {}, r"not causal", id="chunks"),
        pytest.param(MaskRequest(lambda b, h, q, k: (k <= q) | True), {}, r"not causal", id="both-directions"),
        pytest.param(MaskRequest(by_token), {}, r"does not depend on positions alone", id="of-the-tokens"),
        pytest.param(None, {}, r"layer 5 has a mask of its own \(NoneType\)", id="no-mask"),
        pytest.param(torch.zeros(1), {}, r"layer 5 has a mask of its own \(Tensor\)", id="a-tensor"),
        pytest.param(MaskRequest(causal), {"s_aux": 1.0, "position_bias": 2.0}, r"asks for s_aux, position_bias in its att", id="keywords"),
        pytest.param(MaskRequest(causal), {"dropout": 0.1}, r"asks for dropout", id="dropout"),
        pytest.param(MaskRequest(causal), {"shape": (1, 3, 3, 4)}, r"has queries, keys and values of \[1, 3, 3, 4\]", id="heads"),
        pytest.param(MaskRequest(causal), {"shape": (1, 2, 3, 6)}, r"supported are \[1, heads, tokens, dims\] with 2 heads", id="dims"),
    ],
)
def test_another_attention_is_refused(mask: object, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ask(mask, **asked)


def test_our_attention_is_recognised() -> None:
    assert ask(MaskRequest(causal), use_cache=False, softcap=None) == [(5, None)]
    assert ask(MaskRequest(windowed), sliding_window=4096, is_causal=True) == [(5, 4096)]
