"""Model directories that were made to do harm: nothing in them runs, and reading ends, in a checkpoint or in a CheckpointError."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.valid_frames import mutate

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import CheckpointError, ConfigError, RequestError
from zspmd.model_config import ModelConfig, read_model_config, tensor_shapes
from zspmd.runtime.engine.checkpoint import Checkpoint, open_checkpoint
from zspmd.runtime.engine.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from zspmd.safetensors_files import MAX_JSON_BYTES, find_tensors, read_safetensors_header

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 400,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def directory(tmp_path: Path, byte_level_backend: tokenizers.Tokenizer) -> Path:
    """A whole checkpoint of zeros with a tokenizer and a chat template."""
    write_config(tmp_path)
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    header, end = {}, 0
    for name, shape in tensor_shapes(read_model_config(tmp_path)).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    write_safetensors(tmp_path / "model.safetensors", json.dumps(header).encode(), end)
    return tmp_path


def write_config(directory: Path, **fields: object) -> None:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **fields}))


def write_safetensors(path: Path, header: bytes, num_bytes: int) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))


def read(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, ParallelConfig(), EngineConfig())


EVIL = "import os, pathlib\npathlib.Path(os.environ['ZSPMD_TEST_MARKER']).touch()\nclass Evil: pass\n"


def test_code_in_a_checkpoint_never_runs(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers would run it with trust_remote_code: modelling, configuration, tokenisation and generation code."""
    torch = pytest.importorskip("torch")
    from zspmd.models.llama import LlamaModel
    from zspmd.models.loading import load_weights
    from zspmd.topology import AxisGroup
    from zspmd.workers.communicators.solo import SoloCommunicator

    marker = tmp_path / "it_ran"
    monkeypatch.setenv("ZSPMD_TEST_MARKER", str(marker))
    monkeypatch.chdir(directory)
    names = ("modeling_evil", "configuration_evil", "tokenization_evil", "sitecustomize", "__init__", "conftest")
    for name in names:
        (directory / f"{name}.py").write_text(EVIL)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(EVIL)
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    write_config(directory, auto_map=auto_map, trust_remote_code=True, custom_pipelines={"x": {"impl": "modeling_evil.Evil"}})
    tokenizer_config = {
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "tokenizer_class": "Evil",
        "trust_remote_code": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    checkpoint = read(directory)
    assert checkpoint.tokenizer is not None
    checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("quick"))
    assert isinstance(checkpoint.model, ModelConfig)
    model = LlamaModel(checkpoint.model, SoloCommunicator(AxisGroup("tp", (0,), 0)), dtype=torch.float32, device=torch.device("cpu"))
    load_weights(model, directory, progress=lambda done, total: None)
    assert not marker.exists()
    assert not {*names[:3], "evil"} & set(sys.modules)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl", "weights.pickle"])
def test_a_directory_of_pickles_is_refused_by_name(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(CheckpointError, match=rf"only in {name}, a pickle, which can run code and is never loaded"):
        read(directory)


def test_an_index_that_names_a_pickle_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}')
    with pytest.raises(CheckpointError, match=r"names the file 'pytorch_model.bin'; it must be the plain name of a safetensors file"):
        read(directory)


@pytest.mark.parametrize(
    "name", ["../up.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\0.safetensors", ".safetensors/.."]
)
def test_an_index_reaches_nothing_outside_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="it must be the plain name of a safetensors file beside it"):
        find_tensors(tmp_path)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_directory(path: Path) -> None:
    path.mkdir()


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)  # sparse: it takes no room


WORDS: dict[Callable[[Path], None], str] = {
    make_pipe: "no regular file",
    make_endless: "no regular file",
    make_directory: "no regular file",
    make_huge: "the limit is",
}


