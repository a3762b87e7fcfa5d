"""BlockPool: reference counts, reuse by digest, order of eviction."""

from __future__ import annotations

import numpy as np
import pytest

from zspmd.errors import ConfigError, InternalError
from zspmd.runtime.engine.blocks import BlockPool, chain_digest, root_digest

A, B, C = (chain_digest(root_digest(b""), np.array([i], np.int32)) for i in range(3))


def test_hands_out_every_block_but_the_padding_once() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(InternalError, match="asked for 1 blocks where 0 are free"):
        pool.allocate(1)


def test_a_pool_of_padding_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_blocks is 1"):
        BlockPool(1, 4)


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(3, 4)
    (block,) = pool.allocate(1)
    pool.register(block, A)
    assert pool.match_prefix([A, B]) == [block]
    pool.free([block])
    pool.validate([[block]])
    pool.free([block])
    pool.validate([])
    with pytest.raises(InternalError, match="freed more often"):
        pool.free([block])


def test_a_free_block_is_revived_until_it_is_handed_out_again() -> None:
    pool = BlockPool(3, 4)
    table = pool.allocate(2)
    for block, digest in zip(table, [A, B]):
        pool.register(block, digest)
    pool.free(table)
    assert pool.match_prefix([A, B]) == table
    pool.free(table)
    pool.allocate(1)
    assert pool.match_prefix([A, B]) == table[:1], "of a chain the end goes first"


def test_unnamed_blocks_are_handed_out_before_named_ones_and_old_before_new() -> None:
    pool = BlockPool(4, 4)
    plain, old, new = pool.allocate(3)
    pool.register(old, A)
    pool.register(new, B)
    for block in (old, new, plain):
        pool.free([block])
    assert [pool.allocate(1)[0] for _ in range(3)] == [plain, old, new]
    assert pool.num_cached == 0


def test_of_two_equal_blocks_the_first_stays_known() -> None:
    pool = BlockPool(4, 4)
    first, second = pool.allocate(2)
    pool.register(first, A)
    pool.register(second, A)
    pool.free([first, second])
    pool.validate([])
    assert pool.match_prefix([A]) == [first]


def test_without_the_cache_nothing_is_known() -> None:
    pool = BlockPool(3, 4, enable_prefix_cache=False)
    table = pool.allocate(1)
    pool.register(table[0], A)
    assert pool.match_prefix([A]) == []


def test_a_match_ends_at_the_first_unknown_block() -> None:
    pool = BlockPool(4, 4)
    first, third = pool.allocate(2)
    pool.register(first, A)
    pool.register(third, C)
    assert pool.match_prefix([A, B, C]) == [first]
    pool.validate([[first, third], [first]])


@pytest.mark.parametrize(
    ("tables", "message"),
    [([], "0 tables hold it"), ([[1], [1]], "2 tables hold it"), ([[2]], "tables hold it")],
    ids=["leaked", "held twice", "wrong block"],
)
def test_validate_finds_tables_that_disagree(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(4, 4)
    assert pool.allocate(1) == [1]
    with pytest.raises(InternalError, match=message):
        pool.validate(tables)


def test_a_digest_names_parent_salt_and_tokens() -> None:
    tokens = np.array([1, 2], np.int32)
    digests = {
        chain_digest(root_digest(b""), tokens),
        chain_digest(root_digest(b"tenant"), tokens),
        chain_digest(chain_digest(root_digest(b""), tokens), tokens),
        chain_digest(root_digest(b""), tokens[::-1]),
    }
    assert len(digests) == 4
    assert chain_digest(root_digest(b""), tokens.copy()) in digests
