"""What the driver learns of the draft models that speculation names, before any process starts.

A draft proposes token ids, so it must mean by an id what the target means. Where both have a ``tokenizer.json`` the two must give every
token the same id, and ``vocab_size`` may differ by padding only: ids above the largest token's. Otherwise all that is known are the two
sizes, and they must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...config import ParallelConfig
from ...config_fields import shown
from ...errors import CheckpointError, TopologyError
from ...model_config import ModelConfig, check_checkpoint, check_tensor_parallel, read_model_config, shares_experts
from ...model_sizes import ModelSizes
from ...safetensors_files import read_small_file
from ...speculation_config import DraftConfig
from .tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

DEMO_DRAFT = Path(__file__).parents[2] / "models" / "demo" / "draft"
_NUM_NAMED = 3  # tokens that an error shows


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft's directory that was found whole, and fits its target; ``tp`` is 1 or the target's."""

    directory: Path
    model: ModelConfig
    tp: int


def find_draft(model: str) -> Path:
    """Return the directory that ``DraftConfig.model`` names; "demo" is the draft of the demo model."""
    return DEMO_DRAFT if model == "demo" else Path(model).expanduser().resolve()


def open_draft(
    config: DraftConfig, directory: Path, model: ModelSizes, tokenizer: Tokenizer | None, parallel: ParallelConfig
) -> DraftCheckpoint:
    """Read and check everything about a draft that can be known without torch.

    Args:
        config: the draft.
        directory, model, tokenizer: the target's.
        parallel: the target's layout.

    Raises:
        CheckpointError: the draft's directory, a file, a tensor or the architecture; or another vocabulary than the target's, with the
            first tokens that differ.
        TopologyError: a ``tp`` that is neither 1 nor the target's, or that does not fit the draft; experts that replicas would share.
    """
    draft_directory = find_draft(config.model)
    draft = read_model_config(draft_directory)
    _check_layout(config, draft_directory, draft, parallel)
    check_checkpoint(draft_directory, draft)
    _check_vocabulary(draft_directory, draft, directory, model, tokenizer)
    return DraftCheckpoint(draft_directory, draft, config.tp)


def _check_layout(config: DraftConfig, directory: Path, draft: ModelConfig, parallel: ParallelConfig) -> None:
    if config.tp not in (1, parallel.tp):
        choices = " or ".join(map(str, dict.fromkeys((1, parallel.tp))))
        raise TopologyError(
            f"tp of the draft {directory} is {config.tp}; it is 1, where each rank runs all of it, or the target's {parallel.tp}: "
            f"choose {choices}"
        )
    try:
        check_tensor_parallel(draft, config.tp)
    except TopologyError as error:
        raise TopologyError(f"the draft {directory} cannot be shared by {config.tp} ranks, give it tp 1: {error}") from None
    if shares_experts(draft, parallel):
        raise TopologyError(
            f"the draft {directory} has experts, which with ep {parallel.ep} replicas would share, and replicas draft each on their own: "
            f"choose a draft without experts, or ep {parallel.tp}"
        )


def _check_vocabulary(draft_directory: Path, draft: ModelConfig, directory: Path, model: ModelSizes, tokenizer: Tokenizer | None) -> None:
    sizes = f"vocab_size is {draft.vocab_size} in {draft_directory / 'config.json'} and {model.vocab_size} in {directory / 'config.json'}"
    file = draft_directory / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        if draft.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{sizes}; without a tokenizer.json in both they must be equal: choose a draft with the target's vocabulary"
            )
        return
    _check_tokens(draft_directory, directory, tokenizer)
    if draft.vocab_size == model.vocab_size:
        return
    largest = max(tokenizer.vocabulary().values(), default=-1)
    if min(draft.vocab_size, model.vocab_size) <= largest:
        raise CheckpointError(
            f"{sizes}, and tokens have ids up to {largest}; the sizes may differ above it only: choose a draft with the target's vocabulary"
        )


def _check_tokens(draft_directory: Path, directory: Path, tokenizer: Tokenizer) -> None:
    """Equal files are the rule, and cost no parsing, which takes a second for 150,000 tokens."""
    draft_file, file = draft_directory / "tokenizer.json", directory / "tokenizer.json"
    if read_small_file(draft_file, max_bytes=MAX_TOKENIZER_BYTES) == read_small_file(file, max_bytes=MAX_TOKENIZER_BYTES):
        return
    drafts, vocabulary = Tokenizer.from_directory(draft_directory).vocabulary(), tokenizer.vocabulary()
    tokens = {token for token, _ in drafts.items() ^ vocabulary.items()}
    if not tokens:
        return
    nowhere = 1 << 32
    in_order = sorted(tokens, key=lambda token: (min(drafts.get(token, nowhere), vocabulary.get(token, nowhere)), token))
    named = (f"{shown(token)} has {_id(drafts.get(token))} there and {_id(vocabulary.get(token))} here" for token in in_order[:_NUM_NAMED])
    more = f" and {len(tokens) - _NUM_NAMED} more" if len(tokens) > _NUM_NAMED else ""
    raise CheckpointError(
        f"the draft's {draft_file} has another vocabulary than {file}: {', '.join(named)}{more}; "
        "a draft must give every token the target's id, choose another"
    )


def _id(token_id: int | None) -> str:
    return "no id" if token_id is None else f"id {token_id}"
