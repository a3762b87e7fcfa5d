"""Cutting a Transformers model to the layers of one pipeline stage.

Layers of other stages stay in the list as modules that pass the hidden states on, so that the model's own code finds each layer by its
number. The one before the first own layer gives out what the stage before has sent; whatever the model computed until then is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError

LAYERS = "layers"


class PassingLayer(nn.Module):
    """Stands for a layer of another stage.

    Attributes:
        received: hidden states that it gives out instead of those that it gets; None where it passes these on.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.received: Tensor | None = None
        for name, value in vars(layer).items():  # such as attention_type, by which some models choose a mask
            if isinstance(value, (str, int, float)) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *_args: Any, **_others: Any) -> Tensor:
        return hidden_states if self.received is None else self.received


def cut_stage(base: nn.Module, layers: range, plan: dict[str, Any] | None) -> PassingLayer | None:
    """Take what other stages have out of ``base`` and return the layer that takes their hidden states, None on the first stage.

    Args:
        base: a model of the whole, without weights yet.
        layers: of this stage.
        plan: the model's pipeline plan: the names of its parts in order, each with what goes in and comes out.

    Raises:
        CheckpointError: the model has no such plan, or hands more than hidden states from layer to layer.
    """
    whole: Any = base.get_submodule(LAYERS)
    if len(layers) == len(whole):
        return None
    if plan is None or LAYERS not in plan or plan[LAYERS][1] != ["hidden_states"]:
        raise CheckpointError(
            f"Transformers has no pipeline plan for {type(base).__name__} by which its layers could be shared out; use pp 1"
        )
    names = list(plan)
    before, after = names[: names.index(LAYERS)], names[names.index(LAYERS) + 1 :]
    others = (before if layers.start else []) + (after if layers.stop < len(whole) else [])
    for name in others:
        base.register_module(name, nn.Identity())
    entry = PassingLayer(whole[layers.start - 1]) if layers.start else None
    for index, layer in enumerate(whole):
        if index not in layers:
            whole[index] = entry if entry is not None and index == layers.start - 1 else PassingLayer(layer)
    return entry
