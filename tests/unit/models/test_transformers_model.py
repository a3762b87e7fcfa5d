"""Models that run through Transformers' code: its own logits, over tensor-parallel ranks and pipeline stages, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import save_checkpoint
from support.foreign_families import FOREIGN
from support.paging import PagedSequences
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.errors import CheckpointError, InternalError, TopologyError
from zspmd.models.attention import KvLayer
from zspmd.models.loading import load_weights
from zspmd.models.transformers_model import TransformersModel
from zspmd.models.transformers_stage import cut_stage
from zspmd.topology import stage_layers
from zspmd.transformers_config import TransformersConfig, read_any_config

CPU = torch.device("cpu")
NUM_LAYERS = 4
PROMPT_LENGTHS = (5, 23, 38)
STEPS: tuple[tuple[list[tuple[int, int]], list[int]], ...] = (  # (sequence, tokens) of the chunks, and who decodes beside them
    ([(0, 5), (1, 4)], []),
    ([(1, 16), (2, 9)], [0]),
    ([(1, 3), (2, 20)], [0]),
    ([(2, 9)], [0, 1]),
    ([], [0, 1, 2]),
    ([], [0, 1, 2]),
)


@dataclass
class Reference:
    """What Transformers says of a checkpoint: the logits [T, V] of each sequence."""

    directory: Path
    config: TransformersConfig
    tokens: list[list[int]]
    logits: list[Tensor]


def read_foreign(directory: Path) -> TransformersConfig:
    config = read_any_config(directory)
    assert isinstance(config, TransformersConfig)
    return config


@torch.inference_mode()
def make_reference(directory: Path, family: str, **fields: Any) -> Reference:
    model = save_checkpoint(directory, family, num_hidden_layers=NUM_LAYERS, **fields)
    config = read_foreign(directory)
    draw = random.Random(1)
    tokens = [[draw.randrange(config.vocab_size) for _ in range(length + len(STEPS))] for length in PROMPT_LENGTHS]
    return Reference(directory, config, tokens, [model(torch.tensor([ids])).logits[0] for ids in tokens])


@pytest.fixture(scope="module", params=FOREIGN)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp(request.param), request.param)


def build(
    directory: Path, communicator: ThreadCommunicator, layers: range | None = None, *, dtype: torch.dtype = torch.float32
) -> TransformersModel:
    model = TransformersModel(read_foreign(directory), directory, communicator, dtype=dtype, device=CPU, layers=layers)
    load_weights(model, directory, progress=lambda done, total: None)
    return model


class Stages:
    """The stages of a pipeline one after another in one thread of a tensor-parallel rank."""

    def __init__(self, directory: Path, communicator: ThreadCommunicator, num_stages: int, *, is_packed: bool) -> None:
        self.communicator = communicator
        self.models = [build(directory, communicator, layers) for layers in stage_layers(NUM_LAYERS, num_stages)]
        for model in self.models if is_packed else ():
            model.pack_weights()
        self.caches: list[list[KvLayer]] = []

    def allocate(self, pages: PagedSequences) -> None:
        self.caches = [model.allocate_kv_cache(pages.num_blocks, pages.block_size) for model in self.models]

    def run(
        self, pages: PagedSequences, tokens: Sequence[Sequence[int]], chunks: list[tuple[int, int]], decodes: list[int]
    ) -> dict[tuple[int, int], Tensor]:
        """Compute one step and return the logits [V] of each of its rows, by sequence and position."""
        inputs, rows = pages.build_inputs(chunks, decodes), [*chunks, *((s, 1) for s in decodes)]
        places = [(s, pages.computed[s] + i) for s, count in rows for i in range(count)]
        ids, hidden = torch.tensor([tokens[s][position] for s, position in places]), None
        for model, cache in zip(self.models, self.caches):
            hidden = model.forward(ids, inputs, cache, hidden)
        assert hidden is not None
        for sequence, count in rows:
            pages.computed[sequence] += count
        shards = self.communicator.all_gather(self.models[-1].compute_logits(hidden))
        return dict(zip(places, shards.movedim(0, 1).flatten(1)))


@torch.inference_mode()
def run_steps(reference: Reference, communicator: ThreadCommunicator, num_stages: int, *, is_packed: bool) -> list[Tensor]:
    """Return the logits of each sequence's computed positions, from chunks beside decodes over shuffled blocks."""
    stages = Stages(reference.directory, communicator, num_stages, is_packed=is_packed)
    pages = PagedSequences(len(reference.tokens), max_tokens=max(map(len, reference.tokens)))
    stages.allocate(pages)
    seen: dict[tuple[int, int], Tensor] = {}
    for chunks, decodes in STEPS:
        seen.update(stages.run(pages, reference.tokens, chunks, decodes))
    vocab_size = reference.config.vocab_size
    assert all(torch.isneginf(logits[vocab_size:]).all() for logits in seen.values())
    return [torch.stack([seen[s, i] for i in range(pages.computed[s])])[:, :vocab_size] for s in range(len(reference.tokens))]


