"""A draft model that costs what a real one costs and guesses nothing: the same files with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ....safetensors_files import find_tensors, read_safetensors_header
from .random_checkpoint import write_random_tensors

_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_useless_draft(directory: Path, like: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint with the config and the tokenizer of ``like`` and random weights; returns ``directory``, made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (like / name).exists():
            shutil.copyfile(like / name, directory / name)
    files = sorted(set(find_tensors(like).values()))
    shapes = {name: tensor.shape for file in files for name, tensor in read_safetensors_header(file).items()}
    write_random_tensors(directory / "model.safetensors", shapes, np.random.default_rng(seed))
    return directory
