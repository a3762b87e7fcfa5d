"""Which way tokens go to the experts of several replicas: arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import ConfigError, TopologyError
from zspmd.expert_dispatch import MIN_SAVED_BYTES, check_dispatch, is_all_to_all
from zspmd.mixture_config import MixtureConfig
from zspmd.model_config import check_expert_parallel
from zspmd.model_sizes import ModelSizes

MIXTURE = MixtureConfig(layers=(0,), num_experts=7, top_k=2, expert_size=8)
SIZES: dict[str, Any] = {
    "architecture": "MixtralForCausalLM",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "dtype": "float32",
    "eos_token_ids": (),
}


@pytest.mark.parametrize("dispatch", ["auto", "gather", "all_to_all"])
def test_a_way_is_asked_for_only_where_replicas_share_experts(dispatch: str) -> None:
    check_dispatch(dispatch, MIXTURE, ParallelConfig(tp=2, dp=2, ep=4))
    for mixture, parallel in ((None, ParallelConfig(dp=2)), (MIXTURE, ParallelConfig(tp=2, ep=2)), (MIXTURE, ParallelConfig(dp=2))):
        if dispatch == "auto":
            check_dispatch(dispatch, mixture, parallel)
        else:
            with pytest.raises(ConfigError, match=f"expert_dispatch is '{dispatch}', and no replicas share experts"):
                check_dispatch(dispatch, mixture, parallel)


def test_some_replicas_of_several_ranks_have_no_axis_to_gather_on() -> None:
    check_dispatch("gather", MIXTURE, ParallelConfig(dp=4, ep=2))
    parallel = ParallelConfig(tp=2, dp=4, ep=4)
    check_dispatch("auto", MIXTURE, parallel)
    with pytest.raises(
        ConfigError, match="expert_dispatch is 'gather', and ep 4 is 2 of 4 replicas of tp 2; choose all_to_all, or ep 8 for"
    ):
        check_dispatch("gather", MIXTURE, parallel)


@pytest.mark.parametrize(
    ("tp", "dp", "works"),
    [
        pytest.param(1, 1, [1], id="alone"),
        pytest.param(4, 1, [1, 4], id="tp 4"),
        pytest.param(1, 4, [1, 2, 4], id="dp 4"),
        pytest.param(2, 6, [1, 2, 4, 6, 12], id="tp 2 x dp 6"),
    ],
)
def test_replicas_that_share_experts_are_groups_of_equal_size(tp: int, dp: int, works: list[int]) -> None:
    config = ModelSizes(**{**SIZES, "mixture": MIXTURE})
    for ep in (count for count in range(1, tp * dp + 1) if tp * dp % count == 0):
        parallel = ParallelConfig(tp=tp, dp=dp, ep=ep)
        if ep in works:
            check_expert_parallel(config, parallel)
        else:
            with pytest.raises(TopologyError, match=f"ep is {ep}, .* with tp {tp} and dp {dp} choose {' or '.join(map(str, works))}"):
                check_expert_parallel(config, parallel)
        if ep > 1:
            with pytest.raises(TopologyError, match=f"ep is {ep}, and the model has no experts: .* choose 1"):
                check_expert_parallel(ModelSizes(**SIZES), parallel)


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="expert_dispatch is 'scatter'; choose one of auto, gather, all_to_all"):
        EngineConfig(expert_dispatch="scatter")


@pytest.mark.parametrize(
    ("num_tokens", "num_ranks", "tp", "top_k", "saved_rows"),
    [
        pytest.param([64] * 4, 4, 1, 2, 2 * 3 * 64 - 2 * 64 * 2 * 3 / 4, id="four-replicas"),
        pytest.param([64, 1, 0, 9], 4, 1, 2, 2 * 3 * 64 - 2 * 64 * 2 * 3 / 4, id="the-longest-counts"),
        pytest.param([65, 65], 4, 2, 2, 2 * 65 - 2 * 33 * 2 * 3 / 4, id="tp-ranks-share-out"),
        pytest.param([512] * 8, 64, 8, 8, 2 * 7 * 512 - 2 * 64 * 8 * 63 / 64, id="large"),
    ],
)
def test_an_all_to_all_must_save_enough(num_tokens: list[int], num_ranks: int, tp: int, top_k: int, saved_rows: float) -> None:
    row_bytes = int(MIN_SAVED_BYTES / saved_rows)
    assert not is_all_to_all(num_tokens, num_ranks=num_ranks, tp=tp, top_k=top_k, row_bytes=row_bytes)
    assert is_all_to_all(num_tokens, num_ranks=num_ranks, tp=tp, top_k=top_k, row_bytes=row_bytes + 1)


def test_nothing_is_saved_where_every_token_goes_everywhere() -> None:
    assert not is_all_to_all([4096] * 4, num_ranks=4, tp=1, top_k=4, row_bytes=1 << 20)
    assert not is_all_to_all([4096] * 2, num_ranks=2, tp=1, top_k=8, row_bytes=1 << 20)
