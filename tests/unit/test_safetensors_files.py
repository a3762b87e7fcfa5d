"""Headers of safetensors files, written by hand, and the ways in which they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zspmd.errors import CheckpointError
from zspmd.safetensors_files import StoredTensor, find_tensors, read_safetensors_header


def write(path: Path, header: object, data_bytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def entry(start: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_header_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry(8, 20), "a": entry(0, 8, dtype="BF16", shape=[2, 2]), "empty": entry(20, 20)}
    assert read_safetensors_header(write(tmp_path / "x", header, 20)) == {
        "b": StoredTensor("F32", (3,), 8, 20),
        "a": StoredTensor("BF16", (2, 2), 0, 8),
        "empty": StoredTensor("F32", (0,), 20, 20),
    }


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        pytest.param({"a": entry(0, 8)}, 7, "is truncated", id="truncated"),
        pytest.param({"a": entry(0, 8)}, 9, "is too long", id="too-long"),
        pytest.param({"a": entry(0, 8), "b": entry(12, 16)}, 16, r"b lies at \[12, 16\) where the one before it ends at 8", id="hole"),
        pytest.param({"a": entry(0, 8), "b": entry(4, 12)}, 12, r"b lies at \[4, 12\)", id="overlap"),
        pytest.param({"a": entry(0, 8, shape=[3])}, 8, r"a \(F32 \[3\]\) takes 12 B, but its offsets \[0, 8\] hold 8 B", id="wrong-length"),
        pytest.param({"a": entry(0, 8, dtype="F4", shape=[])} | {"b": entry(12, 8)}, 8, "b", id="end-before-start"),
        pytest.param({"a": {"dtype": "F32"}}, 8, "entry of a is malformed", id="fields-missing"),
        pytest.param({"a": entry(0, 8, shape=[-2])}, 8, "entry of a is malformed", id="negative-dim"),
        pytest.param({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "entry of a is malformed", id="three-offsets"),
        pytest.param({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "entry of a is malformed", id="boolean-dim"),
        pytest.param({"a": 3}, 8, "entry of a is malformed", id="not-an-object"),
        pytest.param([], 0, "is a JSON list", id="a-list"),
        pytest.param(b"{", 0, "is not valid JSON", id="half-json"),
        pytest.param(b"\xff\xfe", 0, "is not valid JSON", id="not-utf8"),
        pytest.param(b"[" * 200_000, 0, "is not valid JSON", id="deep"),
    ],
)
def test_bad_header_is_refused(tmp_path: Path, header: object, data_bytes: int, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data_bytes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "is truncated: 0 B", id="empty"),
        pytest.param((50).to_bytes(8, "little") + b"{}", "is truncated: 10 B where its header asks for 58 B", id="header-cut"),
        pytest.param((1 << 40).to_bytes(8, "little") + b"{}", "announces a header of 1099511627776 B, over 100000000", id="giant-header"),
    ],
)
def test_bad_length_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(tmp_path / "bad")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*gone: No such file"):
        read_safetensors_header(tmp_path / "gone")


def write_index(directory: Path, index: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_maps_tensors_to_files(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"a": entry(0, 8)}, 8)
    write(tmp_path / "2.safetensors", {"b": entry(0, 8)}, 8)
    write_index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    assert find_tensors(tmp_path) == {"a": tmp_path / "1.safetensors", "b": tmp_path / "2.safetensors"}


def test_single_file_goes_before_the_index(tmp_path: Path) -> None:
    """As in Transformers; files of other names, such as consolidated.safetensors, are not looked at."""
    path = write(tmp_path / "model.safetensors", {"a": entry(0, 8)}, 8)
    write(tmp_path / "consolidated.safetensors", {"b": entry(0, 8)}, 8)
    write_index(tmp_path, {"weight_map": {"c": "gone.safetensors"}})
    assert find_tensors(tmp_path) == {"a": path}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        pytest.param({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not there", id="missing-file"),
        pytest.param({"weight_map": {"a": "../a.safetensors"}}, "names the file '../a.safetensors'", id="outside"),
        pytest.param({"weight_map": {"a": 3}}, "names the file 3", id="not-a-name"),
        pytest.param({"weight_map": []}, "has no object weight_map", id="list"),
        pytest.param({}, "has no object weight_map", id="no-map"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: object, message: str) -> None:
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=message):
        find_tensors(tmp_path)


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        find_tensors(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match=r"only in pytorch_model-00001-of-00002.bin, a pickle"):
        find_tensors(tmp_path)