@pytest.mark.parametrize(
    ("tp", "pp", "is_packed"), [(1, 1, False), (2, 1, True), (1, 2, True), pytest.param(2, 3, False, marks=pytest.mark.long)]
)
def test_mixed_batches_equal_transformers(reference: Reference, tp: int, pp: int, is_packed: bool) -> None:
    """Logits within 1e-4 in float32, whatever is computed beside a sequence."""
    for logits in run_ranks(tp, lambda communicator: run_steps(reference, communicator, pp, is_packed=is_packed)):
        for found, wanted in zip(logits, reference.logits, strict=True):
            torch.testing.assert_close(found, wanted[: len(found)], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("granite")
    save_checkpoint(directory, "granite", num_hidden_layers=NUM_LAYERS)
    return directory


def alone(function: Callable[[ThreadCommunicator], Any]) -> Any:
    return run_ranks(1, function)[0]


def test_half_precision_stays_close(tmp_path: Path) -> None:
    """Weights near their usual size: logits within 5e-2 of Transformers in bfloat16."""

    @torch.inference_mode()
    def run(communicator: ThreadCommunicator) -> None:
        reference_model = save_checkpoint(tmp_path, "granite", dtype=torch.bfloat16, initializer_range=0.02)
        model = build(tmp_path, communicator, dtype=torch.bfloat16)
        pages = PagedSequences(1, max_tokens=20)
        cache = model.allocate_kv_cache(pages.num_blocks, pages.block_size)
        ids = torch.arange(20)
        found = model.compute_logits(model.forward(ids, pages.build_inputs([(0, 20)], []), cache))
        torch.testing.assert_close(found, reference_model(ids[None]).logits[0].float(), atol=5e-2, rtol=0)

    alone(run)


def test_a_rank_has_its_heads_and_layers_alone(granite: Path) -> None:
    def build_stage(communicator: ThreadCommunicator) -> TransformersModel:
        return build(granite, communicator, range(2, 4))

    whole = alone(lambda communicator: build(granite, communicator))
    for model in run_ranks(2, build_stage):
        assert model.kv_bytes_per_block(16) * 4 == whole.kv_bytes_per_block(16)
        names = {name for name, _ in model.named_parameters()}
        assert any(name.startswith("base.layers.2.") for name in names)
        assert not any("layers.0." in name or "embed" in name for name in names)
        assert model.get_parameter("base.layers.3.self_attn.q_proj.weight").shape == (32, 64)
    with pytest.raises(InternalError, match="only the last stage has the head"):
        alone(lambda communicator: build(granite, communicator, range(2)).vocab_start)
    pages = PagedSequences(1, max_tokens=4)
    later = alone(lambda communicator: build(granite, communicator, range(2, 4)))
    with pytest.raises(InternalError, match="was given no hidden states"):
        later.forward(torch.tensor([1]), pages.build_inputs([(0, 1)], []), later.allocate_kv_cache(pages.num_blocks, 4))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"hidden_act": "no-such"}, r"Transformers [\d.]+ refuses it: KeyError: .*no-such", id="activation"),
        pytest.param({"attention_dropout": "much"}, r"Transformers [\d.]+ refuses it: ", id="field"),
        pytest.param({"model_type": "granite9"}, r"has no model_type 'granite9'; a later one may", id="unknown"),
        pytest.param(
            {"architectures": ["Granite9ForCausalLM"]}, r"architectures is Granite9ForCausalLM, and .* has GraniteFor", id="class"
        ),
        pytest.param(
            {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
            r"OPTForCausalLM has no tensor-parallel plan or no att",
            id="no-plan",
        ),
        pytest.param(
            {"num_key_value_heads": 4}, r"k_proj.weight has shape \[16, 64\] where Transformers' model has \[32, 64\]", id="shape"
        ),
        pytest.param({"attention_bias": True}, r"has no tensor for model.layers.0.self_attn.q_proj.bias; the checkpoint is i", id="tensor"),
        pytest.param(
            {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"}, r"has no tensor for model\.", id="other-tensors"
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_checkpoint(tmp_path, "granite")
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        alone(lambda communicator: build(tmp_path, communicator))


def test_sizes_that_config_json_leaves_to_transformers_are_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gemma", head_dim=256, num_attention_heads=2, num_key_value_heads=2)
    change_config(tmp_path, head_dim=...)
    with pytest.raises(CheckpointError, match=r"head_dim is 32, and Transformers takes 256; write the field out"):
        alone(lambda communicator: build(tmp_path, communicator))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "granite")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight is stored as I8; supported are F32, F16, BF16") as error:
        alone(lambda communicator: build(tmp_path, communicator))
    assert error.value.tensor == "model.norm.weight"


def test_ranks_that_do_not_divide_a_linear_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "granite", intermediate_size=95)
    with pytest.raises(TopologyError, match=r"tp 2 does not divide the 95 dims of model.layers.0.mlp.gate_proj"):
        run_ranks(2, lambda communicator: build(tmp_path, communicator))


def test_a_model_without_a_pipeline_plan_has_one_stage(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "granite")
    changed = alone(lambda communicator: build(tmp_path, communicator))
    with pytest.raises(CheckpointError, match=r"no pipeline plan for GraniteModel .* use pp 1"):
        cut_stage(changed.base, range(1), None)
    assert cut_stage(changed.base, range(2), None) is None
