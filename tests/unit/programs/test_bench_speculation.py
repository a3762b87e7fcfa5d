"""What benchmarks of speculation ask of engines, what they make of the turns, and drafts that guess nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from zspmd.config import ParallelConfig
from zspmd.errors import ConfigError
from zspmd.model_config import read_model_config
from zspmd.runtime.engine.draft_checkpoint import DEMO_DRAFT
from zspmd.runtime.launch.cli import LaunchOptions
from zspmd.runtime.programs.bench import engine, speculation
from zspmd.runtime.programs.bench.output import add_output_options
from zspmd.runtime.programs.bench.report import Report
from zspmd.runtime.programs.bench.rows import Row, Value
from zspmd.runtime.programs.bench.speculation_prompts import KINDS, SpeculationPrompts
from zspmd.runtime.programs.bench.useless_draft import write_useless_draft
from zspmd.safetensors_files import find_tensors, read_safetensors_header

OPTIONS = LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True)


def prepare(*argv: str) -> str:
    """Check the options of ``bench engine``."""
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    add_output_options(parser, engine.TURNS)
    return engine.prepare(parser.parse_args(argv), OPTIONS)


def judged(acceptance: str, *, off: float, fixed: float, goodput: float) -> Report:
    report = Report("speculation")
    case: dict[str, Value] = {"acceptance": acceptance, "batch": 8}
    rates = {speculation.OFF: off, speculation.FIXED: fixed, speculation.GOODPUT: goodput}
    speculation.judge(report, {side: Row(case, side, "tokens/s", [[rate]]) for side, rate in rates.items()})
    return report


@pytest.mark.parametrize(
    ("acceptance", "off", "fixed", "goodput", "told"),
    [
        pytest.param("high", 100.0, 200.0, 181.0, "met: goodput has 0.91 of fixed, the better (aim 0.9)", id="close-to-fixed"),
        pytest.param("high", 100.0, 200.0, 179.0, "missed: goodput has 0.90 of fixed, the better (aim 0.9)", id="behind-fixed"),
        pytest.param("low", 100.0, 30.0, 96.0, "met: goodput has 0.96 of off, the better (aim 0.9), 0.96 of none (aim 0.95)", id="off"),
        pytest.param("low", 100.0, 30.0, 92.0, "missed: goodput has 0.92 of off, the better (aim 0.9), 0.92 of none", id="dear-trials"),
    ],
)
def test_the_policy_is_held_against_the_better_of_the_others(acceptance: str, off: float, fixed: float, goodput: float, told: str) -> None:
    (note,) = judged(acceptance, off=off, fixed=fixed, goodput=goodput).notes
    assert note.startswith(f"acceptance {acceptance}, batch 8: {told}")


@pytest.mark.parametrize("kind", KINDS)
def test_turns_have_prompts_of_their_own_that_do_not_change(kind: str) -> None:
    drawn = SpeculationPrompts(kind, 6, 10, 100)
    assert drawn.draw(0, 3) == drawn.draw(0, 3)
    assert drawn.draw(0, 3) != drawn.draw(1, 3)
    assert len(drawn.draw(1, 7)) == 7


def test_prompts_of_random_tokens_are_as_long_as_was_asked_for() -> None:
    drawn = SpeculationPrompts("random", 6, 10, 100)
    assert [len(prompt) for prompt in drawn.draw(0, 3)] == [6, 6, 6]
    assert (drawn.num_positions, drawn.params.max_tokens, drawn.params.ignore_eos) == (16, 10, True)


def test_a_useless_draft_differs_in_nothing_but_its_weights(tmp_path: Path) -> None:
    written = write_useless_draft(tmp_path / "draft", DEMO_DRAFT)
    assert read_model_config(written) == read_model_config(DEMO_DRAFT)
    shapes = [
        {name: tensor.shape for file in set(find_tensors(model).values()) for name, tensor in read_safetensors_header(file).items()}
        for model in (written, DEMO_DRAFT)
    ]
    assert shapes[0] == shapes[1]
    assert (written / "tokenizer.json").read_bytes() == (DEMO_DRAFT / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        pytest.param(["--prompts", "sums"], "--prompts sums is for --speculate alone", id="prompts-alone"),
        pytest.param(["--speculate", "ngram", "--rate", "2"], "--rate and --speculate are both given", id="rate"),
        pytest.param(["--speculate", "ngram", "--prompts", "lines"], "only the demo model knows", id="texts-of-another-model"),
        pytest.param(["--speculate", "ngram:k=99"], "99", id="depth"),
        pytest.param(["--speculate-policy", "fixed"], "nothing proposes tokens", id="policy-alone"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(*argv)


def test_the_demo_model_continues_texts_and_others_random_tokens() -> None:
    assert prepare("--preset", "demo", "--speculate", "draft:demo", "--prompts", "lines", "random").startswith("demo, tp 1")
    assert prepare("--speculate", "ngram").startswith("5m, tp 1")
