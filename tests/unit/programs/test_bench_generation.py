"""What ``bench engine`` asks of its sides, what it makes of their times, and the models that it writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import BadFrameError, ConfigError
from zspmd.runtime.engine.checkpoint import open_checkpoint
from zspmd.runtime.launch.command.options import LaunchOptions
from zspmd.runtime.programs import bench
from zspmd.runtime.programs.bench.engine_side import RankTimes, poisson_arrivals
from zspmd.runtime.programs.bench.generation import Turn, Workload, turn_from_times, turn_in_step
from zspmd.runtime.programs.bench.random_checkpoint import SIZES, num_parameters, write_random_checkpoint


def test_no_prompt_comes_twice_and_the_same_seed_gives_the_same() -> None:
    work = Workload(batch=3, num_prompt=8, num_output=4, vocab_size=100)
    assert work.prompts(0) == Workload(3, 8, 4, 100).prompts(0)
    prompts = [tuple(prompt) for turn in range(4) for prompt in work.prompts(turn)]
    assert len(set(prompts)) == 12
    assert all(len(prompt) == 8 and 0 <= min(prompt) <= max(prompt) < 100 for prompt in prompts)


def test_rates_and_times_of_a_turn() -> None:
    turn = turn_from_times([[1.0, 1.5, 2.0], [2.0, 3.0, 4.0]], [[7, 8, 9], [1, 2, 3]])
    assert (turn.first_s, turn.last_s, turn.gaps_s) == ([1.0, 2.0], [2.0, 4.0], [0.5, 0.5, 1.0, 1.0])
    assert turn.tokens_per_s == pytest.approx(6 / 4)
    assert turn.decode_tokens_per_s == pytest.approx(4 / 2)  # since both had their first
    assert turn.per_token_s == [0.5, 1.0]
    assert Turn.from_json(json.loads(json.dumps(turn.to_json()))) == turn


def test_a_turn_in_step_has_each_step_once() -> None:
    turn = turn_in_step([1.0, 1.5, 2.5], [[1, 2, 3], [4, 5, 6]])
    assert (turn.first_s, turn.last_s, turn.gaps_s) == ([1.0, 1.0], [2.5, 2.5], [0.5, 1.0])
    assert turn.decode_tokens_per_s == pytest.approx(4 / 1.5)


def test_an_answer_that_is_no_turn_is_told() -> None:
    with pytest.raises(BadFrameError, match="a turn was expected"):
        Turn.from_json({"error": "no"})


def test_the_share_of_time_in_which_a_rank_was_at_no_step() -> None:
    assert RankTimes([0, 100, 300], [100, 100, 100]).idle_share() == pytest.approx(1 / 4)
    assert RankTimes([5], [3]).idle_share() == 0.0


def test_arrivals_are_in_order_and_as_many_as_were_asked_for() -> None:
    times = poisson_arrivals(1000, 50.0, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20.0, rel=0.2)  # the standard deviation is 3 %


def test_a_random_model_is_a_whole_checkpoint(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path / "model", "tiny")
    checkpoint = open_checkpoint(directory, ParallelConfig(), EngineConfig())
    assert (directory / "model.safetensors").stat().st_size == pytest.approx(4 * num_parameters("tiny"), rel=0.01)
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.vocab_size == checkpoint.model.vocab_size == SIZES["tiny"]["vocab_size"]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("Hello, wörld")) == "Hello, wörld"
    again = write_random_checkpoint(tmp_path / "again", "tiny")
    assert (again / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="tiny, 5m, 30m"):
        write_random_checkpoint(tmp_path, "7b")


def test_sizes_are_what_their_names_say() -> None:
    assert num_parameters("5m") == pytest.approx(5e6, rel=0.1)
    assert num_parameters("30m") == pytest.approx(30e6, rel=0.1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["engine", "--batch", "0"], "--batch is 0; it must be from 1"),
        (["engine", "--output-tokens", "1"], "--output-tokens is 1; it must be from 2"),
        (["engine", "--model", "x", "--preset", "5m"], "leave one of them out"),
        (["engine", "--model", "/nowhere"], "no model directory"),
        (["engine", "--rate", "-1"], "--rate is -1.0; it must be above 0"),
        (["start", "--ranks", "0"], "--ranks is 0; it must be from 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(argv: list[str], words: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True)
    with pytest.raises(ConfigError, match=words):
        bench.prepare(parser.parse_args(argv), options)
