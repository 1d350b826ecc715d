"""The blocks of one KV group: which are free, who shares them, what can be found in them.

Laws:

- Block 0 is the null block: it stands for positions that nobody reads and is never handed out. Blocks
  1..num_blocks are free (reference count 0, in the free list) or held (count >= 1, not in the list).
- A free block that holds a published prefix stays findable until it is handed out again.
- A block that holds no prefix when it is released is reused first; the others follow in the order of release.
- At most one block is published under a digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from server.engine.kv_cache.hashing import BlockHash, Prefix

NULL_BLOCK = 0


class CacheInvariantError(RuntimeError):
    """The books of the KV cache contradict each other: a bug, after which no entry can be trusted."""


class BlockPool:
    """O(1) per block: the free list is doubly linked through two arrays, and circular through block 0."""

    def __init__(self, num_blocks: int) -> None:
        """A pool of `num_blocks` >= 1 usable blocks, all free. Raises ValueError."""
        if num_blocks < 1:
            raise ValueError(f"a KV pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._next = [*range(1, num_blocks + 1), NULL_BLOCK]
        self._previous = [num_blocks, *range(num_blocks)]
        self._references = [0] * (num_blocks + 1)
        self._prefixes: list[Prefix | None] = [None] * (num_blocks + 1)
        self._published: dict[BlockHash, int] = {}

    @property
    def num_published(self) -> int:
        """Blocks that can be found."""
        return len(self._published)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` <= `num_free` blocks, least worth keeping first; what they held is forgotten."""
        blocks = []
        for _ in range(count):
            block = self._next[NULL_BLOCK]
            if block == NULL_BLOCK:
                raise CacheInvariantError(f"{count} blocks were taken from a pool with fewer free ones")
            self._unlink(block)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block; free ones leave the free list with what they hold."""
        for block in blocks:
            if self._references[block] == 0:
                self._unlink(block)
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give one reference to each block back. Blocks released earlier are reused earlier."""
        for block in blocks:
            if self._references[block] == 0:
                raise CacheInvariantError(f"block {block} was released more often than taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                after = NULL_BLOCK if self._prefixes[block] is None else self._previous[NULL_BLOCK]
                self._link(block, after)

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free list, and would leave it if acquired."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def find(self, prefix: Prefix) -> int | None:
        """The block that holds the entries of the prefix's last block, free or held."""
        block = self._published.get(prefix.digest)
        return block if block is not None and self.prefix_of(block).matches(prefix) else None

    def prefix_of(self, block: int) -> Prefix:
        """The prefix under which a found block was published."""
        prefix = self._prefixes[block]
        if prefix is None:
            raise CacheInvariantError(f"block {block} is not published")
        return prefix

    def publish(self, block: int, prefix: Prefix) -> None:
        """Let a held, computed block be found, unless another one is published under the same digest."""
        if prefix.digest not in self._published:
            self._published[prefix.digest] = block
            self._prefixes[block] = prefix

    def discard(self, prefix: Prefix) -> None:
        """Let the entries of the prefix's last block not be found any more; who holds them keeps them."""
        block = self.find(prefix)
        if block is not None:
            self._forget(block)

    def check(self, references: Mapping[int, int]) -> None:
        """Compare the books with each other and with the references that exist. Raises CacheInvariantError."""
        free: list[int] = []
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK and len(free) <= self.num_blocks:
            free.append(block)
            if self._previous[self._next[block]] != block:
                raise CacheInvariantError(f"the free list is torn at block {block}")
            block = self._next[block]
        unreferenced = [block for block in range(1, self.num_blocks + 1) if self._references[block] == 0]
        if sorted(free) != unreferenced or len(free) != self.num_free:
            raise CacheInvariantError(f"free list {free}, unreferenced {unreferenced}, counted {self.num_free}")
        for block, counted in enumerate(self._references):
            if counted != references.get(block, 0):
                raise CacheInvariantError(
                    f"block {block}: {references.get(block, 0)} references, counted {counted}"
                )
        published = [
            (block, prefix.digest) for block, prefix in enumerate(self._prefixes) if prefix is not None
        ]
        if sorted(published) != sorted((block, digest) for digest, block in self._published.items()):
            raise CacheInvariantError("blocks and digests do not name each other")

    def _forget(self, block: int) -> None:
        prefix = self._prefixes[block]
        if prefix is not None:
            del self._published[prefix.digest]
            self._prefixes[block] = None

    def _unlink(self, block: int) -> None:
        previous, following = self._previous[block], self._next[block]
        self._next[previous] = following
        self._previous[following] = previous
        self.num_free -= 1

    def _link(self, block: int, after: int) -> None:
        following = self._next[after]
        self._next[after] = self._previous[following] = block
        self._previous[block], self._next[block] = after, following
        self.num_free += 1
