"""Transformers' class for a checkpoint, built without weights, and which tensor of the checkpoint fills which of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..errors import CheckpointError
from ..model_config import STORED_DTYPES
from ..safetensors_files import find_tensors, read_json_object, read_safetensors_header
from ..transformers_config import TransformersConfig
from .transformers_attention import PAGED
from .transformers_stage import LAYERS


def build_architecture(config: TransformersConfig, directory: Path) -> Any:
    """Return the causal language model of ``directory`` on the meta device: its modules and the shapes of its weights.

    Raises:
        CheckpointError: Transformers has no such model, or one whose attention and linears cannot be replaced; or it takes other sizes
            than config.json seems to say, which then leaves something out.
    """
    where, version = directory / "config.json", transformers.__version__
    if config.model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{where}: Transformers {version} has no model_type {config.model_type!r}; a later one may have it")
    values = read_json_object(where)
    settings = _ask_transformers(where, lambda: transformers.CONFIG_MAPPING[config.model_type].from_dict(values))
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    cls = known.get(type(settings), None)
    if cls is None or cls.__name__ != config.architecture:
        found = "none" if cls is None else cls.__name__
        raise CheckpointError(
            f"{where}: architectures is {config.architecture}, and Transformers {version} has {found} for {config.model_type}"
        )
    if not settings.base_model_tp_plan or not cls.is_backend_compatible() or cls._is_stateful:
        why = (
            "keeps a state of its own beside the KV cache" if cls._is_stateful else "has no tensor-parallel plan or no attention interface"
        )
        raise CheckpointError(f"{where}: Transformers' {cls.__name__} {why}, without which zspmd cannot run it")
    _check_sizes(config, _ask_transformers(where, lambda: _sizes(settings)), where)
    settings._attn_implementation = PAGED
    with torch.device("meta"):
        model = _ask_transformers(where, lambda: cls(settings))
    if not isinstance(getattr(model.base_model, LAYERS, None), nn.ModuleList) or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise CheckpointError(f"{where}: Transformers' {cls.__name__} has no list of layers or no linear head; it is not supported")
    return model.eval().requires_grad_(False)


def _ask_transformers(where: Path, build: Callable[[], Any]) -> Any:
    """Return what ``build`` returns; whatever Transformers raises says that config.json is not to its liking."""
    try:
        return build()
    except Exception as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{where}: Transformers {transformers.__version__} refuses it: {type(error).__name__}: {message}") from error


def _sizes(settings: Any) -> dict[str, int]:
    """Return what Transformers takes, by the names of ``ModelSizes``."""
    num_heads = settings.num_attention_heads
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "num_layers": settings.num_hidden_layers,
        "num_heads": num_heads,
        "num_kv_heads": getattr(settings, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(settings, "head_dim", None) or settings.hidden_size // num_heads,
    }


def _check_sizes(config: TransformersConfig, taken: Mapping[str, int], where: Path) -> None:
    """The driver has counted blocks and shared out layers with what config.json says, and defaults are Transformers' own."""
    for name, value in taken.items():
        if value != getattr(config, name):
            raise CheckpointError(f"{where}: {name} is {getattr(config, name)}, and Transformers takes {value}; write the field out")


@torch.inference_mode()
def build_buffers(model: Any, device: torch.device) -> None:
    """Compute what a model without weights has beside them, such as rotary frequencies, on ``device``.

    Raises:
        CheckpointError: a buffer that belongs into the checkpoint, or one that Transformers does not compute again.
    """
    computed = dict(model.named_non_persistent_buffers())
    for name, module in model.named_modules():
        own = {key: f"{name}.{key}".lstrip(".") for key, _ in module.named_buffers(recurse=False)}
        for key, path in own.items():
            if path not in computed:
                raise CheckpointError(f"the model has a buffer {path}, which is neither weight nor computed; it is not supported")
            empty = torch.empty_like(computed[path], device=device)
            module._buffers[key] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        if own:
            model._init_weights(module)  # of its parameters, which are meta, this changes nothing
            for key, path in own.items():
                if module._buffers[key].isnan().any():
                    raise CheckpointError(f"Transformers computes no buffer {path} of a model without weights; it is not supported")


def name_tensors(model: Any, directory: Path) -> dict[str, str]:
    """Return the name in the checkpoint of each parameter of a whole model, tied ones under what they are tied to.

    Raises:
        CheckpointError: a parameter whose tensor is missing, has another shape or a dtype that is not supported, or is put together of
            several; ``tensor``, ``wanted`` and ``found`` say which.
    """
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    files = find_tensors(directory)
    stored = {path: read_safetensors_header(path) for path in dict.fromkeys(files.values())}
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if not isinstance(change, WeightRenaming)]
    names: dict[str, str] = {}
    for source in files:
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, parameters)
        if pattern is None:  # else Transformers would compute the parameter of it
            names[name] = source
    if model.config.tie_word_embeddings:
        names.update({tied: names[to] for tied, to in (model._tied_weights_keys or {}).items() if to in names})
    for name, shape in parameters.items():
        if name not in names:
            message = f"{directory} has no tensor for {name}; the checkpoint is incomplete, or its tensors would have to be converted"
            raise CheckpointError(message, tensor=name)
        _check_stored(directory, names[name], shape, stored[files[names[name]]])
    return {name: names[name] for name in parameters}


def _check_stored(directory: Path, name: str, shape: tuple[int, ...], header: Mapping[str, Any]) -> None:
    if name not in header:
        raise CheckpointError(f"{directory} has no tensor {name} in the file that its index names; download it again", tensor=name)
    found = header[name]
    if found.shape != shape:
        message = f"{directory}: {name} has shape {list(found.shape)} where Transformers' model has {list(shape)}"
        raise CheckpointError(message, tensor=name, wanted=shape, found=found.shape)
    if found.dtype not in STORED_DTYPES:
        message = f"{directory}: {name} is stored as {found.dtype}; supported are {', '.join(STORED_DTYPES)}, convert the checkpoint"
        raise CheckpointError(message, tensor=name, wanted=STORED_DTYPES, found=found.dtype)
