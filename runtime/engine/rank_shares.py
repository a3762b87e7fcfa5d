"""What each rank of a layout will hold of a model, from config.json alone: no weight is read and no torch is there.

    rank  replica  stage  layers  heads  kv heads  experts  vocabulary rows  weights bytes
    0     0        0      0-1     0-1    0         0-3      0-255              941,824

It says in plain numbers what ``models`` builds; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...config import ParallelConfig
from ...expert_placement import Placement, copies_of_rank, first_placement, num_expert_ranks
from ...latent_config import LatentConfig
from ...mixture_config import MixtureConfig
from ...model_config import ModelConfig
from ...topology import axis_groups, stage_layers
from ...transformers_config import TransformersConfig

_FLOAT32_BYTES = 4
_ELEMENT_BYTES = {"float32": _FLOAT32_BYTES, "float16": 2, "bfloat16": 2}


class Place(NamedTuple):
    """A rank's index on each axis."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a model.

    Attributes:
        replica: its place on the dp axis; ``stage``: that on the pp axis.
        layers, heads, kv_heads: counted over the whole model. A latent counts as one KV head, of which each rank has a copy.
        experts: of each mixture layer, in the order of their copies; None where this rank has no such layer.
        vocabulary_rows: of the embedding, the head or both; None on a stage that has neither.
        weights_bytes: of the parameters once they are loaded; None where nobody knows their dtype yet, or where Transformers has them.
            Packing may add a copy of the vocabulary (``EngineConfig.pack_weights``).
    """

    rank: int
    replica: int
    stage: int
    layers: range
    heads: range
    kv_heads: range
    experts: Placement | None
    vocabulary_rows: range | None
    weights_bytes: int | None

    def to_row(self) -> dict[str, int | str | None]:
        """Return the attributes by name, ranges as ``first-last``."""
        return {name: _shown(value) if isinstance(value, (range, tuple)) else value for name, value in vars(self).items()}


def share_model(
    config: ModelConfig | TransformersConfig,
    parallel: ParallelConfig,
    pp_partition: Sequence[int] | None,
    dtypes: Sequence[str | None],
    *,
    num_redundant: int = 0,
) -> list[RankShare]:
    """Return the share of every rank, in order.

    Args:
        parallel: a layout that fits the model, as ``open_checkpoint`` checks.
        pp_partition: as in ``EngineConfig``.
        dtypes: of the weights, by rank; None for one that is not known.
        num_redundant: ``EngineConfig.redundant_experts``.

    Raises:
        TopologyError: the stages do not fit the layers.
    """
    stages = stage_layers(config.num_layers, parallel.pp, pp_partition)
    places = [_indices(parallel, axis) for axis in ("dp", "pp", "tp")]
    return [
        _share_of(config, parallel, rank, Place(*place), stages, dtypes[rank], num_redundant) for rank, place in enumerate(zip(*places))
    ]


def share_draft(draft: ModelConfig, draft_tp: int, parallel: ParallelConfig, dtypes: Sequence[str | None]) -> list[int | None]:
    """Return the bytes of a draft's weights on each rank of the target's layout, as in ``RankShare.weights_bytes``.

    Every rank proposes, so that each has all of its layers: whole where ``draft_tp`` is 1, else its share of the tp ranks.
    """
    places = _indices(parallel, "tp") if draft_tp > 1 else [0] * parallel.world_size
    alone = ParallelConfig(tp=draft_tp)
    return [share_model(draft, alone, None, [dtype] * draft_tp)[place].weights_bytes for place, dtype in zip(places, dtypes)]


def choose_dtype_name(dtype: str, checkpoint_dtype: str, device: str | None) -> str | None:
    """Return the dtype that ``EngineConfig.dtype`` stands for on a device; None where that depends on a device nobody knows yet."""
    if dtype != "auto":
        return dtype
    if device is None:
        return None
    return "float32" if device == "cpu" else checkpoint_dtype


def _shown(numbers: Sequence[int]) -> str | None:
    """Return each run of numbers as ``first-last``, or as the only one; None where there are none."""
    starts = [at for at in range(len(numbers)) if at == 0 or numbers[at] != numbers[at - 1] + 1]
    runs = [(numbers[start], numbers[end - 1]) for start, end in zip(starts, [*starts[1:], len(numbers)])]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or None


def _indices(parallel: ParallelConfig, axis: str) -> list[int]:
    """Return each rank's place on an axis."""
    found = {rank: index for group in axis_groups(parallel, axis) for index, rank in enumerate(group)}
    return [found[rank] for rank in range(parallel.world_size)]


