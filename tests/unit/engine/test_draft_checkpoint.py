"""Drafts are checked against their target before a process starts: files, layout and vocabulary; no torch here."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from support.zero_checkpoints import save_zeros
from tokenizers import models

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import CheckpointError, TopologyError
from zspmd.runtime.engine.checkpoint import DEMO_MODEL, Checkpoint, open_checkpoint
from zspmd.speculation_config import DraftConfig, NgramConfig, SpeculationConfig

WORDS = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_zeros(tmp_path / "target")


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return save_zeros(tmp_path / "draft", hidden_size=4, num_attention_heads=2, num_key_value_heads=1)


def save_words(directory: Path, words: dict[str, int], special: tuple[str, ...] = ()) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(directory / "tokenizer.json"))


def opened(target: Path, draft: Path | str, parallel: ParallelConfig | None = None, *, tp: int = 1) -> Checkpoint:
    speculation = SpeculationConfig(DraftConfig(str(draft), tp=tp, inner=NgramConfig(k=2)))
    return open_checkpoint(target, parallel or ParallelConfig(), EngineConfig(speculation=speculation))


def test_without_drafts_none_is_opened(target: Path) -> None:
    assert open_checkpoint(target, ParallelConfig(), EngineConfig()).speculation is None
    checkpoint = open_checkpoint(target, ParallelConfig(), EngineConfig(speculation="ngram:k=3"))
    assert (checkpoint.speculation, checkpoint.drafts) == (SpeculationConfig(NgramConfig(k=3)), ())


def test_drafts_are_opened_from_the_outermost_on(target: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_zeros(tmp_path / "smallest", hidden_size=2, num_attention_heads=1, num_key_value_heads=1)
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(speculation="draft:draft,tp=2+draft:./smallest,k=2")
    checkpoint = open_checkpoint(target, ParallelConfig(tp=2), config)
    assert [(opened.directory, opened.tp, opened.model.hidden_size) for opened in checkpoint.drafts] == [
        (draft, 2, 4),
        (tmp_path / "smallest", 1, 2),
    ]
    assert checkpoint.speculation is not None
    assert [config.model for config in checkpoint.speculation.drafts] == [str(draft), str(tmp_path / "smallest")]


def test_demo_is_the_name_of_the_draft_that_ships_with_the_package() -> None:
    (draft,) = opened(DEMO_MODEL, "demo").drafts
    assert draft.directory == DEMO_MODEL / "draft"
    assert draft.model.vocab_size == 384


@pytest.mark.parametrize("positions", [16, 4096])
def test_its_context_may_be_shorter_or_longer(target: Path, tmp_path: Path, positions: int) -> None:
    checkpoint = opened(target, save_zeros(tmp_path / "other", max_position_embeddings=positions))
    assert checkpoint.max_model_len == 64
    assert checkpoint.drafts[0].model.max_position_embeddings == positions


def test_a_directory_that_is_not_there_or_not_whole(target: Path, draft: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory /nowhere; give a local directory"):
        opened(target, "/nowhere")
    (draft / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(draft)):
        opened(target, draft)


@pytest.mark.parametrize(
    ("parallel", "tp", "choices"),
    [
        pytest.param(ParallelConfig(tp=4), 2, "or the target's 4: choose 1 or 4", id="between"),
        pytest.param(ParallelConfig(tp=2), 4, "or the target's 2: choose 1 or 2", id="more"),
        pytest.param(ParallelConfig(), 2, "or the target's 1: choose 1$", id="target alone"),
    ],
)
def test_its_tp_is_one_or_the_targets(target: Path, draft: Path, parallel: ParallelConfig, tp: int, choices: str) -> None:
    with pytest.raises(TopologyError, match=f"tp of the draft {draft} is {tp}; it is 1, where each rank runs all of it, {choices}"):
        opened(target, draft, parallel, tp=tp)


def test_its_tp_fits_its_heads(target: Path, draft: Path) -> None:
    assert opened(target, draft, ParallelConfig(tp=4), tp=1).drafts[0].tp == 1
    with pytest.raises(TopologyError, match=f"the draft {draft} cannot be shared by 4 ranks, give it tp 1: tp 4 does not fit 2 heads, "):
        opened(target, draft, ParallelConfig(tp=4), tp=4)


def test_its_experts_are_not_shared_by_replicas(tmp_path: Path, draft: Path) -> None:
    target, mixed = save_zeros(tmp_path / "target", **MIXTURE), save_zeros(tmp_path / "mixed", **MIXTURE)
    for parallel in (ParallelConfig(dp=2), ParallelConfig(tp=2, ep=2)):
        assert opened(target, mixed, parallel).drafts[0].model.mixture is not None
    shared = ParallelConfig(dp=2, tp=2, ep=4)
    assert opened(target, draft, shared).drafts[0].model.mixture is None
    with pytest.raises(TopologyError, match=f"the draft {mixed} has experts, which with ep 4 replicas would share, .* or ep 2"):
        opened(target, mixed, shared)


@pytest.mark.parametrize("with_tokenizer", [(), ("target",), ("draft",)], ids=["in neither", "in the target", "in the draft"])
def test_without_two_tokenizers_the_sizes_are_equal(target: Path, draft: Path, tmp_path: Path, with_tokenizer: tuple[str, ...]) -> None:
    other = save_zeros(tmp_path / "other" / "draft", vocab_size=12)
    for directory in (target, draft, other):
        if directory.name in with_tokenizer:
            save_words(directory, WORDS)
    assert len(opened(target, draft).drafts) == 1
    message = f"vocab_size is 12 in {other}/config.json and 11 in {target}/config.json; without a tokenizer.json in both they must be equal"
    with pytest.raises(CheckpointError, match=message):
        opened(target, other)


def test_equal_vocabularies_may_stand_in_unequal_files(target: Path, draft: Path) -> None:
    save_words(target, WORDS)
    save_words(draft, {word: WORDS[word] for word in reversed(WORDS)}, special=("a",))
    assert (target / "tokenizer.json").read_bytes() != (draft / "tokenizer.json").read_bytes()
    assert len(opened(target, draft).drafts) == 1


@pytest.mark.parametrize(
    ("words", "special", "named"),
    [
        pytest.param(
            {**WORDS, "b": 3, "c": 2}, (), "'b' has id 3 there and id 2 here, 'c' has id 2 there and id 3 here; a draft", id="swapped"
        ),
        pytest.param({**WORDS, "e": 5}, (), "'e' has id 5 there and no id here; a draft", id="more in the draft"),
        pytest.param(
            {"<unk>": 0, "a": 1}, (), "'b' has no id there and id 2 here, 'c' .*, 'd' has no id there and id 4 here; a", id="fewer"
        ),
        pytest.param(WORDS, ("<s>",), "'<s>' has id 5 there and no id here; a draft", id="an added token"),
        pytest.param(
            {"<unk>": 0, "w": 1, "x": 2, "y": 3, "z": 4},
            (),
            "'a' has no id there and id 1 here, 'w' has id 1 there and no id here, 'b' .* here and 5 more; a draft must give",
            id="all",
        ),
    ],
)
def test_another_vocabulary_is_refused_by_the_first_tokens_that_differ(
    target: Path, draft: Path, words: dict[str, int], special: tuple[str, ...], named: str
) -> None:
    save_words(target, WORDS)
    save_words(draft, words, special)
    message = f"the draft's {draft}/tokenizer.json has another vocabulary than {target}/tokenizer.json: {named}"
    with pytest.raises(CheckpointError, match=message):
        opened(target, draft)


@pytest.mark.parametrize(("vocab_size", "fits"), [(5, True), (16, True), (4, False)], ids=["least", "padded", "too small"])
def test_sizes_may_differ_by_padding(target: Path, tmp_path: Path, vocab_size: int, fits: bool) -> None:
    other = save_zeros(tmp_path / "other", vocab_size=vocab_size)
    for directory in (target, other):
        save_words(directory, WORDS)
    if fits:
        assert opened(target, other).drafts[0].model.vocab_size == vocab_size
        return
    with pytest.raises(CheckpointError, match=r"vocab_size is 4 in .* and 11 in .*, and tokens have ids up to 4; .* differ above it only"):
        opened(target, other)


def test_a_token_without_end_is_cut(target: Path, draft: Path) -> None:
    save_words(target, WORDS)
    save_words(draft, {**WORDS, "x" * 100_000: 5})
    with pytest.raises(CheckpointError) as raised:
        opened(target, draft)
    assert len(str(raised.value)) < 1000


def test_a_tokenizer_that_cannot_be_read(target: Path, draft: Path) -> None:
    save_words(target, WORDS)
    (draft / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{draft}/tokenizer.json cannot be read"):
        opened(target, draft)