@pytest.mark.parametrize("make", WORDS, ids=["a pipe", "a device", "a directory", "a huge file"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
)
def test_a_file_without_an_end_is_refused(directory: Path, name: str, make: Callable[[Path], None]) -> None:
    (directory / name).unlink(missing_ok=True)
    make(directory / name)
    with pytest.raises(CheckpointError, match=rf"{name} .*{WORDS[make]}"):
        read(directory)


@pytest.mark.parametrize("make", [make_pipe, make_endless], ids=["a pipe", "a device"])
def test_weights_that_are_no_file_are_refused(directory: Path, make: Callable[[Path], None]) -> None:
    (directory / "model.safetensors").unlink()
    make(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read(directory)


def test_a_tokenizer_that_is_too_large_is_refused(directory: Path) -> None:
    make_huge(directory / "tokenizer.json")
    with pytest.raises(CheckpointError, match=f"has {MAX_TOKENIZER_BYTES + 1} B; the limit is {MAX_TOKENIZER_BYTES}"):
        read(directory)
    assert MAX_JSON_BYTES < MAX_TOKENIZER_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": (1 << 31) - 1},
        {"num_attention_heads": (1 << 31) - 2, "hidden_size": (1 << 31) - 2},
        {"num_key_value_heads": 1 << 40},
        {"rms_norm_eps": 10**400},
        {"rope_theta": 10**400},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_scaling": {"rope_type": [["x"] * 100] * 100}},
        {"eos_token_id": [1 << 80]},
        {"eos_token_id": -1},
        {"architectures": [["deep"] * 1000] * 1000},
        {"architectures": ["LlamaForCausalLM' or 1"]},
        {"hidden_act": "__import__('os').system('true')"},
        {"dtype": "float32; import os"},
        {"vocab_size": -400},
        {"vocab_size": 1 << 63},
        {"hidden_size": True},
        {"head_dim": 1 << 60},
    ],
    ids=[
        "layers",
        "heads",
        "KV heads",
        "epsilon",
        "theta",
        "factor",
        "rope type",
        "large token",
        "negative token",
        "many names",
        "a name with code",
        "an activation with code",
        "a dtype with code",
        "negative vocabulary",
        "64 bits",
        "a bool",
        "head dim",
    ],
)
def test_a_config_with_absurd_fields_is_refused_at_once_and_briefly(directory: Path, fields: dict[str, Any]) -> None:
    write_config(directory, **fields)
    with pytest.raises(ConfigError) as caught:
        read(directory)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
            "'?a'? occurs twice",
        ),
        (b'{"a":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}', "dtype occurs twice"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9223372036854775807," * 100_000 + b'1],"data_offsets":[0,8]}}', "entry of a is malformed"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "not valid JSON"),
        (b'{"' + b"x" * 100_000 + b'":3}', r"entry of x{200}\.\.\. is malformed"),
        (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "entry of a is malformed"),
        (b'{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]}}', "entry of a is malformed"),
        (b'{"a":{"dtype":"F32","shape":[2147483648,2147483648,4],"data_offsets":[0,8]}}', "takes 73786976294838206464 B"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,0]}}', r"takes 4 B, but its offsets \[8, 0\]"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "entry of a is malformed"),
    ],
    ids=[
        "one name twice",
        "one field twice",
        "100,000 dims",
        "5,000 digits",
        "long name",
        "fraction",
        "2**63",
        "overflow",
        "backwards",
        "NaN",
    ],
)
def test_a_header_that_lies_is_refused_at_once(tmp_path: Path, header: bytes, message: str) -> None:
    write_safetensors(tmp_path / "x.safetensors", header, 8)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("count", [pytest.param(400, id="400"), pytest.param(20_000, id="20,000", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_files_are_refused_or_taken(directory: Path, name: str, count: int) -> None:
    """Only errors of zspmd; and what is taken is whole."""
    data = (directory / name).read_bytes()
    outcomes = {True: 0, False: 0}
    for number in range(count):
        (directory / name).write_bytes(mutate(random.Random(number), data))
        try:
            read(directory)
            outcomes[True] += 1
        except ConfigError:
            outcomes[False] += 1
    assert outcomes[False] > count // 10


def test_a_prompt_that_breaks_the_tokenizer_fails_alone(directory: Path) -> None:
    """A panic of its Rust code is no Exception: unmended it would go past every handler."""
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())
    tokenizer_json["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    tokenizer = Tokenizer.from_directory(directory)
    with pytest.raises(RequestError, match=r"cannot encode this prompt: .*retry-limit"):
        tokenizer.encode("a" * 40 + "!")
    assert tokenizer.decode(tokenizer.encode("quick")) == "quick"
