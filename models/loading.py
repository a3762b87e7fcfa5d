"""Filling a model's parameters from safetensors: each rank reads only its own parts, one at a time, cast to the model's dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..model_config import ModelConfig, check_checkpoint
from ..safetensors_files import find_tensors as find_tensors
from .causal_model import CausalModel
from .layers import WeightShard


def load_weights(model: CausalModel, directory: Path, *, progress: Callable[[int, int], None]) -> None:
    """Fill every parameter of ``model`` from the checkpoint in ``directory``.

    Tensors that the model does not have are left unread.

    Args:
        model: built from the same directory's config.
        directory: has model.safetensors, or model.safetensors.index.json and the files that it names.
        progress: called after each part with the bytes of parameters filled so far and in all, of this rank.

    Raises:
        CheckpointError: see ``check_checkpoint``; or a parameter that would not be filled exactly once.
    """
    if isinstance(model.config, ModelConfig):  # any other has been compared with its checkpoint when it was built
        check_checkpoint(directory, model.config)
    shards = list(model.shards())
    _check_filled_once(model, shards)
    done_bytes, total_bytes = 0, sum(parameter.nbytes for parameter in model.parameters())
    for size_bytes in read_shards(shards, find_tensors(directory)):
        done_bytes += size_bytes
        progress(done_bytes, total_bytes)


def read_shards(shards: Iterable[WeightShard], files: Mapping[str, Path]) -> Iterator[int]:
    """Fill the rows of each shard and yield how many bytes they have, one file after another.

    Args:
        files: of every tensor, as ``find_tensors`` returns them.

    Raises:
        CheckpointError: a file that cannot be read; names it.
    """
    by_file: dict[Path, list[WeightShard]] = defaultdict(list)
    for shard in shards:
        by_file[files[shard.name]].append(shard)
    for path, wanted in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for shard in wanted:
                    yield _fill(shard, file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; download it again") from error


@torch.inference_mode()
def _fill(shard: WeightShard, file: Any) -> int:
    """Fill the shard's rows and return their bytes."""
    target = shard.parameter[shard.rows]
    if shard.source is None:
        target.zero_()
    else:
        target.copy_(file.get_slice(shard.name)[shard.source])
    return target.nbytes


def _check_filled_once(model: CausalModel, shards: Iterable[WeightShard]) -> None:
    """The shards' rows must tile each parameter; anything else would compute with memory that was never written."""
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for shard in shards:
        spans[id(shard.parameter)].append((shard.rows.start, shard.rows.stop))
    for name, parameter in model.named_parameters():
        at = 0
        for start, stop in sorted(spans[id(parameter)]):
            if start != at:
                break
            at = stop
        else:
            if at == parameter.shape[0]:
                continue
        raise CheckpointError(
            f"parameter {name} has {parameter.shape[0]} rows, and the checkpoint would fill {sorted(spans[id(parameter)])}; "
            "each row must be filled exactly once",
            tensor=name,
        )
