"""What ``--dry-run`` says that a rank holds is what the model on that rank has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import FAMILIES, save_checkpoint

from zspmd.config import ParallelConfig
from zspmd.errors import TopologyError
from zspmd.expert_placement import num_expert_ranks
from zspmd.model_config import read_model_config, shares_experts
from zspmd.models.expert_axis import ExpertAxis
from zspmd.models.experts import Experts
from zspmd.models.llama import LlamaModel
from zspmd.runtime.engine.rank_shares import RankShare, choose_dtype_name, share_draft, share_model
from zspmd.topology import axis_group

META = torch.device("meta")
LAYOUTS = [
    pytest.param(ParallelConfig(), None, id="alone"),
    pytest.param(ParallelConfig(tp=4, pp=2), None, id="tp4-pp2"),
    pytest.param(ParallelConfig(tp=2, pp=2, dp=2, ep=4), (3, 1), id="tp2-pp2-dp2-ep4"),
    pytest.param(ParallelConfig(pp=4), None, id="pp4"),
    pytest.param(ParallelConfig(tp=2, dp=4, ep=4), None, id="tp2-dp4-ep4"),
]


def axis(parallel: ParallelConfig, name: str, rank: int) -> Any:
    group = axis_group(parallel, name, rank)
    return SimpleNamespace(rank=group.index, size=group.size)


@pytest.mark.parametrize(("parallel", "partition"), LAYOUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_share_is_what_the_model_of_that_rank_has(
    family: str, parallel: ParallelConfig, partition: tuple[int, ...] | None, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, family, num_hidden_layers=4)
    config = read_model_config(tmp_path)
    if config.mixture is None:
        parallel = ParallelConfig(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp)
    num_redundant = 0 if config.mixture is None else min(3, config.mixture.num_experts * (num_expert_ranks(parallel) - 1))
    shares = share_model(config, parallel, partition, ["bfloat16"] * parallel.world_size, num_redundant=num_redundant)
    assert [share.rank for share in shares] == list(range(parallel.world_size))
    for share in shares:
        ranks, exchange = axis(parallel, "tp", share.rank), axis(parallel, "ep", share.rank)
        experts = ExpertAxis(ranks, exchange if shares_experts(config, parallel) else None, num_redundant=num_redundant)
        model = LlamaModel(config, ranks, dtype=torch.bfloat16, device=META, layers=share.layers, expert_axis=experts)
        assert share.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
        attention: Any = model.layers[0].attention
        if config.latent is None:
            assert [part.start // config.head_dim for part in attention.qkv.parts] == [share.heads.start, *[share.kv_heads.start] * 2]
        else:
            assert attention.expansion.rows.start // len(attention.expansion.weight) * attention.num_heads == share.heads.start
        assert (len(share.heads), len(share.kv_heads)) == (attention.num_heads, model.num_kv_heads)
        placed = {module.placed for module in model.modules() if isinstance(module, Experts)}
        assert placed == (set() if share.experts is None else {share.experts})
        table = model.embedding or model.head
        assert (share.vocabulary_rows is None) == (table is None)
        if table is not None and share.vocabulary_rows is not None:
            assert (share.vocabulary_rows.start, len(share.vocabulary_rows)) == (table.start, table.num_tokens)


@pytest.mark.parametrize("draft_tp", [1, 2])
@pytest.mark.parametrize("family", ["tied", "qwen3-moe"])
def test_each_rank_of_the_target_has_all_layers_of_a_draft(family: str, draft_tp: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, family)
    draft = read_model_config(tmp_path)
    parallel, dtypes = ParallelConfig(tp=2, pp=2, dp=2), ["float32", "bfloat16"] * 3 + ["float32", None]
    sizes = share_draft(draft, draft_tp, parallel, dtypes)
    for rank, dtype in enumerate(dtypes):
        if dtype is None:
            assert sizes[rank] is None
            continue
        place = SimpleNamespace(rank=axis(parallel, "tp", rank).rank if draft_tp > 1 else 0, size=draft_tp)
        model = LlamaModel(draft, place, dtype=getattr(torch, dtype), device=META, layers=range(draft.num_layers))
        assert sizes[rank] == sum(parameter.nbytes for parameter in model.parameters())


def test_partitions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(TopologyError, match=r"the pipeline partition 2, 1 has 2 stages and 3 layers"):
        share_model(read_model_config(tmp_path), ParallelConfig(pp=2), (2, 1), [None, None])


def test_a_row_has_ranges_as_people_write_them() -> None:
    share = RankShare(0, 0, 1, range(2, 4), range(8), range(3, 4), (4, 5, 6, 0), range(0), None)
    assert list(share.to_row().values()) == [0, 0, 1, "2-3", "0-7", "3", "4-6, 0", None, None]
    assert RankShare(0, 0, 0, range(1), range(1), range(1), (), None, None).to_row()["experts"] is None


@pytest.mark.parametrize(
    ("dtype", "device", "name"),
    [
        pytest.param("auto", "cpu", "float32", id="auto-cpu"),
        pytest.param("auto", "cuda:1", "bfloat16", id="auto-gpu"),
        pytest.param("auto", None, None, id="auto-unknown"),
        pytest.param("float16", None, "float16", id="given"),
    ],
)
def test_the_dtype_of_the_weights(dtype: str, device: str | None, name: str | None) -> None:
    assert choose_dtype_name(dtype, "bfloat16", device) == name
