"""Mesh axes: every rank in one group of each, and the groups fit each other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.config import ParallelConfig
from zspmd.errors import TopologyError
from zspmd.topology import AXES, axis_group, axis_groups


@st.composite
def meshes(draw: st.DrawFn) -> ParallelConfig:
    tp, pp, dp = (draw(st.integers(1, 6)) for _ in range(3))
    return ParallelConfig(tp=tp, pp=pp, dp=dp, ep=draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % n == 0])))


QUICK = settings(deadline=None, max_examples=100)
axes = st.sampled_from(AXES)


@QUICK
@given(meshes(), axes)
def test_each_rank_is_in_exactly_one_group_of_each_axis(parallel: ParallelConfig, axis: str) -> None:
    groups = axis_groups(parallel, axis)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(parallel.world_size))
    size = parallel.world_size if axis == "world" else getattr(parallel, axis)
    assert {len(ranks) for ranks in groups} == {size}
    assert all(list(ranks) == sorted(ranks) for ranks in groups)


@QUICK
@given(meshes(), axes)
def test_the_group_of_a_rank_is_one_of_the_axis(parallel: ParallelConfig, axis: str) -> None:
    groups = axis_groups(parallel, axis)
    for rank in range(parallel.world_size):
        group = axis_group(parallel, axis, rank)
        assert (group.ranks in groups, group.rank, group.axis, group.size) == (True, rank, axis, len(group.ranks))
        assert (group.is_first, group.is_last) == (rank == group.ranks[0], rank == group.ranks[-1])
        assert axis_group(parallel, axis, group.next_rank).previous_rank == rank
        assert group.next_rank in group.ranks


@QUICK
@given(meshes())
def test_dp_pp_and_tp_places_name_a_rank(parallel: ParallelConfig) -> None:
    places = {tuple(axis_group(parallel, axis, rank).index for axis in ("dp", "pp", "tp")): rank for rank in range(parallel.world_size)}
    assert len(places) == parallel.world_size
    assert [places[place] for place in sorted(places)] == list(range(parallel.world_size))


@QUICK
@given(meshes())
def test_experts_are_spread_over_one_pipeline_stage(parallel: ParallelConfig) -> None:
    for ranks in axis_groups(parallel, "ep"):
        assert len({axis_group(parallel, "pp", rank).index for rank in ranks}) == 1


@QUICK
@given(meshes(), st.integers())
def test_a_rank_outside_the_world_is_refused(parallel: ParallelConfig, rank: int) -> None:
    outside = rank if not 0 <= rank < parallel.world_size else parallel.world_size
    with pytest.raises(TopologyError, match=f"rank {outside} is outside the world of {parallel.world_size}"):
        axis_group(parallel, "tp", outside)
