"""Which ranks must have processors of one kind, and what is said where they have not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.zero_checkpoints import save_zeros

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import ConfigError
from zspmd.runtime.engine.alike_ranks import check_alike, count_alike_ranks
from zspmd.runtime.engine.checkpoint import open_checkpoint
from zspmd.workers.processor import describe_processor

MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("speculation", "layout", "count"),
    [
        pytest.param(None, {"tp": 2, "pp": 2}, 1, id="no-drafts"),
        pytest.param("ngram", {"tp": 2, "pp": 2}, 1, id="n-grams-have-no-arithmetic"),
        pytest.param("draft:{},tp=1", {}, 1, id="one-rank"),
        pytest.param("draft:{},tp=1", {"dp": 2}, 1, id="replicas-of-one-rank"),
        pytest.param("draft:{},tp=1", {"tp": 2, "dp": 2}, 2, id="a-draft-on-each-rank"),
        pytest.param("draft:{},tp=2", {"tp": 2, "dp": 2}, 1, id="a-draft-over-both"),
        pytest.param("draft:{},tp=2", {"tp": 2, "pp": 2}, 4, id="a-draft-on-each-stage"),
        pytest.param("draft:{},tp=2+draft:{},tp=1", {"tp": 2}, 2, id="a-draft-of-the-draft-on-each-rank"),
    ],
)
def test_ranks_that_hold_copies_of_a_draft_must_be_alike(
    tmp_path: Path, speculation: str | None, layout: dict[str, int], count: int
) -> None:
    target = save_zeros(tmp_path / "target", num_hidden_layers=2)
    draft = save_zeros(tmp_path / "draft", hidden_size=4, num_attention_heads=2, num_key_value_heads=1)
    chosen = None if speculation is None else speculation.replace("{}", str(draft))
    parallel = ParallelConfig(**layout)
    assert count_alike_ranks(open_checkpoint(target, parallel, EngineConfig(speculation=chosen)), parallel) == count


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        pytest.param({"pp": 2}, 1, id="stages-have-routers-of-their-own"),
        pytest.param({"dp": 2}, 1, id="replicas-have-all-experts"),
        pytest.param({"tp": 2, "pp": 2}, 2, id="tp-ranks-have-the-same-tokens"),
        pytest.param({"tp": 2, "dp": 2, "ep": 2}, 2, id="experts-within-each-replica"),
        pytest.param({"tp": 2, "dp": 2, "ep": 4}, 4, id="experts-over-replicas"),
    ],
)
def test_ranks_that_route_the_same_tokens_must_be_alike(tmp_path: Path, layout: dict[str, int], count: int) -> None:
    parallel = ParallelConfig(**layout)
    checkpoint = open_checkpoint(save_zeros(tmp_path, num_hidden_layers=2, **MIXTURE), parallel, EngineConfig())
    assert count_alike_ranks(checkpoint, parallel) == count


def test_ranks_of_one_kind_and_replicas_of_different_kinds_are_taken() -> None:
    check_alike(["a", "a", "b", "b"], 2)
    check_alike(["a", "b", "c"], 1)


def test_the_first_rank_that_differs_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rank 2 computes on 'b' and rank 3 on 'c', .* ranks 2 to 3 .* take hosts of one kind"):
        check_alike(["a", "a", "b", "c"], 2)


def test_the_description_tells_what_sums_depend_on() -> None:
    """Products of five rows have other last bits with two threads than with one."""
    threads = torch.get_num_threads()
    told = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            told.append(describe_processor(torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
    assert told[0].endswith(f"{torch.backends.cpu.get_cpu_capability()}, threads: 1")
    assert told[0] != told[1]