def _share_of(
    config: ModelConfig | TransformersConfig,
    parallel: ParallelConfig,
    rank: int,
    place: Place,
    stages: Sequence[range],
    dtype: str | None,
    num_redundant: int,
) -> RankShare:
    tp, layers = parallel.tp, stages[place.pp]
    num_heads, num_kv_heads = config.num_heads // tp, max(1, config.num_kv_heads // tp)
    first_kv_head = place.tp * config.num_kv_heads // tp
    num_rows = -(-config.vocab_size // tp)  # the last rank's may be padded
    has_rows = layers.start == 0 or layers.stop == config.num_layers
    first_row = min(place.tp * num_rows, config.vocab_size)
    experts = None
    weights_bytes = None
    if isinstance(config, ModelConfig) and config.mixture is not None and any(config.mixture_of(layer) for layer in layers):
        num_ranks = num_expert_ranks(parallel)
        placement = first_placement(config.mixture.num_experts, num_redundant)
        experts = copies_of_rank(placement, (place.dp * tp + place.tp) % num_ranks, num_ranks)
    if not isinstance(config, ModelConfig):
        if layers.start == 0:
            first_row, num_rows = 0, config.vocab_size  # its embedding is whole on each rank
    elif dtype is not None:
        weights_bytes = _weights_bytes(config, layers, tp, len(experts or ()), _ELEMENT_BYTES[dtype])
    return RankShare(
        rank=rank,
        replica=place.dp,
        stage=place.pp,
        layers=layers,
        heads=range(place.tp * num_heads, (place.tp + 1) * num_heads),
        kv_heads=range(first_kv_head, first_kv_head + num_kv_heads),
        experts=experts,
        vocabulary_rows=range(first_row, min(first_row + num_rows, config.vocab_size)) if has_rows else None,
        weights_bytes=weights_bytes,
    )


def _weights_bytes(config: ModelConfig, layers: range, tp: int, num_experts: int, element_bytes: int) -> int:
    hidden, table = config.hidden_size, -(-config.vocab_size // tp) * config.hidden_size
    is_first, is_last = layers.start == 0, layers.stop == config.num_layers
    elements = len(layers) * _attention_elements(config, tp)
    elements += table if is_first else 0
    if is_last:
        elements += hidden + (0 if is_first and config.tie_word_embeddings else table)
    router_elements = 0
    for mixture in map(config.mixture_of, layers):
        if mixture is None:
            elements += _mlp_elements(hidden, config.intermediate_size // tp, has_bias=config.mlp_bias)
        else:
            elements += _mixture_elements(mixture, hidden, tp, num_experts)
            router_elements += mixture.num_experts * (hidden + int(mixture.has_correction_bias))
    return elements * element_bytes + router_elements * _FLOAT32_BYTES  # routers are in float32 always


def _attention_elements(config: ModelConfig, tp: int) -> int:
    """Return the elements of a layer's attention on one rank, and of the layer's two norms."""
    if config.latent is not None:
        return _latent_elements(config.latent, config, config.num_heads // tp) + 2 * config.hidden_size
    hidden, q_rows = config.hidden_size, config.num_heads // tp * config.head_dim
    qkv_rows = q_rows + 2 * max(1, config.num_kv_heads // tp) * config.head_dim
    biases = config.attention_bias * qkv_rows + config.output_bias * hidden
    return (qkv_rows + q_rows) * hidden + biases + 2 * hidden + config.qk_norm * 2 * config.head_dim


def _latent_elements(latent: LatentConfig, config: ModelConfig, num_heads: int) -> int:
    """Return the elements of a layer's latent attention on a rank with ``num_heads`` of the heads; what is no head's is on every rank."""
    hidden, q_rows = config.hidden_size, num_heads * latent.head_dim
    query = q_rows * hidden if latent.query_rank is None else latent.query_rank * (hidden + 1 + q_rows)
    cached = latent.cached_size * hidden + latent.rank + num_heads * (latent.nope_dim + latent.value_dim) * latent.rank
    biases = config.attention_bias * (latent.cached_size + (latent.query_rank or 0)) + config.output_bias * hidden
    return query + cached + num_heads * latent.value_dim * hidden + biases


def _mlp_elements(hidden: int, width: int, *, has_bias: bool) -> int:
    return 3 * hidden * width + has_bias * (2 * width + hidden)


def _mixture_elements(mixture: MixtureConfig, hidden: int, tp: int, num_experts: int) -> int:
    """Return the elements of a mixture layer on one rank, without its router."""
    shared = _mlp_elements(hidden, mixture.shared_size // tp, has_bias=False) + mixture.has_shared_gate * hidden
    return num_experts * _mlp_elements(hidden, mixture.expert_size, has_bias=False) + (shared if mixture.shared_size else 0)
