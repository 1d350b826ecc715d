"""Which blocks each sequence holds, in one pool for each kind of attention, and what new ones may reuse.

Laws:

- A sequence holds blocks in every group or in none, and its tables are equally long. Changes are made for all
  groups or not at all.
- A sliding group keeps what the next query can see. Query i sees key j if i - window < j <= i, so blocks that
  end before that are null blocks. With window 6, block size 4 and 14 positions computed:

      positions   0 1 2 3   4 5 6 7   8 9 10 11   12 13 14 15
      table          0         0         17           4           the query at 14 sees 9..14

- A block is published only after the forward pass that filled it, so nobody reads what is not computed.
- Blocks are shared only when full; a full block is never written again.
- A sequence that returns prompt logprobs neither reads nor feeds the prefix cache: it needs each row computed.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from server.engine.kv_cache.block_pool import NULL_BLOCK, BlockPool, CacheInvariantError
from server.engine.kv_cache.hashing import Prefix
from server.engine.models.config import KVGroupSpec
from server.engine.sequence import Sequence
from server.engine.types import PoolSnapshot


def sliding_pool_blocks(
    window: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    steps_in_flight: int = 1,
) -> int:
    """Blocks with which the pool of a sliding group can never be the one that runs short.

    A sequence keeps at most ceil(window / block_size) + 1 blocks between steps; the tokens of each step that is
    planned and not taken in add one more block for each sequence at most, and one for every `block_size` of
    them.
    """
    kept = _ceil_div(window, block_size) + 1
    chunks = steps_in_flight * _ceil_div(max_num_batched_tokens, block_size)
    windows = max_num_seqs * (kept + steps_in_flight) + chunks
    return min(windows, max_num_seqs * _ceil_div(max_model_len, block_size))


class KVCacheManager:
    """The only writer of `Sequence.block_tables`."""

    def __init__(
        self,
        groups: SequenceOf[KVGroupSpec],
        num_blocks: SequenceOf[int],
        block_size: int,
        enable_prefix_caching: bool,
        max_num_batched_tokens: int,
    ) -> None:
        """Empty pools of `num_blocks[g]` usable blocks; storage needs one more for the null block 0.

        `groups` holds at most one group of full and one of sliding-window attention. Raises ValueError.
        """
        kinds = [group.window is None for group in groups]
        if not kinds or len(set(kinds)) != len(kinds) or len(kinds) != len(num_blocks):
            raise ValueError(
                f"needs one full group, one sliding group or both, and their sizes: {groups}, {num_blocks}"
            )
        self.block_size = block_size
        self._names = tuple(group.name for group in groups)
        self._windows = tuple(group.window for group in groups)
        self._sliding = [(group, window) for group, window in enumerate(self._windows) if window is not None]
        self._pools = tuple(BlockPool(count) for count in num_blocks)
        self._most_held = [self._most_blocks_held(window, max_num_batched_tokens) for window in self._windows]
        """Blocks of one sequence at a time at most, in each group."""
        self._enable_prefix_caching = enable_prefix_caching
        self._chains: dict[Sequence, _Chain] = {}

    # --- what fits ----------------------------------------------------------------------------------------

    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that the empty pools can hold, however it is cut into chunks."""
        return min(
            sys.maxsize if held <= pool.num_blocks else pool.num_blocks * self.block_size
            for pool, held in zip(self._pools, self._most_held, strict=True)
        )

    def has_room(self, seq: Sequence, num_cached: int, growing: Iterable[Sequence], spare: float) -> bool:
        """Whether all of a sequence that holds nothing fits now, a share `spare` of each pool left free.

        growing: those in the middle of their prompts, whose missing blocks are free but spoken for.
        """
        num_cached_blocks = num_cached // self.block_size
        for group, pool in enumerate(self._pools):
            shared = self._cached_blocks(seq, group, num_cached_blocks)[1]
            needed = max(0, self._most_needed(seq, group) - len(shared)) + pool.count_free(shared)
            spoken_for = sum(self._num_missing(other, group) for other in growing)
            if needed + spoken_for + int(spare * pool.num_blocks) > pool.num_free:
                return False
        return True

    def usage(self) -> dict[str, float]:
        """Share of each pool's blocks that live sequences hold, by group name."""
        pools = zip(self._names, self._pools, strict=True)
        return {name: 1.0 - pool.num_free / pool.num_blocks for name, pool in pools}

    def snapshot(self) -> dict[str, PoolSnapshot]:
        """How many blocks of each pool are in which state, by group name."""
        return {
            name: PoolSnapshot(
                num_blocks=pool.num_blocks,
                num_held=pool.num_blocks - pool.num_free,
                num_free=pool.num_free,
                num_published=pool.num_published,
            )
            for name, pool in zip(self._names, self._pools, strict=True)
        }

    # --- a sequence's life --------------------------------------------------------------------------------

    def uses_prefix_cache(self, seq: Sequence) -> bool:
        return self._enable_prefix_caching and seq.params.prompt_logprobs is None

    def find_cached_prefix(self, seq: Sequence) -> int:
        """Tokens at the start of a sequence that holds nothing whose entries can be reused.

        A multiple of the block size, and less than `num_tokens`, so that something is left to sample from.
        """
        if not self.uses_prefix_cache(seq):
            return 0
        num_blocks = (seq.num_tokens - 1) // self.block_size
        if None in self._windows:
            num_blocks = self._find_in_full_group(seq, self._windows.index(None), num_blocks)
        for group, window in self._sliding:
            num_blocks = self._find_in_sliding_group(seq, group, window, num_blocks)
        return num_blocks * self.block_size

    def allocate(self, seq: Sequence, num_cached: int, num_new: int) -> bool:
        """Hold blocks for `num_new` more tokens, in all groups or (False) in none.

        For a sequence that holds nothing, those of its first `num_cached` tokens (as `find_cached_prefix` just
        said) are shared and `num_new` follow them; otherwise they follow `num_planned`, and `num_cached` is 0.
        Up to `has_room_until` tokens there is nothing to do.
        """
        if not seq.block_tables:
            return self._allocate_first(seq, num_cached // self.block_size, num_cached + num_new)
        num_missing = _ceil_div(seq.num_planned + num_new - seq.has_room_until, self.block_size)
        if num_missing > 0:
            if any(pool.num_free < num_missing for pool in self._pools):
                return False
            for pool, table in zip(self._pools, seq.block_tables, strict=True):
                table.extend(pool.allocate(num_missing))
            seq.has_room_until += num_missing * self.block_size
        return True

    def commit(self, seq: Sequence) -> None:
        """After the forward pass: publish full blocks below `num_computed`, release those out of sight and
        those for tokens of a draft that was wrong. A step in flight behind it keeps its blocks.

        Without a draft there is nothing to do below `settled_until`.
        """
        if self.uses_prefix_cache(seq):
            self._publish(seq)
        num_blocks = _ceil_div(seq.num_planned, self.block_size)
        if num_blocks < len(seq.block_tables[0]):
            for pool, table in zip(self._pools, seq.block_tables, strict=True):
                pool.release(table[num_blocks:])
                del table[num_blocks:]
            seq.has_room_until = num_blocks * self.block_size
        for group, window in self._sliding:
            table, last = seq.block_tables[group], self._first_visible(window, seq.num_computed) - 1
            while last >= 0 and table[last] != NULL_BLOCK:
                self._pools[group].release([table[last]])
                table[last] = NULL_BLOCK
                last -= 1
        seq.settled_until = self._next_change(seq.num_computed)

    def free(self, seq: Sequence) -> None:
        """Give up all blocks, on every way out and on preemption. What was published stays findable.

        The tail goes first, since a prefix is of no use without its beginning. Idempotent.
        """
        for pool, table in zip(self._pools, seq.block_tables, strict=False):  # no tables: nothing held
            pool.release(block for block in reversed(table) if block != NULL_BLOCK)
        seq.block_tables = []
        seq.settled_until = seq.has_room_until = 0
        self._chains.pop(seq, None)

    def discard(self, seq: Sequence) -> None:
        """As `free`, for a sequence whose entries must not be trusted: nobody will find them again."""
        chain = self._chains.get(seq)
        for prefix in chain.prefixes if chain is not None else ():
            for pool in self._pools:
                pool.discard(prefix)
        self.free(seq)

    def check(self, live: Iterable[Sequence]) -> None:
        """Compare the books with all the sequences that exist. Raises CacheInvariantError."""
        live = list(live)
        if not self._chains.keys() <= set(live):
            raise CacheInvariantError("prefixes are kept for sequences that have ended")
        holding = [seq for seq in live if seq.block_tables]
        for group, (window, pool) in enumerate(zip(self._windows, self._pools, strict=True)):
            pool.check(Counter(block for seq in holding for block in seq.block_tables[group] if block))
            for seq in holding:
                table = seq.block_tables[group]
                first = self._first_visible(window, seq.num_computed)
                if any(table[:first]) or not all(table[first:]) or len(table) != len(seq.block_tables[0]):
                    raise CacheInvariantError(
                        f"{self._names[group]}: {table} at {seq.num_computed} computed tokens"
                    )
                if not seq.num_planned <= seq.has_room_until == len(table) * self.block_size:
                    raise CacheInvariantError(f"{len(table)} blocks for {seq.num_planned} tokens")

    # --- details ------------------------------------------------------------------------------------------

    def _first_visible(self, window: int | None, num_computed: int) -> int:
        """Index of the first block that the query at position `num_computed` sees."""
        return 0 if window is None else max(0, num_computed - window + 1) // self.block_size

    def _next_change(self, num_computed: int) -> int:
        """The least number of computed tokens above this one at which a block is full, or out of sight."""
        size = self.block_size
        change = num_computed // size * size + size
        for _, window in self._sliding:
            change = min(change, (self._first_visible(window, num_computed) + 1) * size + window - 1)
        return change

    def _most_blocks_held(self, window: int | None, max_chunk: int) -> int:
        """Blocks that hold a window and a chunk: n positions touch at most ceil((n - 1) / block_size) + 1."""
        if window is None:
            return sys.maxsize
        return _ceil_div(window - 1 + max_chunk - 1, self.block_size) + 1

    def _most_needed(self, seq: Sequence, group: int) -> int:
        """Blocks that the known tokens of a sequence take at a time at most."""
        return min(_ceil_div(seq.num_tokens, self.block_size), self._most_held[group])

    def _num_missing(self, seq: Sequence, group: int) -> int:
        """Those of them that a sequence in the middle of its prompt does not hold yet."""
        num_held = len(seq.block_tables[group]) - self._first_visible(self._windows[group], seq.num_computed)
        return max(0, self._most_needed(seq, group) - num_held)

    def _chain(self, seq: Sequence) -> _Chain:
        chain = self._chains.get(seq)
        if chain is None:
            chain = self._chains[seq] = _Chain(seq, self.block_size)
        return chain

    def _find_in_full_group(self, seq: Sequence, group: int, num_blocks: int) -> int:
        """Blocks of the longest cached prefix of at most `num_blocks`, from the left."""
        pool, chain = self._pools[group], self._chain(seq)
        for index in range(num_blocks):
            block = pool.find(chain.prefix(index))
            if block is None:
                return index
            chain.splice(index, pool.prefix_of(block))
        return num_blocks

    def _find_in_sliding_group(self, seq: Sequence, group: int, window: int, num_blocks: int) -> int:
        """Blocks of the longest prefix of at most `num_blocks` whose visible end is cached, from the right."""
        pool, chain = self._pools[group], self._chain(seq)
        index = num_blocks - 1
        while index >= self._first_visible(window, num_blocks * self.block_size):
            if pool.find(chain.prefix(index)) is None:
                num_blocks = index
            index -= 1
        return num_blocks

    def _cached_blocks(self, seq: Sequence, group: int, num_blocks: int) -> tuple[int, list[int]]:
        """The table of a cached prefix: how many null blocks it begins with, and the blocks after them."""
        first = self._first_visible(self._windows[group], num_blocks * self.block_size)
        blocks = []
        for index in range(first, num_blocks):
            block = self._pools[group].find(self._chain(seq).prefix(index))
            if block is None:
                raise CacheInvariantError(f"block {index} of {seq.request_id} is not cached in group {group}")
            blocks.append(block)
        return first, blocks

    def _allocate_first(self, seq: Sequence, num_cached_blocks: int, num_tokens: int) -> bool:
        cached = [self._cached_blocks(seq, group, num_cached_blocks) for group in range(len(self._pools))]
        num_missing = _ceil_div(num_tokens, self.block_size) - num_cached_blocks
        for pool, (_, shared) in zip(self._pools, cached, strict=True):
            if pool.num_free - pool.count_free(shared) < num_missing:
                return False
        for pool, (first, shared) in zip(self._pools, cached, strict=True):
            pool.acquire(shared)
            seq.block_tables.append(array("i", [NULL_BLOCK] * first + shared + pool.allocate(num_missing)))
        seq.has_room_until = len(seq.block_tables[0]) * self.block_size
        if self.uses_prefix_cache(seq):
            self._chain(seq).num_published = num_cached_blocks
        return True

    def _publish(self, seq: Sequence) -> None:
        chain, num_full = self._chain(seq), seq.num_computed // self.block_size
        for index in range(chain.num_published, num_full):
            prefix = chain.prefix(index)
            for pool, table in zip(self._pools, seq.block_tables, strict=True):
                pool.publish(table[index], prefix)
            twin = self._pools[0].find(prefix)
            if twin is not None:
                chain.splice(index, self._pools[0].prefix_of(twin))
        chain.num_published = num_full


class _Chain:
    """The prefixes of one sequence's full blocks, hashed once, as far as they were asked for."""

    def __init__(self, seq: Sequence, block_size: int) -> None:
        self.num_published = 0
        """Leading blocks that were published, or found."""
        self.prefixes: list[Prefix] = []
        self._seq = seq
        self._block_size = block_size
        self._root = Prefix.root(seq.request.cache_salt)

    def prefix(self, index: int) -> Prefix:
        """The prefix that ends with block `index`."""
        while len(self.prefixes) <= index:
            start = len(self.prefixes) * self._block_size
            parent = self.prefixes[-1] if self.prefixes else self._root
            self.prefixes.append(parent.extended(self._seq.token_ids[start : start + self._block_size]))
        return self.prefixes[index]

    def splice(self, index: int, equal: Prefix) -> None:
        """Continue from an equal prefix of another chain, so that comparing the two stays O(1)."""
        self.prefixes[index] = equal


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
