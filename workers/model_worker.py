"""The worker that the engine runs on each rank: a language model, its KV cache and the batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadFrameError, ConfigError, InternalError
from ..models.attention import KvLayer
from ..models.build_model import build_model
from ..models.loading import load_weights
from ..models.mixture_layers import MixtureLayers
from ..speculation_config import SpeculationConfig
from ..topology import stage_layers
from ..transformers_config import read_any_config
from ..transport.batch import decode_batch_step
from .batch_inputs import StepInputs, build_inputs
from .batch_state import BatchState, StepRows
from .dtypes import choose_dtype
from .expert_setup import ExpertSettings, build_expert_axis
from .pipeline import PipelineStage
from .processor import describe_processor
from .sampler import SampledTokens, Sampler
from .speculation.build import build_proposer
from .speculation.depth import build_depth_policy
from .speculation.draft_model import DraftProposer
from .speculation.proposer import Proposer
from .speculation.speculator import Speculator
from .token_return import TokenReturn
from .worker import Worker, rpc

_NO_TOKENS = np.empty(0, np.int32)
_MEMINFO = Path("/proc/meminfo")


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
        speculation: dict[str, Any] | None = None,
        redundant_experts: int = 0,
        expert_placements: list[list[int]] | None = None,
        expert_dispatch: str = "auto",
    ) -> None:
        """Load the model.

        Args:
            model: directory of the checkpoint.
            dtype: of weights, activations and KV cache, as in ``EngineConfig``.
            block_size: KV positions in a block.
            max_num_seqs: slots of the batch.
            max_model_len: tokens that one sequence may compute.
            pack_weights, pp_partition, redundant_experts, expert_dispatch: as in ``EngineConfig``.
            speculation: what ``SpeculationConfig.to_plain`` returned; None for none.
            expert_placements: [layer, the expert of each copy] of each mixture layer that has had its experts moved.

        Raises:
            CheckpointError: the directory is not a model that this version can load.
            TopologyError: the model cannot be split over this many ranks.
        """
        directory = Path(model)
        config = read_any_config(directory)
        self._device = torch.device(self.ctx.device)
        self._block_size, self._max_num_seqs, self._max_model_len = block_size, max_num_seqs, max_model_len
        communicator = self.ctx.mesh["tp"]
        torch_dtype = choose_dtype(dtype, config.dtype, self._device)
        replicas = self.ctx.mesh.group("dp")
        self._num_replicas, self._replica = replicas.size, None if replicas.size == 1 else replicas.index
        self._stage = PipelineStage(self.ctx.mesh["pp"], config.hidden_size, dtype=torch_dtype, device=self._device)
        layers = stage_layers(config.num_layers, self._stage.num_stages, pp_partition)[self._stage.index]
        copies = ExpertSettings(redundant_experts, expert_placements or [], expert_dispatch)
        axis = build_expert_axis(config, self.ctx.mesh, copies, dtype=torch_dtype, device=self._device)
        self._model = build_model(config, directory, communicator, dtype=torch_dtype, device=self._device, layers=layers, expert_axis=axis)
        load_weights(self._model, directory, progress=lambda done, total: self.ctx.report_progress(done, total, "weights"))
        if pack_weights:
            self._model.pack_weights()
        self._mixtures = MixtureLayers(self._model, directory, layers.start)
        if self._stage.is_last:
            self._sampler = Sampler(communicator, config.vocab_size, self._model.vocab_start, self._model.vocab_end)
        self._state: BatchState | None = None
        self._kv_cache: list[KvLayer] = []
        self._speculator: Speculator | None = None
        if speculation is not None:
            chosen = SpeculationConfig.from_plain(speculation)
            proposer = self._build_proposer(chosen, config.vocab_size, dtype, pack_weights)
            policy = build_depth_policy(chosen)
            self._speculator = Speculator(proposer, policy, max_num_seqs, rejects=chosen.verify == "rejection")
        self._token_return: TokenReturn | None = None
        if self._stage.num_stages > 1 and speculation is None:  # else the driver tells which drafts were kept
            self._token_return = TokenReturn(self.ctx.mesh["pp"].cpu, max_num_seqs)

    def _build_proposer(self, speculation: SpeculationConfig, vocab_size: int, dtype: str, pack_weights: bool) -> Proposer:
        return build_proposer(
            speculation.proposer,
            self.ctx,
            vocab_size=vocab_size,
            dtype=dtype,
            max_num_seqs=self._max_num_seqs,
            pack_weights=pack_weights,
            keeps_probabilities=speculation.verify == "rejection",
        )

    @rpc
    def kv_capacity(self) -> dict[str, int]:
        """Return ``bytes_per_block`` of this rank, its draft models' included, and the ``free_bytes`` of its device; ranks on one CPU host
        share the latter."""
        free_bytes = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else _read_available_bytes()
        bytes_per_block = self._model.kv_bytes_per_block(self._block_size)
        if self._speculator is not None and isinstance(self._speculator.proposer, DraftProposer):
            bytes_per_block += self._speculator.proposer.kv_bytes_per_block(self._block_size)
        return {"bytes_per_block": bytes_per_block, "free_bytes": free_bytes}

    @rpc
    def describe_processor(self) -> str:
        """As ``processor.describe_processor``, of this rank's device."""
        return describe_processor(self._device)

    @rpc
    def take_expert_loads(self) -> list[list[int]]:
        """As ``MixtureLayers.take_loads``."""
        return self._mixtures.take_loads()

    @rpc
    def stage_experts(self, layer: int, placement: list[int]) -> None:
        """As ``MixtureLayers.stage``."""
        self._mixtures.stage(layer, placement)

    @rpc
    def change_experts(self, layer: int) -> None:
        """As ``MixtureLayers.change``."""
        self._mixtures.change(layer)

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
            if self._speculator is not None and isinstance(self._speculator.proposer, DraftProposer):
                self._speculator.proposer.allocate_kv_cache(num_blocks, self._block_size)
        self._state = BatchState(
            self._max_num_seqs, self._max_model_len, self._block_size, num_blocks, may_be_full=self._speculator is not None
        )

    @torch.inference_mode()
    def step(self, inputs: bytes | memoryview | list[Any]) -> list[object]:
        """Apply a packed ``BatchStep``, compute its rows and sample those that reach the end of their known tokens.

        Args:
            inputs: the batch step; with data-parallel replicas [how many tokens each of them computes, the batch step of each, None for
                those that have nothing to do].

        Returns:
            [int32 [R] tokens in the order of the sampled rows, their log-probabilities as in ``SampledTokens``], on the last stage; no
            tokens on the others. A step without rows computes nothing and enters no collective of its own. With speculation further uint8
            [rows] tokens of each decode slot or chunk that ends a prompt and uint8 [rows] drafts of each, both None where no drafts were
            asked for and each has one token, and [drafts asked for, nanoseconds that proposing took, those of all the rest]. A sequence
            that had all its tokens has 0 of both.

        Raises:
            BadFrameError: the bytes are no batch step, or name slots or blocks that do not exist.
            InternalError: the step contradicts the steps before it.
        """
        if self._state is None:
            raise InternalError("a step came before allocate_kv_cache")
        own = self._own_part(inputs)
        if own is None:
            return self._serve_experts()
        if self._speculator is not None:
            return self._step_with_drafts(self._state, self._speculator, own)
        with self.ctx.trace.span("build inputs"):
            step = decode_batch_step(own)
            rows = self._state.apply(step)
        if self._token_return is not None:
            self._token_return.take(self._state, step.adds, rows.slots)
        return self._step_plainly(self._state, rows)

    def _step_plainly(self, state: BatchState, rows: StepRows) -> list[object]:
        """Compute rows without drafts."""
        if not len(rows.slots):
            return self._serve_experts()
        hidden, inputs = self._forward(state, rows)
        if hidden is None:
            if self._token_return is not None:
                self._token_return.append_sampled(state, inputs.sampled_slots, None)
            return [_NO_TOKENS, None]
        with self.ctx.trace.span("sample"):
            sampled = self._sample(state, hidden, inputs)
        return [sampled.token_ids, sampled.logprobs]

    def _step_with_drafts(self, state: BatchState, speculator: Speculator, own: bytes | memoryview) -> list[object]:
        """Compute a step whose decode rows may hold drafts."""
        began_ns = time.perf_counter_ns()
        with self.ctx.trace.span("propose"):
            step = decode_batch_step(own)
            scheduled = state.apply(step)
            rows = speculator.extend(step, state, scheduled)
        proposed_ns = time.perf_counter_ns()
        if rows is scheduled:
            answer = [*self._step_plainly(state, rows), None, None]
        else:
            answer = self._verify(state, speculator, scheduled, rows)
        return [*answer, [speculator.depth, proposed_ns - began_ns, time.perf_counter_ns() - proposed_ns]]

    def _verify(self, state: BatchState, speculator: Speculator, scheduled: StepRows, rows: StepRows) -> list[object]:
        """Compute ``rows``, which are ``scheduled`` with drafts and without sequences that are full, and keep what agrees."""
        answer: list[object] = [_NO_TOKENS, None]
        verdict = None
        if not len(rows.slots):
            self._serve_experts()
        else:
            hidden, inputs = self._forward(state, rows)
            with self.ctx.trace.span("verify"):
                if hidden is not None and len(inputs.sampled_slots):
                    logits = self._compute_logits(hidden, inputs)
                    sampled, verdict = speculator.verify(state, rows, inputs, logits, self._sampler, is_told=self._stage.num_stages > 1)
                    answer = [sampled.token_ids, sampled.logprobs]
        return [*answer, *speculator.report(scheduled, verdict)]

    def _forward(self, state: BatchState, rows: StepRows) -> tuple[Tensor | None, StepInputs]:
        """Compute rows on this rank's stage; returns hidden states [T, D] on the last one, and hands them on elsewhere."""
        span = self.ctx.trace.span
        with span("build inputs"):
            inputs = build_inputs(state, rows, self._device)
        before = self._stage.receive(len(inputs.token_ids))
        with span("forward"):
            hidden = self._model.forward(inputs.token_ids, inputs.attention, self._kv_cache, before)
        state.mark_computed(rows)
        if self._stage.is_last:
            return hidden, inputs
        self._stage.send(hidden)
        return None, inputs

    def _serve_experts(self) -> list[object]:
        """Compute nothing here, but for other replicas what they need of this one's experts."""
        if self._model.expert_axis.is_lockstep:
            self._model.serve_experts()
        return [_NO_TOKENS, None]

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
        sampled = self._sampler.sample(self._compute_logits(hidden, inputs), state, slots, inputs.sampled_places)
        if self._token_return is not None:
            self._token_return.append_sampled(state, slots, sampled.token_ids)
        elif self._stage.num_stages == 1:  # else no other stage knows them, and all are told
            state.append_sampled(slots, sampled.token_ids)
        return sampled

    def _compute_logits(self, hidden: Tensor, inputs: StepInputs) -> Tensor:
        if len(inputs.sampled_slots) < len(hidden):
            hidden = hidden.index_select(0, inputs.sampled_rows)
        return self._model.compute_logits(hidden)


def _read_available_bytes() -> int:
    """Return what the kernel says can be allocated without swapping."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts in KiB
    raise InternalError(f"{_MEMINFO} has no line MemAvailable; give the engine num_blocks, so that it need not ask")
