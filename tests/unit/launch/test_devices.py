from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from zspmd.errors import ConfigError, TopologyError
from zspmd.runtime.launch import devices
from zspmd.runtime.launch.devices import available_cores, detect_devices, num_cuda_devices, script_devices


@pytest.fixture(autouse=True)
def device_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with three GPUs, as far as /dev tells."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "_DEVICE_FILES", tmp_path)
    return tmp_path


def test_without_device_files_nothing_is_visible(monkeypatch: pytest.MonkeyPatch, device_files: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert num_cuda_devices() == 2
    for entry in device_files.glob("nvidia?"):
        entry.unlink()
    assert num_cuda_devices() == 0


def test_all_devices_are_visible_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert num_cuda_devices() == 3


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("0", 1), ("3,1", 2), ("0,-1,2", 1), ("GPU-8a, MIG-1b", 2)],
    ids=["empty", "none", "one", "two", "hidden behind -1", "uuids"],
)
def test_cuda_devices_are_counted_as_cuda_would(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_cuda_devices() == count


@pytest.mark.parametrize(
    ("choice", "visible", "world_size", "expected"),
    [
        ("auto", "", 3, ["cpu"] * 3),
        ("auto", "0,1", 2, ["cuda:0", "cuda:1"]),
        ("cpu", "0", 3, ["cpu"] * 3),
        ("cuda", "0,1,2", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1, cuda:0", "0,1", 2, ["cuda:1", "cuda:0"]),
        (["cuda:0", "cuda:0"], "0", 2, ["cuda:0", "cuda:0"]),
        (["cuda:0", "cpu"], "0", 2, ["cuda:0", "cpu"]),
    ],
    ids=["auto without", "auto with", "cpu", "cuda", "text", "shared", "mixed"],
)
def test_each_rank_has_a_device(
    monkeypatch: pytest.MonkeyPatch, choice: str | Sequence[str], visible: str, world_size: int, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_devices(choice, world_size) == expected


@pytest.mark.parametrize(
    ("choice", "world_size", "error", "words"),
    [
        ("auto", 3, TopologyError, "3 ranks need 3 CUDA devices and this node shows 2"),
        ("cuda", 3, TopologyError, "this node shows 2"),
        ("cuda:0,cuda:1", 3, TopologyError, "lists 2 entries"),
        ("cuda:2,cpu", 2, TopologyError, "cuda:2 is not there"),
        ("gpu", 1, ConfigError, "'gpu' is unknown"),
        ("cuda:01", 1, ConfigError, "'cuda:01' is unknown"),
    ],
    ids=["auto", "cuda", "list", "absent", "unknown", "leading zero"],
)
def test_devices_that_do_not_suffice(
    monkeypatch: pytest.MonkeyPatch, choice: str, world_size: int, error: type[Exception], words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(error, match=words):
        detect_devices(choice, world_size)


def test_cores_respect_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert available_cores() == 1


@pytest.mark.parametrize(
    ("listed", "before", "world_size", "devices_seen", "visible"),
    [
        ("auto", None, 3, ["cuda:0", "cuda:1", "cuda:2"], None),
        ("auto", None, 4, ["cpu"] * 4, None),
        ("cuda", None, 2, ["cuda:0", "cuda:1"], None),
        ("cpu", None, 2, ["cpu", "cpu"], ""),
        ("cuda:2,cuda:0", None, 2, ["cuda:0", "cuda:1"], "2,0"),
        ("cuda:1,cuda:0", "2, GPU-8a", 2, ["cuda:0", "cuda:1"], "GPU-8a,2"),
    ],
    ids=["auto", "auto, too few", "cuda", "cpu", "list", "list of what is visible"],
)
def test_the_ranks_of_a_script_index_what_they_see(
    monkeypatch: pytest.MonkeyPatch, listed: str, before: str | None, world_size: int, devices_seen: list[str], visible: str | None
) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    assert script_devices(listed, world_size) == (devices_seen, visible)


@pytest.mark.parametrize(
    ("listed", "words"),
    [("cuda:0,cuda:0", "names a device twice"), ("cpu,cuda:0", "mixes cpu and cuda"), ("gpu0,gpu1", "device 'gpu0' is unknown")],
)
def test_devices_that_a_script_cannot_have(monkeypatch: pytest.MonkeyPatch, listed: str, words: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=words):
        script_devices(listed, 2)
