"""From what the user asked for to a rank's proposers and policy."""

from __future__ import annotations

from pathlib import Path

from ...model_config import ModelConfig, read_model_config
from ...models.llama import LlamaModel
from ...models.loading import load_weights
from ...speculation_config import DraftConfig, NgramConfig
from ...topology import AxisGroup
from ..communicators.solo import SoloCommunicator
from ..context import WorkerContext
from ..dtypes import choose_dtype
from ..sampler import Sampler
from .draft_model import DraftProposer
from .ngram import NgramProposer
from .proposer import Proposer

_LEAST_PACKED = 1 << 15  # numbers of a layer's largest weight: to call a packed product takes 10 us, and a plain one of few numbers 2


def build_proposer(
    config: DraftConfig | NgramConfig,
    context: WorkerContext,
    *,
    vocab_size: int,
    dtype: str,
    max_num_seqs: int,
    pack_weights: bool,
    keeps_probabilities: bool,
) -> Proposer:
    """Return a proposer with those within it, the weights of draft models loaded.

    Args:
        config: of the proposer.
        context: of the worker; a draft whose tp is not 1 shares its tp axis.
        vocab_size: the target's.
        dtype: of the drafts, as in ``EngineConfig``.
        max_num_seqs, pack_weights: as in ``EngineConfig``.
        keeps_probabilities: for rejection sampling.

    Raises:
        CheckpointError, TopologyError: as for the target.
    """
    if isinstance(config, NgramConfig):
        return NgramProposer(config.k, config.min_n, config.max_n)
    inner = None
    if config.inner is not None:
        inner = build_proposer(
            config.inner,
            context,
            vocab_size=vocab_size,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            pack_weights=pack_weights,
            keeps_probabilities=False,  # its drafts are compared with the outer draft's own tokens
        )
    directory = Path(config.model)
    draft = read_model_config(directory)
    alone = AxisGroup("tp", (context.rank,), 0)
    communicator = context.mesh["tp"] if config.tp > 1 else SoloCommunicator(alone, device=context.device)
    device = communicator.device
    model = LlamaModel(draft, communicator, dtype=choose_dtype(dtype, draft.dtype, device), device=device)
    load_weights(model, directory, progress=lambda done, total: context.report_progress(done, total, "draft weights"))
    if pack_weights and _is_worth_packing(draft):
        model.pack_weights()
    sampler = Sampler(communicator, min(vocab_size, draft.vocab_size), model.vocab_start, model.vocab_end)
    return DraftProposer(
        model,
        sampler,
        k=config.k,
        vocab_size=vocab_size,
        max_num_seqs=max_num_seqs,
        inner=inner,
        keeps_probabilities=keeps_probabilities,
    )


def _is_worth_packing(config: ModelConfig) -> bool:
    """Whether a draft is faster packed. Only for drafts: unpacked, a token may depend on how many others are computed beside it, which
    costs a draft some acceptance at most."""
    return config.hidden_size * 2 * config.intermediate_size > _LEAST_PACKED
