"""The worker that the engine runs on each rank: a language model, its KV cache and the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadFrameError, ConfigError, InternalError
from ..model_config import read_model_config, shares_experts
from ..models.attention import KvLayer
from ..models.llama import LlamaModel
from ..models.loading import load_weights
from ..topology import stage_layers
from ..transport.batch import decode_batch_step
from .batch_inputs import StepInputs, build_inputs
from .batch_state import BatchState
from .pipeline import PipelineStage
from .sampler import SampledTokens, Sampler
from .worker import Worker, rpc

_NO_TOKENS = np.empty(0, np.int32)
_MEMINFO = Path("/proc/meminfo")
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelWorker(Worker):
    """Computes a batch step and samples from it; all ranks of a stage return the same.

    The order of use is ``setup``, ``kv_capacity``, ``allocate_kv_cache``, then steps.
    """

    def setup(
        self,
        *,
        model: str,
        dtype: str,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        pack_weights: bool = True,
        pp_partition: list[int] | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: directory of the checkpoint.
            dtype: of weights, activations and KV cache, as in ``EngineConfig``.
            block_size: KV positions in a block.
            max_num_seqs: slots of the batch.
            max_model_len: tokens that one sequence may compute.
            pack_weights, pp_partition: as in ``EngineConfig``.

        Raises:
            CheckpointError: the directory is not a model that this version can load.
            TopologyError: the model cannot be split over this many ranks.
        """
        directory = Path(model)
        config = read_model_config(directory)
        self._device = torch.device(self.ctx.device)
        self._block_size, self._max_num_seqs, self._max_model_len = block_size, max_num_seqs, max_model_len
        communicator = self.ctx.mesh["tp"]
        torch_dtype = choose_dtype(dtype, config.dtype, self._device)
        replicas = self.ctx.mesh.group("dp")
        self._num_replicas, self._replica = replicas.size, None if replicas.size == 1 else replicas.index
        self._stage = PipelineStage(self.ctx.mesh["pp"], config.hidden_size, dtype=torch_dtype, device=self._device)
        layers = stage_layers(config.num_layers, self._stage.num_stages, pp_partition)[self._stage.index]
        shared = self.ctx.mesh["dp"] if shares_experts(config, self.ctx.mesh.parallel) else None
        self._model = LlamaModel(config, communicator, dtype=torch_dtype, device=self._device, layers=layers, replicas=shared)
        load_weights(self._model, directory, progress=lambda done, total: self.ctx.report_progress(done, total, "weights"))
        if pack_weights:
            self._model.pack_weights()
        if self._stage.is_last:
            self._sampler = Sampler(communicator, config.vocab_size, self._model.vocab_start, self._model.vocab_end)
        self._state: BatchState | None = None
        self._kv_cache: list[KvLayer] = []

    @rpc
    def kv_capacity(self) -> dict[str, int]:
        """Return ``bytes_per_block`` of this rank and the ``free_bytes`` of its device; ranks on one CPU host share the latter."""
        free_bytes = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else _read_available_bytes()
        return {"bytes_per_block": self._model.kv_bytes_per_block(self._block_size), "free_bytes": free_bytes}

    @rpc
    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make the KV cache and an empty batch.

        Args:
            num_blocks: blocks in the pool, the reserved block 0 included; the same on every rank.

        Raises:
            ConfigError: fewer than 2 blocks.
        """
        if num_blocks < 2:
            raise ConfigError(f"num_blocks is {num_blocks}; at least 2 are needed, since block 0 is reserved for padding")
        with torch.inference_mode():
            self._kv_cache = self._model.allocate_kv_cache(num_blocks, self._block_size)
        self._state = BatchState(self._max_num_seqs, self._max_model_len, self._block_size, num_blocks)

    @torch.inference_mode()
    def step(self, inputs: bytes | memoryview | list[Any]) -> list[object]:
        """Apply a packed ``BatchStep``, compute its rows and sample those that reach the end of their known tokens.

        Args:
            inputs: the batch step; with data-parallel replicas [how many tokens each of them computes, the batch step of each, None for
                those that have nothing to do].

        Returns:
            [int32 [R] tokens in the order of the sampled rows, their log-probabilities as in ``SampledTokens``], on the last stage; no
            tokens on the others. A step without rows computes nothing and enters no collective.

        Raises:
            BadFrameError: the bytes are no batch step, or name slots or blocks that do not exist.
            InternalError: the step contradicts the steps before it.
        """
        if self._state is None:
            raise InternalError("a step came before allocate_kv_cache")
        own = self._own_part(inputs)
        if own is None:
            if self._model.expert_axis.is_lockstep:
                self._model.serve_experts()
            return [_NO_TOKENS, None]
        span = self.ctx.trace.span
        with span("build inputs"):
            rows = self._state.apply(decode_batch_step(own))
            if not len(rows.slots):
                return [_NO_TOKENS, None]
            step_inputs = build_inputs(self._state, rows, self._device)
        before = self._stage.receive(len(step_inputs.token_ids))
        with span("forward"):
            hidden = self._model.forward(step_inputs.token_ids, step_inputs.attention, self._kv_cache, before)
        self._state.mark_computed(rows)
        if not self._stage.is_last:
            self._stage.send(hidden)
            return [_NO_TOKENS, None]
        with span("sample"):
            sampled = self._sample(self._state, hidden, step_inputs)
        return [sampled.token_ids, sampled.logprobs]

    def _own_part(self, inputs: bytes | memoryview | list[Any]) -> bytes | memoryview | None:
        """Return this replica's part of what was published."""
        if self._replica is None and not isinstance(inputs, list):
            return inputs
        sizes = [len(part) for part in inputs if isinstance(part, list)] if isinstance(inputs, list) else []
        if self._replica is None or not isinstance(inputs, list) or sizes != [self._num_replicas] * 2:
            raise BadFrameError(f"the inputs of a step are a {type(inputs).__name__} that is none for dp {self._num_replicas}")
        counts, parts = inputs
        self._model.expert_axis.begin_step(counts)
        part: bytes | memoryview | None = parts[self._replica]
        return part

    def _sample(self, state: BatchState, hidden: Tensor, inputs: StepInputs) -> SampledTokens:
        slots = inputs.sampled_slots
        if not len(slots):
            return SampledTokens(_NO_TOKENS, None)
        if len(slots) < len(hidden):
            hidden = hidden.index_select(0, inputs.sampled_rows)
        logits = self._model.compute_logits(hidden)
        sampled = self._sampler.sample(logits, state, slots)
        if self._stage.num_stages == 1:  # else no other stage knows them, and all are told
            state.append_sampled(slots, sampled.token_ids)
        return sampled


def choose_dtype(dtype: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype that a name of ``config.DTYPES`` stands for; "auto" is float32 on a CPU, the checkpoint's elsewhere."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else checkpoint_dtype
    chosen = _TORCH_DTYPES.get(dtype)
    if chosen is None:
        raise ConfigError(f"dtype is {dtype!r}; choose one of auto, {', '.join(_TORCH_DTYPES)}")
    return chosen


def _read_available_bytes() -> int:
    """Return what the kernel says can be allocated without swapping."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts in KiB
    raise InternalError(f"{_MEMINFO} has no line MemAvailable; give the engine num_blocks, so that it need not ask")
