"""KV blocks: who holds which, and which hold the beginnings of prompts that may come again.

    allocate ----> held (references >= 1) ----> free ----> plain free     nothing of use inside; handed out first
                     ^        | register                   cached free    full, hashed; revived by match_prefix,
                     |________|_________ match_prefix ____________|       else handed out oldest first

A full block is named by a digest chained over every token from the sequence's start, so equal digests mean equal tokens
at equal positions. Every operation is O(1) a block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, InternalError

PADDING_BLOCK = 0
_DIGEST_BYTES = 16


def chain_digest(parent: bytes, tokens: npt.NDArray[np.int32]) -> bytes:
    """Name a full block: 16 bytes over its parent's digest (``root_digest`` for the first) and its tokens, int32 [block_size]."""
    return blake2b(parent + tokens.astype("<i4", copy=False).tobytes(), digest_size=_DIGEST_BYTES).digest()


def root_digest(salt: bytes) -> bytes:
    """Name the beginning of every chain; chains of different salts share nothing."""
    return blake2b(salt, digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """Hands out block ids with reference counts; block 0 is the ranks' padding and never leaves.

    Args:
        num_blocks: blocks on each rank, padding included; at least 2.
        block_size: KV positions in a block.
        enable_prefix_cache: remember registered blocks; without it ``register`` and ``match_prefix`` do nothing.

    Raises:
        ConfigError: fewer than 2 blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        if num_blocks < 2:
            raise ConfigError(f"num_blocks is {num_blocks}; block 0 is padding, so at least 2 are needed: raise num_blocks")
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._enable_prefix_cache = enable_prefix_cache
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._plain_free = list(range(num_blocks - 1, PADDING_BLOCK, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, cached ones included."""
        return len(self._plain_free) + len(self._cached_free)

    @property
    def num_cached(self) -> int:
        """Blocks, held or free, that ``match_prefix`` can find."""
        return len(self._by_digest)

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks with one reference each; the oldest cached ones are forgotten where plain ones run out.

        Raises:
            InternalError: fewer are free; ask ``num_free`` first.
        """
        if count > self.num_free:
            raise InternalError(f"asked for {count} blocks where {self.num_free} are free")
        blocks = [self._plain_free.pop() if self._plain_free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block of a table; of a chain, the end will be forgotten before the beginning.

        Raises:
            InternalError: a block that nobody holds.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise InternalError(f"block {block} was freed more often than it was handed out")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._plain_free.append(block)
                else:
                    self._cached_free[block] = None

    def count_prefix(self, digests: Sequence[bytes]) -> int:
        """Return how many blocks ``match_prefix`` would find; takes none."""
        return next((count for count, digest in enumerate(digests) if digest not in self._by_digest), len(digests))

    def match_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Take a reference on the blocks of the longest known beginning of a chain, and return them in order."""
        blocks = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached_free[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Let others find a held, full block, once a published step has written it. Of two equal blocks the first stays known."""
        if self._enable_prefix_cache and digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def validate(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that ``tables`` hold exactly the references given out, and that every other block is free once.

        Raises:
            InternalError: a block leaked, is held twice, or is known by a wrong name.
        """
        held = Counter(block for table in tables for block in table)
        free = [*self._plain_free, *self._cached_free]
        for block, references in enumerate(self._references):
            if references != held[block]:
                raise InternalError(f"block {block} has {references} references, and {held[block]} tables hold it")
        if PADDING_BLOCK in free or len(free) != len(set(free)) or len(free) + len(held) != self.num_usable:
            raise InternalError(f"{len(free)} free and {len(held)} held blocks do not make up {self.num_usable}")
        if any(held[block] for block in free):
            raise InternalError(f"blocks {[block for block in free if held[block]]} are free and held at once")
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        if named != self._by_digest or any((self._digests[block] is None) != (block not in self._cached_free) for block in free):
            raise InternalError("the digests of the blocks and the index over them disagree")

    def _evict(self) -> int:
        block, _ = self._cached_free.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[block] = None
        return block
