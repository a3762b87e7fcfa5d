"""Checkpoints in every form that loads, and each way in which one does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import save_checkpoint
from support.threads import run_ranks
from torch import Tensor, nn

from zspmd.errors import CheckpointError
from zspmd.model_config import read_model_config
from zspmd.models.layers import RmsNorm, WeightShard
from zspmd.models.llama import LlamaModel
from zspmd.models.loading import find_tensors, load_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def build(directory: Path, *, dtype: torch.dtype = torch.float32) -> LlamaModel:
    config = read_model_config(directory)
    return run_ranks(1, lambda communicator: LlamaModel(config, communicator, dtype=dtype, device=torch.device("cpu")))[0]


def load(directory: Path, *, dtype: torch.dtype = torch.float32) -> LlamaModel:
    model = build(directory, dtype=dtype)
    load_weights(model, directory, progress=lambda done, total: None)
    return model


def edit(directory: Path, **changes: Tensor | None) -> None:
    """Rewrite model.safetensors with tensors replaced, or left out where the change is None; dots are written as __."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, path)


def assert_same_weights(model: LlamaModel, other: LlamaModel) -> None:
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, "llama")
    return tmp_path


def test_weights_are_bit_equal(checkpoint: Path) -> None:
    model, stored = load(checkpoint), load_file(checkpoint / "model.safetensors")
    q, k, v = (stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    wanted = {
        "layers.1.attention.qkv.weight": torch.cat((q, k, v)),
        "layers.1.mlp.down.weight": stored["model.layers.1.mlp.down_proj.weight"],
        "head.weight": stored["lm_head.weight"],
        "norm.weight": stored["model.norm.weight"],
    }
    for name, weight in wanted.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_ranks_have_slices_and_zero_padding(checkpoint: Path) -> None:
    """Rank 3 of 4: its rows of the vocabulary (509 padded to 512), its columns of a row-parallel linear."""
    config, stored = read_model_config(checkpoint), load_file(checkpoint / "model.safetensors")
    models = run_ranks(4, lambda communicator: LlamaModel(config, communicator, dtype=torch.float32, device=torch.device("cpu")))
    head = models[3].get_parameter("head.weight")
    torch.nn.init.ones_(head)
    load_weights(models[3], checkpoint, progress=lambda done, total: None)
    assert torch.equal(head[:125], stored["lm_head.weight"][384:])
    assert not head[125:].any()
    assert torch.equal(models[3].get_parameter("layers.0.mlp.down.weight"), stored["model.layers.0.mlp.down_proj.weight"][:, 72:])


def test_sharded_index_loads_alike(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sharded = tmp_path_factory.mktemp("sharded")
    save_checkpoint(sharded, "llama", max_shard_size="100KB")
    assert len(set(find_tensors(sharded).values())) > 3
    assert_same_weights(load(sharded), load(checkpoint))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_files_are_cast(tmp_path: Path, stored: torch.dtype) -> None:
    save_checkpoint(tmp_path, "llama", dtype=stored)
    wide, narrow = load(tmp_path), load(tmp_path, dtype=stored)
    assert wide.get_parameter("norm.weight").dtype == torch.float32
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, narrow.get_parameter(name).float()), name


def test_tied_checkpoint_may_also_hold_the_head(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "tied")
    model = load(tmp_path)
    assert model.head is model.embedding
    edit(tmp_path, lm_head__weight=torch.full((509, 64), 7.0))
    assert_same_weights(load(tmp_path), model)


def test_unknown_tensors_are_ignored(checkpoint: Path) -> None:
    before = load(checkpoint)
    edit(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.arange(4))
    assert_same_weights(load(checkpoint), before)


def test_progress_ends_at_the_ranks_bytes(checkpoint: Path) -> None:
    model, calls = build(checkpoint), []
    load_weights(model, checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert calls[-1] == (total, total)
    assert {whole for _, whole in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_missing_tensor_is_named(checkpoint: Path) -> None:
    edit(checkpoint, **{Q_PROJ.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=f"has no tensor {Q_PROJ}") as caught:
        load(checkpoint)
    assert caught.value.tensor == Q_PROJ


def test_wrong_shape_is_named(checkpoint: Path) -> None:
    edit(checkpoint, **{Q_PROJ.replace(".", "__"): torch.zeros(64, 32)})
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[64, 32\] where config.json asks for \[64, 64\]") as caught:
        load(checkpoint)
    assert (caught.value.tensor, caught.value.wanted, caught.value.found) == (Q_PROJ, (64, 64), (64, 32))


def test_unsupported_dtype_is_named(checkpoint: Path) -> None:
    edit(checkpoint, model__norm__weight=torch.ones(64, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is stored as F64; supported are F32, F16, BF16") as caught:
        load(checkpoint)
    assert caught.value.found == "F64"


def test_truncated_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated") as caught:
        load(checkpoint)
    assert (caught.value.wanted, caught.value.found) == (len(data), len(data) - 1000)


def test_corrupt_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:16] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"header of .*model.safetensors is not valid JSON"):
        load(checkpoint)


def test_error_of_the_safetensors_library_is_translated(checkpoint: Path) -> None:
    """Metadata that are no map of texts pass our reader, which does not look at them, and not theirs."""
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = json.dumps({**header, "__metadata__": {"format": ["pt"]}}).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors"):
        load(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only in pytorch_model.bin, a pickle"):
        load(checkpoint)


class ForgetfulModel(LlamaModel):
    """Has a norm too many, which no shard fills."""

    def shards(self) -> Iterator[WeightShard]:
        self.extra = nn.Parameter(torch.empty(3), requires_grad=False)
        yield from super().shards()


class DoubtfulModel(LlamaModel):
    """Fills one norm twice."""

    def shards(self) -> Iterator[WeightShard]:
        yield from super().shards()
        assert isinstance(self.norm, RmsNorm)
        yield from self.norm.shards()


@pytest.mark.parametrize(("kind", "name"), [(ForgetfulModel, "extra"), (DoubtfulModel, "norm.weight")], ids=["never", "twice"])
def test_each_parameter_is_filled_exactly_once(checkpoint: Path, kind: type[LlamaModel], name: str) -> None:
    config = read_model_config(checkpoint)
    model = run_ranks(1, lambda communicator: kind(config, communicator, dtype=torch.float32, device=torch.device("cpu")))[0]
    with pytest.raises(CheckpointError, match=f"parameter {name} .* filled exactly once"):
        load_weights(model, checkpoint, progress=lambda done, total: None)
