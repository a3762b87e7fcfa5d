"""Every field of the public settings at its limits and beyond them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from zspmd.config import Deadlines, EngineConfig, ParallelConfig, RestartPolicy, SamplingParams
from zspmd.errors import ConfigError, TopologyError


def test_the_world_is_the_product_of_dp_pp_and_tp() -> None:
    assert ParallelConfig().world_size == 1
    assert ParallelConfig(tp=2, pp=3, dp=4, ep=8).world_size == 24


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "ep"])
@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2", None], ids=repr)
def test_an_axis_is_a_whole_number_above_zero(axis: str, size: Any) -> None:
    with pytest.raises(TopologyError, match=f"{axis} is {size!r}; it must be a whole number of at least 1"):
        ParallelConfig(**{axis: size})


@pytest.mark.parametrize(("dp", "tp", "ep"), [(1, 2, 4), (2, 3, 4), (1, 1, 2)])
def test_ep_divides_dp_times_tp(dp: int, tp: int, ep: int) -> None:
    with pytest.raises(TopologyError, match=rf"ep {ep} does not divide dp \* tp = {dp * tp}; choose a divisor"):
        ParallelConfig(dp=dp, tp=tp, ep=ep)


@pytest.mark.parametrize(
    "config", [ParallelConfig(), Deadlines(), EngineConfig(), RestartPolicy(), SamplingParams()], ids=lambda config: type(config).__name__
)
def test_settings_are_frozen(config: Any) -> None:
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Deadlines)])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf], ids=str)
def test_a_deadline_is_above_zero_and_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"deadline {name} is {value!r} s; it must be above 0 and at most 1e\\+06"):
        Deadlines(**{name: value})


@pytest.mark.parametrize(
    "values", [{"beat_s": 5.0, "step_s": 5.0}, {"step_s": 601.0}, {"collective_s": 299.0}], ids=["beat", "step", "collective"]
)
def test_deadlines_nest(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="deadlines must nest as beat_s < step_s <= collective_s; got"):
        Deadlines(**values)


def test_deadlines_may_touch_where_they_nest() -> None:
    assert Deadlines(beat_s=0.1, step_s=1.0, collective_s=1.0).collective_s == 1.0


ENGINE_LIMITS = [
    ("max_num_seqs", 1, 65_535),
    ("max_num_batched_tokens", 1, 1 << 24),
    ("max_model_len", 1, 1 << 24),
    ("block_size", 1, 1024),
    ("num_blocks", 2, 1 << 31),
    ("window", 1, 64),
    ("max_waiting", 1, 1 << 31),
]


@pytest.mark.parametrize(("name", "low", "high"), ENGINE_LIMITS, ids=[row[0] for row in ENGINE_LIMITS])
def test_engine_limits(name: str, low: int, high: int) -> None:
    room: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 1 << 24}
    for value in (low, high):
        assert getattr(EngineConfig(**{**room, name: value}), name) == value
    for bad in (low - 1, high + 1, float(low), True, "4"):
        with pytest.raises(ConfigError, match=f"{name} is {bad!r}; it must be a whole number from {low} to {high}"):
            EngineConfig(**{**room, name: bad})


def test_engine_sizes_fit_each_other() -> None:
    EngineConfig(max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(ConfigError, match="max_num_batched_tokens 7 is below max_num_seqs 8"):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)


def test_only_some_engine_limits_may_be_none() -> None:
    assert (EngineConfig().max_model_len, EngineConfig().num_blocks) == (None, None)
    with pytest.raises(ConfigError, match="window is None"):
        EngineConfig(window=None)  # type: ignore[arg-type]  # the very mistake


@pytest.mark.parametrize("partition", ["32", 3, (3, 2.0), (True, 2)], ids=["text", "number", "float", "bool"])
def test_a_pipeline_partition_is_whole_numbers(partition: object) -> None:
    assert EngineConfig(pp_partition=(3, 2)).pp_partition == (3, 2)
    with pytest.raises(ConfigError, match=r"pp_partition is .*; give the layers of each stage"):
        EngineConfig(pp_partition=partition)  # type: ignore[arg-type]  # the very mistake


def test_the_dtype_is_a_known_one() -> None:
    assert EngineConfig(dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype is 'int4'; choose one of auto, float32, bfloat16, float16"):
        EngineConfig(dtype="int4")


SAMPLING_LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [1, 1 << 24], [0, -1, (1 << 24) + 1, 1.5, True, None]),
    ("min_tokens", [0, 16], [-1, 17, True]),
    ("temperature", [0, 0.0, 100.0], [-0.1, 100.1, math.nan, math.inf, "1", True, None]),
    ("top_k", [0, 1 << 24], [-1, 1.0, True]),
    ("top_p", [1e-9, 1, 1.0], [0, 0.0, 1.1, math.nan]),
    ("min_p", [0, 1.0], [-0.1, 1.1, math.nan]),
    ("seed", [0, (1 << 63) - 1, None], [-1, 1 << 63, 1.0, True]),
    ("logprobs", [0, 20, None], [-1, 21, True]),
    ("repetition_penalty", [0.1, 100], [0, -1.0, 101, math.nan]),
    ("presence_penalty", [-2, 2.0], [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2, 2.0], [-2.1, 2.1, math.nan]),
    ("n", [1, 128], [0, 129, True]),
]


@pytest.mark.parametrize(("name", "good", "bad"), SAMPLING_LIMITS, ids=[row[0] for row in SAMPLING_LIMITS])
def test_sampling_limits(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"{name} is {value!r}; it must be a "):
            SamplingParams(**{name: value})


def test_stops_become_tuples() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop=("a",)))


@pytest.mark.parametrize("stop", ["", ["a", ""], [5]], ids=repr)
def test_an_empty_stop_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match="each stop must be a text of at least one character"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("token", [-1, 1 << 31, True, 1.0], ids=repr)
def test_a_stop_token_is_a_token_id(token: Any) -> None:
    with pytest.raises(ConfigError, match=r"stop_token_ids is .*: each is a token id"):
        SamplingParams(stop_token_ids=[token])


@pytest.mark.parametrize("value", [-1, 1001, 1.0, True, None], ids=repr)
def test_restarts_are_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"max_restarts is {value!r}; it must be a whole number from 0 to 1000: use 0 for none"):
        RestartPolicy(max_restarts=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1"], ids=repr)
def test_the_window_of_restarts_is_above_zero_and_finite(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"window_s is {value!r}; it must be a number above 0 and at most 1e"):
        RestartPolicy(window_s=value)
