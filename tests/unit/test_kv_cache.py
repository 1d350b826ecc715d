"""Block pools, prefix chains and the KV cache manager: what is held, shared, found and given back."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kv_cache import hashing
from server.engine.kv_cache.block_pool import BlockPool, CacheInvariantError
from server.engine.kv_cache.hashing import BlockHash, Prefix
from server.engine.kv_cache.manager import KVCacheManager, sliding_pool_blocks
from server.engine.sequence import Sequence
from tests.unit.engine_simulation import groups_of, make_engine, make_request, make_sequence


def make_prefix(*token_ids: int) -> Prefix:
    return Prefix.root("").extended(token_ids)


def make_manager(
    *windows: int | None,
    num_blocks: int = 16,
    block_size: int = 4,
    caching: bool = True,
    max_num_batched_tokens: int = 64,
) -> KVCacheManager:
    groups = groups_of(*windows)
    return KVCacheManager(groups, [num_blocks] * len(groups), block_size, caching, max_num_batched_tokens)


def compute(kv: KVCacheManager, seq: Sequence, num_new: int | None = None, num_cached: int = 0) -> None:
    """Allocate for the next `num_new` tokens (all that is left by default), and take them as computed."""
    start = max(seq.num_computed, num_cached)
    num_new = seq.num_tokens - start if num_new is None else num_new
    assert kv.allocate(seq, num_cached, num_new)
    seq.num_computed = start + num_new
    kv.commit(seq)


def computed_and_freed(kv: KVCacheManager, prompt: list[int], **fields: object) -> None:
    seq = make_sequence("before", prompt, **fields)
    compute(kv, seq)
    kv.free(seq)


# --- pool --------------------------------------------------------------------------------------------------


def test_a_pool_hands_out_each_usable_block_once_and_never_block_zero() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(3) + pool.allocate(2)) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0
    with pytest.raises(CacheInvariantError, match="fewer free ones"):
        pool.allocate(1)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_a_shared_block_is_free_only_after_its_last_release() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.acquire([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1
    with pytest.raises(CacheInvariantError, match="more often than taken"):
        pool.release([block])


def test_blocks_without_a_prefix_are_reused_before_those_with_one() -> None:
    pool = BlockPool(3)
    first, second, third = pool.allocate(3)
    pool.publish(first, make_prefix(1))
    pool.publish(third, make_prefix(3))
    pool.release([third, first, second])
    assert pool.allocate(3) == [second, third, first]


def test_a_free_block_can_be_found_until_it_is_reused() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.publish(block, make_prefix(1, 2))
    pool.release([block])
    assert pool.find(make_prefix(1, 2)) == block
    pool.acquire([block])
    assert pool.num_free == 0
    pool.release([block])
    pool.allocate(1)
    assert pool.find(make_prefix(1, 2)) is None


def test_the_first_block_published_under_a_prefix_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, make_prefix(1))
    pool.publish(second, make_prefix(1))
    assert pool.find(make_prefix(1)) == first
    pool.check({first: 1, second: 1})


def test_a_discarded_prefix_is_not_found_and_its_block_stays_held() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.publish(block, make_prefix(1))
    pool.discard(make_prefix(1))
    assert pool.find(make_prefix(1)) is None
    pool.check({block: 1})


def test_check_reports_references_that_do_not_exist() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.check({block: 1})
    with pytest.raises(CacheInvariantError, match=f"block {block}"):
        pool.check({})


@pytest.mark.covers("K18")
@given(st.lists(st.tuples(st.sampled_from(["allocate", "acquire", "release", "publish"]), st.integers(0, 9))))
def test_pool_books_agree_with_a_plain_count(actions: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(6), Counter[int]()
    for action, number in actions:
        blocks = sorted(held.elements())
        if action == "allocate" and number <= pool.num_free:
            held.update(pool.allocate(number))
        elif blocks and action == "release":
            pool.release([blocks[number % len(blocks)]])
            held[blocks[number % len(blocks)]] -= 1
        elif blocks and action == "publish":
            if pool.count_free(blocks) == 0 and pool._prefixes[blocks[0]] is None:
                pool.publish(blocks[0], make_prefix(number))
        elif action == "acquire":
            found = pool.find(make_prefix(number))
            if found is not None:
                pool.acquire([found])
                held[found] += 1
        pool.check(held)
        assert pool.num_free == 6 - sum(1 for count in held.values() if count)


@pytest.mark.covers("K18")
def test_a_hundred_thousand_random_steps_lose_and_mix_up_no_block() -> None:
    """Against a plain record of who holds what, and of what was last written into each block."""
    num_blocks, chance = 40, random.Random(0)
    pool, contents = BlockPool(num_blocks), itertools.count()
    tables: list[list[int]] = []
    held: Counter[int] = Counter()
    written: dict[int, int] = {}
    published: deque[int] = deque(maxlen=30)
    num_found = num_evicted = 0
    actions = ["allocate"] * 2 + ["fork"] + ["free"] * 4 + ["publish"] * 2 + ["find"] * 2

    def hold(blocks: list[int]) -> None:
        tables.append(blocks)
        held.update(blocks)

    for step in range(100_000):
        match chance.choice(actions):
            case "allocate" if pool.num_free:
                new = pool.allocate(chance.randint(1, min(5, pool.num_free)))
                assert not any(held[block] for block in new), "somebody holds it"
                num_evicted += sum(written.get(block) in published for block in new)
                written |= {block: next(contents) for block in new}
                hold(new)
            case "fork" if tables:
                table = chance.choice(tables)
                pool.acquire(table)
                hold(list(table))
            case "free" if tables:
                table = tables.pop(chance.randrange(len(tables)))
                pool.release(table)
                held -= Counter(table)
            case "publish" if tables:
                block = chance.choice(chance.choice(tables))
                if written[block] not in published:
                    pool.publish(block, make_prefix(written[block]))
                    published.append(written[block])
            case "find" if published:
                content = chance.choice(published)
                found = pool.find(make_prefix(content))
                if found is not None:
                    assert written[found] == content, "it was written over"
                    num_found += 1
                    pool.acquire([found])
                    hold([found])
        assert pool.num_free == num_blocks - len(held)
        if step % 500 == 0:
            pool.check(held)
    assert min(num_found, num_evicted) > 1000


# --- prefixes ----------------------------------------------------------------------------------------------


def test_a_prefix_stands_for_salt_boundaries_and_every_token_before_it() -> None:
    digests = {
        Prefix.root("").extended([1, 2]).extended([3, 4]).digest,
        Prefix.root("").extended([9, 2]).extended([3, 4]).digest,
        Prefix.root("").extended([3, 4]).digest,
        Prefix.root("").extended([1, 2, 3, 4]).digest,
        Prefix.root("s").extended([1, 2]).extended([3, 4]).digest,
        Prefix.root("").digest,
        Prefix.root("s").digest,
    }
    assert len(digests) == 7
    assert Prefix.root("s").extended([1, 2]).digest == Prefix.root("s").extended([1, 2]).digest


@pytest.mark.covers("K12")
def test_prefixes_with_equal_digests_match_only_with_equal_tokens_and_salts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hashing, "_digest", lambda data: BlockHash(b"same"))
    one = Prefix.root("").extended([1]).extended([2])
    assert one.matches(Prefix.root("").extended([1]).extended([2]))
    assert not one.matches(Prefix.root("").extended([9]).extended([2]))
    assert not one.matches(Prefix.root("").extended([1]).extended([9]))
    assert not one.matches(Prefix.root("salt").extended([1]).extended([2]))
    assert not one.matches(Prefix.root("").extended([2]))


def test_a_long_chain_is_dropped_without_recursion() -> None:
    prefix = Prefix.root("")
    for _ in range(100_000):
        prefix = prefix.extended([1])
    del prefix


# --- allocation --------------------------------------------------------------------------------------------


def test_block_tables_of_all_groups_cover_the_tokens_asked_for() -> None:
    kv = make_manager(None, 8)
    seq = make_sequence("a", range(10))
    assert kv.allocate(seq, 0, 9)
    assert [len(table) for table in seq.block_tables] == [3, 3]
    seq.num_computed = 9
    assert kv.allocate(seq, 0, 1)
    assert [len(table) for table in seq.block_tables] == [3, 3]
    kv.check([seq])


def test_a_refused_allocation_changes_nothing_in_any_group() -> None:
    groups = groups_of(None, 8)
    kv = KVCacheManager(groups, [10, 3], 4, True, 64)
    computed_and_freed(kv, list(range(8)))
    usage = kv.usage()
    seq = make_sequence("a", range(16))
    num_cached = kv.find_cached_prefix(seq)
    assert num_cached == 8
    assert not kv.allocate(seq, num_cached, 8), "two cached blocks are among the three free ones"
    assert seq.block_tables == []
    assert kv.usage() == usage
    assert kv.allocate(seq, num_cached, 4)
    seq.num_computed = 8
    kv.check([seq])
    before = [list(table) for table in seq.block_tables]
    assert not kv.allocate(seq, 0, 8)
    assert [list(table) for table in seq.block_tables] == before


def test_free_is_idempotent_and_gives_everything_back() -> None:
    kv = make_manager(None, 8)
    seq = make_sequence("a", range(20))
    compute(kv, seq)
    assert kv.usage() == {"full": 5 / 16, "sliding": 2 / 16}
    kv.free(seq)
    kv.free(seq)
    assert kv.usage() == {"full": 0.0, "sliding": 0.0}
    kv.check([])


def test_the_tail_of_a_freed_sequence_is_evicted_first() -> None:
    kv = make_manager(None, num_blocks=4)
    computed_and_freed(kv, list(range(16)))
    compute(kv, make_sequence("other", [30, 31, 32, 33, 34]))
    assert kv.find_cached_prefix(make_sequence("again", range(17))) == 8


def test_check_finds_blocks_held_by_nobody_alive() -> None:
    kv = make_manager(None)
    seq = make_sequence("a", range(5))
    compute(kv, seq)
    with pytest.raises(CacheInvariantError):
        kv.check([])


def test_two_groups_of_one_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="one full group, one sliding group or both"):
        make_manager(8, 16)


# --- sliding window ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_computed", "num_null"),
    # window 6, block size 4: the query at 8 sees 3..8, the one at 9 sees 4..9 and so no more of block 0
    [(8, 0), (9, 1), (12, 1), (13, 2), (17, 3)],
)
def test_blocks_become_null_as_soon_as_the_next_query_is_past_them(num_computed: int, num_null: int) -> None:
    kv = make_manager(6)
    seq = make_sequence("a", range(40))
    compute(kv, seq, num_computed)
    [table] = seq.block_tables
    assert list(table[:num_null]) == [0] * num_null
    assert all(table[num_null:])
    assert kv.usage() == {"sliding": (len(table) - num_null) / 16}


def test_a_long_sequence_holds_no_more_than_a_window_and_a_chunk_in_a_sliding_group() -> None:
    kv = make_manager(6, num_blocks=4, max_num_batched_tokens=8)
    seq = make_sequence("a", range(400))
    while seq.num_computed < 400:
        compute(kv, seq, 8)
        kv.check([seq])
    assert kv.max_sequence_tokens() > 10**9


@pytest.mark.covers("K10")
def test_released_window_blocks_still_serve_prefix_hits() -> None:
    kv = make_manager(None, 6)
    first = make_sequence("a", range(33))
    compute(kv, first)
    assert list(first.block_tables[1][:6]) == [0] * 6
    second = make_sequence("b", [*range(16), 99])
    assert kv.find_cached_prefix(second) == 16
    compute(kv, second, num_cached=16)
    assert second.block_tables[0][:4] == first.block_tables[0][:4]
    kv.check([first, second])


# --- prefix cache ------------------------------------------------------------------------------------------


@pytest.mark.covers("K08")
@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6)])
def test_a_cached_prefix_is_whole_blocks_and_leaves_a_token_to_compute(windows: tuple[int | None, ...]) -> None:
    kv = make_manager(*windows)
    computed_and_freed(kv, list(range(16)))
    found = {
        count: kv.find_cached_prefix(make_sequence("b", range(count))) for count in (3, 4, 5, 8, 16, 17, 30)
    }
    assert found == {3: 0, 4: 0, 5: 4, 8: 4, 16: 12, 17: 16, 30: 16}


@pytest.mark.covers("K10")
def test_a_hit_shares_blocks_and_takes_null_blocks_before_the_window() -> None:
    kv = make_manager(None, 6)
    computed_and_freed(kv, list(range(24)))
    one, two = make_sequence("b", [*range(20), 99]), make_sequence("c", [*range(20), 98])
    for seq in (one, two):
        assert kv.find_cached_prefix(seq) == 20
        assert kv.allocate(seq, 20, 1)
        seq.num_computed = 20
    kv.check([one, two])
    assert one.block_tables[0][:5] == two.block_tables[0][:5]
    assert one.block_tables[0][5] != two.block_tables[0][5]
    assert list(one.block_tables[1][:3]) == [0, 0, 0]
    assert one.block_tables[1][3:5] == two.block_tables[1][3:5]


@pytest.mark.covers("K10")
@given(missing=st.sets(st.integers(0, 5)), window=st.integers(1, 14))
def test_the_longest_prefix_whose_window_is_cached_is_found(missing: set[int], window: int) -> None:
    """Against the definition, tried for every prefix, with some blocks absent from the sliding group."""
    kv = make_manager(None, window, block_size=4)
    computed_and_freed(kv, list(range(24)))
    prefix = Prefix.root("")
    for index in range(6):
        prefix = prefix.extended(range(index * 4, (index + 1) * 4))
        if index in missing:
            kv._pools[1].discard(prefix)

    def usable(num_tokens: int) -> bool:
        visible = range(max(0, num_tokens - window + 1), num_tokens)
        return all(position // 4 not in missing for position in visible)

    assert kv.find_cached_prefix(make_sequence("b", range(25))) == max(filter(usable, range(0, 25, 4)))


@pytest.mark.covers("K09")
def test_nothing_is_found_before_it_was_computed() -> None:
    kv = make_manager(None)
    first = make_sequence("a", range(9))
    assert kv.allocate(first, 0, 9)
    assert kv.find_cached_prefix(make_sequence("b", range(9))) == 0
    first.num_computed = 6
    kv.commit(first)
    assert kv.find_cached_prefix(make_sequence("b", range(9))) == 4


def test_blocks_that_a_sequence_fills_while_generating_are_published() -> None:
    kv = make_manager(None)
    seq = make_sequence("a", range(3))
    compute(kv, seq)
    for token_id in (3, 4):
        seq.token_ids.append(token_id)
        compute(kv, seq)
    assert kv.find_cached_prefix(make_sequence("b", range(9))) == 4


def test_salts_and_the_switch_keep_prefixes_apart() -> None:
    kv = make_manager(None)
    computed_and_freed(kv, list(range(9)), cache_salt="one")
    assert kv.find_cached_prefix(make_sequence("b", range(9), cache_salt="one")) == 8
    assert kv.find_cached_prefix(make_sequence("c", range(9), cache_salt="two")) == 0
    assert kv.find_cached_prefix(make_sequence("d", range(9))) == 0
    off = make_manager(None, caching=False)
    computed_and_freed(off, list(range(9)))
    assert off.find_cached_prefix(make_sequence("e", range(9))) == 0


def test_a_sequence_with_prompt_logprobs_neither_uses_nor_feeds_the_cache() -> None:
    kv = make_manager(None)
    computed_and_freed(kv, list(range(9)), prompt_logprobs=0)
    assert kv.find_cached_prefix(make_sequence("b", range(9))) == 0
    computed_and_freed(kv, list(range(9)))
    assert kv.find_cached_prefix(make_sequence("c", range(9), prompt_logprobs=0)) == 0


def test_a_discarded_sequence_leaves_nothing_to_find() -> None:
    kv = make_manager(None, 6)
    seq = make_sequence("a", range(33))
    compute(kv, seq)
    kv.discard(seq)
    again = make_sequence("b", range(33))
    assert kv.find_cached_prefix(again) == 0
    kv.check([again])


@pytest.mark.covers("K09")
def test_equal_sequences_computed_together_end_up_with_one_published_copy() -> None:
    kv = make_manager(None)
    one, two = make_sequence("a", range(8)), make_sequence("b", range(8))
    for seq in (one, two):
        assert kv.allocate(seq, 0, 8)
        seq.num_computed = 8
    kv.commit(one)
    kv.commit(two)
    three = make_sequence("c", range(9))
    assert kv.find_cached_prefix(three) == 8
    compute(kv, three, num_cached=8)
    assert three.block_tables[0][:2] == one.block_tables[0]
    kv.check([one, two, three])


def test_a_step_that_completes_no_block_hashes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = make_manager(None, 6)
    seq = make_sequence("a", range(16))
    compute(kv, seq)
    hashed: list[bytes] = []
    digest = hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda data: hashed.append(data) or digest(data))
    for count in (0, 0, 0, 1, 1):
        seq.token_ids.append(7)
        compute(kv, seq)
        assert len(hashed) == count


# --- what fits ---------------------------------------------------------------------------------------------


def test_the_longest_sequence_is_what_the_full_pool_holds() -> None:
    kv = make_manager(None, 6, num_blocks=20, max_num_batched_tokens=8)
    assert kv.max_sequence_tokens() == 80


def test_a_sliding_pool_too_small_for_a_window_and_a_chunk_limits_sequences() -> None:
    groups = groups_of(None, 6)
    assert KVCacheManager(groups, [20, 3], 4, True, 8).max_sequence_tokens() == 12
    assert KVCacheManager(groups, [20, 4], 4, True, 8).max_sequence_tokens() == 80


@given(
    window=st.integers(1, 20),
    block_size=st.integers(1, 8),
    chunk=st.integers(1, 20),
    first_chunk=st.integers(1, 20),
)
def test_a_pool_said_to_hold_any_length_holds_it_in_any_chunks(
    window: int, block_size: int, chunk: int, first_chunk: int
) -> None:
    limit = max(chunk, first_chunk)
    for num_blocks in range(1, 60):
        kv = KVCacheManager(groups_of(window), [num_blocks], block_size, True, limit)
        if kv.max_sequence_tokens() > num_blocks * block_size:
            break
    seq = make_sequence("a", [1] * 120)
    compute(kv, seq, first_chunk)
    while seq.num_computed < seq.num_tokens:
        compute(kv, seq, min(chunk, seq.num_tokens - seq.num_computed))
    kv.check([seq])


def test_room_is_asked_for_the_whole_sequence_and_what_must_stay_free() -> None:
    kv = make_manager(None, num_blocks=10)
    holder = make_sequence("a", range(16))
    compute(kv, holder)
    assert kv.has_room(make_sequence("b", range(50, 74)), 0, (), spare=0.0)
    assert not kv.has_room(make_sequence("b", range(50, 74)), 0, (), spare=0.1)
    assert not kv.has_room(make_sequence("b", range(50, 75)), 0, (), spare=0.0)
    sharing = make_sequence("c", range(40))
    assert kv.find_cached_prefix(sharing) == 16
    assert kv.has_room(sharing, 16, (), spare=0.0), "shared blocks need no room"
    kv.free(holder)
    assert kv.find_cached_prefix(sharing) == 16
    assert kv.has_room(sharing, 16, (), spare=0.0)
    assert not kv.has_room(sharing, 16, (), spare=0.1), "cached blocks that are free are not room"


@pytest.mark.parametrize(("window", "block_size"), [(1, 4), (6, 4), (9, 3), (16, 8)])
def test_a_sliding_pool_of_the_bound_is_never_the_one_that_runs_short(window: int, block_size: int) -> None:
    num_blocks = sliding_pool_blocks(window, block_size, 6, 16, max_model_len=200)
    engine = make_engine(
        windows=(None, window),
        num_blocks=(1000, num_blocks),
        block_size=block_size,
        max_num_seqs=6,
        max_model_len=200,
    )
    for number in range(20):
        engine.add(make_request(str(number), [number] * (1 + 37 * number % 90), max_tokens=5 + 7 * number % 40))
    engine.run()
    assert engine.num_preemptions == 0


def test_a_sliding_pool_is_no_larger_than_what_full_attention_would_need() -> None:
    assert sliding_pool_blocks(512, 16, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=256) == 4 * 16
    assert (
        sliding_pool_blocks(512, 16, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=32768)
        == 4 * 34 + 32
    )
