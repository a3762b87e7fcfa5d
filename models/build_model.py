"""Which class computes a checkpoint: ours, or Transformers' where there is none of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model_config import ModelConfig
from ..transformers_config import TransformersConfig
from .causal_model import CausalModel
from .communicator import Communicator
from .expert_axis import ExpertAxis
from .llama import LlamaModel


def build_model(
    config: ModelConfig | TransformersConfig,
    directory: Path,
    communicator: Communicator,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layers: range | None = None,
    expert_axis: ExpertAxis | None = None,
) -> CausalModel:
    """Return one rank's share of the model in ``directory``, without values yet; the arguments are those of the two classes.

    Raises:
        CheckpointError: Transformers has no such model, or zspmd cannot run it.
        TopologyError: the ranks do not divide what they share.
    """
    if isinstance(config, ModelConfig):
        return LlamaModel(config, communicator, dtype=dtype, device=device, layers=layers, expert_axis=expert_axis)
    from .transformers_model import TransformersModel  # takes seconds to import, which no other model needs

    return TransformersModel(config, directory, communicator, dtype=dtype, device=device, layers=layers)
