"""What the driver learns of a checkpoint before any process starts, and the size of the KV pool that follows from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import EngineConfig, ParallelConfig
from ...errors import ConfigError
from ...expert_dispatch import check_dispatch
from ...expert_placement import check_redundant_experts
from ...model_config import ModelConfig, check_expert_parallel
from ...safetensors_files import has_tensors
from ...speculation_config import SpeculationConfig
from ...topology import stage_layers
from ...transformers_config import (
    TransformersConfig,
    check_any_checkpoint,
    check_any_tensor_parallel,
    check_steady_positions,
    read_any_config,
)
from .draft_checkpoint import DraftCheckpoint, find_draft, open_draft
from .tokenizer import Tokenizer

TRANSFORMERS_MODEL = "zspmd.models.transformers_model"
DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo"
KV_SHARE = {"cpu": 0.5, "cuda": 0.9}  # of the memory that is free once the weights are loaded


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that was found whole.

    Attributes:
        max_model_len: prompt and output tokens of a request.
        tokenizer: None where the directory has none; then prompts are token ids and outputs have no text.
        speculation: as ``EngineConfig`` has it, the drafts' models as directories that any rank finds; None proposes nothing.
        drafts: the draft models of ``speculation``, the outermost first.
    """

    directory: Path
    model: ModelConfig | TransformersConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    speculation: SpeculationConfig | None = None
    drafts: tuple[DraftCheckpoint, ...] = ()

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that the ranks need for this model alone, imported once for all of them."""
        return (TRANSFORMERS_MODEL,) if isinstance(self.model, TransformersConfig) else ()


def open_checkpoint(path: str | Path, parallel: ParallelConfig, config: EngineConfig, *, needs_weights: bool = True) -> Checkpoint:
    """Read and check everything that can be known without torch; ``"demo"`` names the model that ships with zspmd.

    Without ``needs_weights`` config.json may lie alone; weights that are there are checked all the same.

    Raises:
        CheckpointError: the directory, a file, a tensor or the architecture, of the model or of a draft; names it. A draft with another
            vocabulary than the model's.
        TopologyError: the model or a draft cannot be split as ``parallel`` and the draft's tp ask.
        ConfigError: ``max_model_len`` beyond what the model was made for, or more ``redundant_experts`` than the ranks have use for, or an
            ``expert_dispatch`` where no replicas share experts.
    """
    directory = DEMO_MODEL if str(path) == "demo" else Path(path).expanduser().resolve()
    model = read_any_config(directory)
    check_expert_parallel(model, parallel)
    check_redundant_experts(model.mixture, config.redundant_experts, parallel)
    check_dispatch(config.expert_dispatch, model.mixture, parallel)
    check_any_tensor_parallel(model, parallel.tp)
    stage_layers(model.num_layers, parallel.pp, config.pp_partition)
    if needs_weights or has_tensors(directory):
        check_any_checkpoint(directory, model)
    limit = model.max_position_embeddings
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise ConfigError(f"max_model_len is {max_model_len}; the model in {directory} has {limit} positions: lower it")
    if isinstance(model, TransformersConfig):
        check_steady_positions(model, max_model_len)
        warnings.warn(
            f"{model.architecture} runs through Transformers' modelling code, which is slower than a module of zspmd", stacklevel=1
        )
    tokenizer = Tokenizer.from_directory(directory) if (directory / "tokenizer.json").is_file() else None
    if not isinstance(config.speculation, SpeculationConfig):  # None: EngineConfig has parsed what was a text
        return Checkpoint(directory, model, tokenizer, max_model_len)
    speculation = config.speculation.with_models(lambda draft: str(find_draft(draft)))
    drafts = tuple(open_draft(draft, directory, model, tokenizer, parallel) for draft in speculation.drafts)
    return Checkpoint(directory, model, tokenizer, max_model_len, speculation, drafts)


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
