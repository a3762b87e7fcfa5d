"""What the driver learns of a checkpoint before any process starts, and the size of the KV pool that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import EngineConfig, ParallelConfig
from ...errors import ConfigError
from ...model_config import ModelConfig, check_checkpoint, check_expert_parallel, check_tensor_parallel, read_model_config
from ...topology import stage_layers
from .tokenizer import Tokenizer

DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo"
KV_SHARE = {"cpu": 0.5, "cuda": 0.9}  # of the memory that is free once the weights are loaded


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that was found whole.

    Attributes:
        max_model_len: prompt and output tokens of a request.
        tokenizer: None where the directory has none; then prompts are token ids and outputs have no text.
    """

    directory: Path
    model: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int


def open_checkpoint(path: str | Path, parallel: ParallelConfig, config: EngineConfig) -> Checkpoint:
    """Read and check everything that can be known without torch; ``"demo"`` names the model that ships with zspmd.

    Raises:
        CheckpointError: the directory, a file, a tensor or the architecture; names it.
        TopologyError: the model cannot be split as ``parallel`` asks.
        ConfigError: ``max_model_len`` beyond what the model was made for.
    """
    directory = DEMO_MODEL if str(path) == "demo" else Path(path).expanduser().resolve()
    model = read_model_config(directory)
    check_expert_parallel(model, parallel)
    check_tensor_parallel(model, parallel.tp)
    stage_layers(model.num_layers, parallel.pp, config.pp_partition)
    check_checkpoint(directory, model)
    limit = model.max_position_embeddings
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise ConfigError(f"max_model_len is {max_model_len}; the model in {directory} has {limit} positions: lower it")
    tokenizer = Tokenizer.from_directory(directory) if (directory / "tokenizer.json").is_file() else None
    return Checkpoint(directory, model, tokenizer, max_model_len)


def choose_num_blocks(
    capacities: Sequence[Mapping[str, int]], devices: Sequence[tuple[int, str]], max_model_len: int, config: EngineConfig
) -> int:
    """Return the blocks of the KV pool, block 0 included: what the poorest rank has room for, and no more than can be used.

    Args:
        capacities: by rank, ``bytes_per_block`` and ``free_bytes``; ranks on one device share the latter.
        devices: node and device by rank.

    Raises:
        ConfigError: no room for one sequence of ``max_model_len``, or for the ``num_blocks`` that were asked for.
    """
    free_bytes = [capacity["free_bytes"] // devices.count(device) for capacity, device in zip(capacities, devices)]
    if config.num_blocks is not None:
        _check_room(config.num_blocks, capacities, free_bytes)
        return config.num_blocks
    shares = [KV_SHARE["cpu" if device == "cpu" else "cuda"] for _, device in devices]
    room = min(int(free * share) // c["bytes_per_block"] for c, free, share in zip(capacities, free_bytes, shares))
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if room < blocks_per_sequence + 1:
        raise ConfigError(
            f"memory for {room} KV blocks of {config.block_size} positions, but one sequence of max_model_len {max_model_len} needs "
            f"{blocks_per_sequence + 1}; lower max_model_len, use more ranks, or set num_blocks yourself"
        )
    return min(room, config.max_num_seqs * blocks_per_sequence + 1)


def _check_room(num_blocks: int, capacities: Sequence[Mapping[str, int]], free_bytes: Sequence[int]) -> None:
    """Without it, the kernel's out-of-memory killer has the first word."""
    for rank, (capacity, free) in enumerate(zip(capacities, free_bytes)):
        wanted = num_blocks * capacity["bytes_per_block"]
        if wanted > free:
            raise ConfigError(
                f"num_blocks is {num_blocks}, which takes {wanted:,} B on rank {rank}, where {free:,} B are free; "
                f"lower it to {free // capacity['bytes_per_block']} at most, or leave it out"
            )
