"""The mesh of the documentation; tests/property/test_topology.py has the rest."""

from __future__ import annotations

import pytest

from zspmd.config import ParallelConfig
from zspmd.errors import TopologyError
from zspmd.topology import AxisGroup, axis_group, axis_groups, stage_layers

DOCUMENTED = ParallelConfig(dp=2, pp=2, tp=2, ep=4)


@pytest.mark.parametrize(
    ("axis", "groups"),
    [
        ("world", "01234567"),
        ("tp", "01 23 45 67"),
        ("pp", "02 13 46 57"),
        ("dp", "04 15 26 37"),
        ("ep", "0145 2367"),
    ],
    ids=["world", "tp", "pp", "dp", "ep"],
)
def test_the_documented_mesh(axis: str, groups: str) -> None:
    assert axis_groups(DOCUMENTED, axis) == [tuple(map(int, group)) for group in groups.split()]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "partition", "sizes"),
    [(5, 2, None, [3, 2]), (4, 4, None, [1, 1, 1, 1]), (11, 4, None, [3, 3, 3, 2]), (5, 2, (1, 4), [1, 4]), (3, 1, None, [3])],
)
def test_the_layers_of_each_stage(num_layers: int, num_stages: int, partition: tuple[int, ...] | None, sizes: list[int]) -> None:
    stages = stage_layers(num_layers, num_stages, partition)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


@pytest.mark.parametrize(
    ("num_stages", "partition", "message"),
    [
        (6, None, "pp 6 is more than the 5 layers of the model; choose at most 5"),
        (2, (5,), "partition 5 has 1 stages and 5 layers; it must give each of pp 2 stages one layer or more, 5 in all"),
        (2, (2, 2), "has 2 stages and 4 layers"),
        (2, (5, 0), "one layer or more"),
        (3, (6, -2, 1), "one layer or more"),
    ],
)
def test_layers_that_no_stages_can_share_are_refused(num_stages: int, partition: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        stage_layers(5, num_stages, partition)


def test_the_group_of_a_rank_in_the_middle() -> None:
    group = axis_group(ParallelConfig(pp=3, tp=2), "pp", 3)
    assert group == AxisGroup("pp", (1, 3, 5), 1)
    assert (group.next_rank, group.previous_rank, group.is_first, group.is_last) == (5, 1, False, False)


def test_neighbours_wrap_round() -> None:
    group = axis_group(ParallelConfig(tp=3), "tp", 2)
    assert (group.next_rank, group.previous_rank) == (0, 1)
    alone = axis_group(ParallelConfig(), "tp", 0)
    assert (alone.next_rank, alone.previous_rank, alone.is_first, alone.is_last) == (0, 0, True, True)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(TopologyError, match=rf"rank {rank} is outside the world of 8 ranks \(0 to 7\)"):
        axis_group(DOCUMENTED, "tp", rank)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(TopologyError, match="no mesh axis 'sp'; the axes are world, dp, pp, tp, ep"):
        axis_group(DOCUMENTED, "sp", 0)
