"""The pool: what was planned is what is allocated; slots and pages are shared, and copied before somebody writes."""

from __future__ import annotations

import pytest
import torch

from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.streams import PAGE_ROWS, cache_tokens_in, pages_for, plan_cache
from pyrosome.errors import CacheInvariantBroken, CheckpointError, ContextTooLong, DoesNotFit
from pyrosome.testing.shapes import tiny

MIXES = [(0,), (4,), (128,), (0, 4, 128, 4), (128, 0, 128), (4, 8, 64, 8), (2, 16)]


def state_of(pool: CachePool):
    """Everything the pool knows about who holds what."""
    books = {r: (sorted(b.free), b.refs.tolist(), b.writer.tolist()) for r, b in pool._pages.items()}
    return books, sorted(pool._free_slots), list(pool._slot_refs), {r: t.tolist() for r, t in pool._tables.items()}


def opened(pool: CachePool, length: int = 0) -> Holding:
    holding = pool.open()
    pool.prepare(holding, 0, length)
    return holding


def table(pool: CachePool, holding: Holding, ratio: int) -> list[int]:
    return pool._tables[ratio][holding.slot][: len(holding.pages[ratio])].tolist()


# Planned is allocated.


@pytest.mark.parametrize("ratios", MIXES, ids=str)
@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
def test_planned_bytes_are_allocated_bytes(ratios, kv_format):
    config = tiny(ratios)
    for drafts in (False, True):
        for num_drafts in (0, 1, 3):
            for sequences, context, shared in ((1, 1, None), (2, 257, 256), (3, 1000, 5000), (2, 8192, None)):
                pool = CachePool(
                    config, kv_format, sequences, context, num_drafts=num_drafts, drafts=drafts, cache_tokens=shared
                )
                assert pool.allocated_bytes == pool.plan.total_bytes, (drafts, num_drafts, sequences, context)


def test_allocated_bytes_are_those_of_the_storages():
    """Counted another way: from the storages behind the tensors."""
    pool = CachePool(tiny((0, 4, 128)), "fp8", 2, 300, num_drafts=2, drafts=True)
    tensors = [p for planes in pool.planes.values() for p in planes] + list(pool._tables.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == pool.plan.total_bytes


def test_a_sequence_s_bytes_are_what_one_more_sequence_allocates():
    config = tiny((0, 4, 128))
    context = PAGE_ROWS * 128  # whole pages, so that rows and pages are the same bytes
    one, two = (CachePool(config, "fp8", n, context, drafts=True) for n in (1, 2))
    tables = two.plan.table_bytes - one.plan.table_bytes
    assert two.allocated_bytes - one.allocated_bytes - tables == one.plan.sequence_bytes(context)


@pytest.mark.parametrize("ratios", [r for r in MIXES if r != (0,)], ids=str)
@pytest.mark.parametrize("cache_bytes", [0, 1000, 100_000, 3_000_000, 50_000_000])
def test_tokens_that_fit_never_take_more_bytes_and_one_page_more_would(ratios, cache_bytes):
    config = tiny(ratios)
    tokens = cache_tokens_in(config, "f32", cache_bytes, 3)
    unit = PAGE_ROWS * min(r for r in ratios if r)

    def taken(count: int) -> int:
        plan = plan_cache(config, "f32", 3, 1000, cache_tokens=count)
        return sum(plan.page_bytes[r] * n for r, n in plan.num_pages.items())

    assert tokens % unit == 0 and (tokens == 0 or taken(tokens) <= cache_bytes) and taken(tokens + unit) > cache_bytes


@pytest.mark.parametrize(
    ("changes", "ratios", "said"),
    [({"head_dim": 100}, (0,), "64"), ({"index_head_dim": 16}, (4,), "FP4|32")],
)
def test_a_shape_that_cannot_be_stored_is_refused_before_anything_is_allocated(changes, ratios, said):
    with pytest.raises(CheckpointError, match=said):
        CachePool(tiny(ratios, **changes), "fp8", 1, 10)


# Slots.


def test_slots_come_from_one_up_and_never_zero():
    pool = CachePool(tiny((0,)), "f32", 3, 10)
    assert [opened(pool).slot for _ in range(3)] == [1, 2, 3] and pool.num_free_slots == 0


def test_no_slot_free_says_how_many_are_taken_and_what_to_do():
    pool = CachePool(tiny((0, 4)), "f32", 2, 10)
    holdings, third = [opened(pool), opened(pool)], pool.open()
    before = state_of(pool)
    with pytest.raises(
        DoesNotFit, match="all 2 slots are taken: close a sequence or open the pool with more"
    ) as caught:
        pool.prepare(third, 0, 0)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (pool.plan.state_bytes, 0)
    assert state_of(pool) == before and pool.shortage(third, 0, 0).slots == 1
    slot = holdings[0].slot
    pool.release(holdings[0])
    pool.prepare(third, 0, 0)
    assert third.slot == slot


def test_releasing_twice_is_a_broken_invariant_and_frees_nothing_twice():
    pool = CachePool(tiny(), "f32", 2, 300)
    holding = opened(pool, 300)
    pool.release(holding)
    before = state_of(pool)
    for use in (
        pool.release,
        lambda h: pool.prepare(h, 0, 1),
        lambda h: pool.fork(h, 0),
        lambda h: pool.truncate(h, 0),
    ):
        with pytest.raises(CacheInvariantBroken, match="released"):
            use(holding)
    assert state_of(pool) == before


def test_a_page_nobody_holds_cannot_be_shared_or_given_back():
    pool = CachePool(tiny((4,)), "f32", 1, 300)
    for use in (pool.retain, pool.drop):
        with pytest.raises(CacheInvariantBroken):
            use(4, 1)


# Growth.


def test_growing_takes_pages_when_a_row_needs_one():
    pool = CachePool(tiny((4, 128)), "f32", 1, 9000)
    holding = pool.open()
    for context in (0, 3, 4, 256, 257, 259, 260, 8191, 8192, 8319, 8320, 9000):
        pool.prepare(holding, 0, context)
        assert {r: len(p) for r, p in holding.pages.items()} == {r: pages_for(context, r) for r in (4, 128)}
        assert all(table(pool, holding, r) == holding.pages[r] for r in (4, 128))


def test_preparing_for_less_gives_nothing_back_and_truncating_does():
    pool = CachePool(tiny((4,)), "f32", 2, 2000)
    holding = opened(pool, 2000)
    held = list(holding.pages[4])
    for context in (0, 1, 1999):
        pool.prepare(holding, 0, context)
        assert holding.pages[4] == held
    pool.truncate(holding, 257)
    assert holding.pages[4] == held[:1]
    pool.truncate(holding, 0)
    assert pool.num_free_pages(4) == pool.plan.num_pages[4] - 1


def test_a_context_too_long_carries_both_numbers_and_changes_nothing():
    pool = CachePool(tiny((4, 128)), "f32", 2, 300)
    holding = opened(pool, 100)
    before = state_of(pool)
    with pytest.raises(ContextTooLong, match="301 tokens were asked for and the context holds 300") as caught:
        pool.prepare(holding, 100, 301)
    assert (caught.value.asked_tokens, caught.value.max_tokens) == (301, 300)
    assert state_of(pool) == before
    pool.prepare(holding, 100, 300)


@pytest.mark.parametrize("ratio", [4, 128])
def test_growth_that_fails_for_one_ratio_changes_nothing_and_says_what_is_missing(ratio):
    """A sequence that cannot grow must not keep the pages that its other layers found."""
    pool = CachePool(tiny((4, 128)), "f32", 2, 9000)
    greedy, holding = opened(pool), opened(pool)
    while pool.num_free_pages(ratio):
        pool.take(ratio)
    before = state_of(pool)
    with pytest.raises(DoesNotFit, match=r"a longer history.*close a sequence first") as caught:
        pool.prepare(holding, 0, 9000)
    count = pages_for(9000, ratio)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (count * pool.plan.page_bytes[ratio], 0)
    assert pool.shortage(holding, 0, 9000).pages == {4: 0, 128: 0} | {ratio: count}
    assert state_of(pool) == before
    with pytest.raises(DoesNotFit):
        pool.take(ratio)
    pool.release(greedy)


# Sharing.


def write(pool: CachePool, holding: Holding, position: int, value: float) -> None:
    """Mark the rows that are finished at a position, and a ring row of it."""
    pool.prepare(holding, position, position + 1)
    for (layer, name), planes in pool.planes.items():
        spec = pool.streams[layer][name]
        if spec.is_history and (position + 1) % spec.per_tokens == 0:
            row = position // spec.per_tokens
            planes[0][holding.pages[spec.per_tokens][row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS] = value
        elif not spec.is_history:
            planes[0][holding.slot, position % planes[0].shape[1]] = value


def read(pool: CachePool, holding: Holding, length: int) -> list[float]:
    rows = []
    for (layer, name), planes in pool.planes.items():
        spec = pool.streams[layer][name]
        if spec.is_history:
            for row in range(length // spec.per_tokens):
                page = holding.pages[spec.per_tokens][row // PAGE_ROWS]
                rows.append(float(planes[0][page * PAGE_ROWS + row % PAGE_ROWS].flatten()[0]))
    return rows


def grown(pool: CachePool, length: int) -> Holding:
    holding = pool.open()
    for p in range(length):
        write(pool, holding, p, p)
    return holding


def test_a_fork_takes_nothing_until_somebody_writes():
    pool = CachePool(tiny((0, 4)), "f32", 4, 600)
    parent = grown(pool, 301)
    before = pool.num_free_slots, pool.num_free_pages(4)
    child = pool.fork(parent, 301)
    assert (pool.num_free_slots, pool.num_free_pages(4)) == before and child.slot == parent.slot
    assert child.pages == parent.pages and child.pages[4] is not parent.pages[4]


@pytest.mark.parametrize("length", [300, 301, 255, 256, 260, 512])
@pytest.mark.parametrize("first", ["parent", "child"])
def test_each_side_of_a_fork_keeps_its_own_past(length, first):
    pool = CachePool(tiny((0, 4, 128)), "f32", 4, 700)
    parent = grown(pool, length)
    child = pool.fork(parent, length)
    past = read(pool, parent, length)
    for holding, value in ((parent, 1000.0), (child, 2000.0))[:: 1 if first == "parent" else -1]:
        for p in range(length, length + 12):
            write(pool, holding, p, value)
    assert read(pool, parent, length) == read(pool, child, length) == past
    assert read(pool, parent, length + 12) != read(pool, child, length + 12)
    assert parent.slot != child.slot
    for holding in (parent, child):
        assert table(pool, holding, 4) == holding.pages[4]
    pool.release(parent)
    assert read(pool, child, length) == past
    pool.release(child)
    assert pool.num_free_slots == 4 and pool.num_free_pages(4) == pool.plan.num_pages[4] - 1


def test_the_writer_of_a_shared_page_appends_in_place():
    """What others read of it is settled; rows behind that are the writer's alone."""
    pool = CachePool(tiny((4,)), "f32", 2, 600)
    holding = grown(pool, 130)
    pool.seal(holding, 128)
    pool.retain(4, holding.pages[4][0])
    pages = list(holding.pages[4])
    write(pool, holding, 131, 7)
    assert holding.pages[4] == pages, "no copy"
    write(pool, holding, 127, 7)
    assert holding.pages[4] != pages, "but what is settled is never written in place"


def test_somebody_else_never_appends_in_place_while_the_page_is_shared():
    pool = CachePool(tiny((4,)), "f32", 2, 600)
    parent = grown(pool, 128)
    reader = pool.adopt({4: [parent.pages[4][0]]})
    write(pool, reader, 131, 9)
    assert reader.pages[4] != parent.pages[4] and read(pool, reader, 128) == read(pool, parent, 128)
    lone = pool.adopt({4: [parent.pages[4][0]]})
    pool.release(parent)
    page = lone.pages[4][0]
    write(pool, lone, 131, 9)
    assert lone.pages[4] == [page], "its only holder may"


def test_history_alone_can_be_prepared_without_a_slot():
    pool = CachePool(tiny((0, 4)), "f32", 1, 600)
    other = opened(pool)
    holding = pool.open()
    pool.prepare(holding, 0, 300, with_slot=False)
    assert holding.slot == 0 and len(holding.pages[4]) == 2
    pool.release(other)
    pool.prepare(holding, 300, 300)
    assert table(pool, holding, 4) == holding.pages[4]


def test_a_slot_that_is_left_keeps_the_pages():
    pool = CachePool(tiny((0, 4)), "f32", 1, 600)
    holding = grown(pool, 300)
    past = read(pool, holding, 300)
    pool.leave_slot(holding)
    assert pool.num_free_slots == 1 and holding.slot == 0 and read(pool, holding, 300) == past


# Rows.


def test_poison_fills_every_row_but_the_spare_ones():
    pool = CachePool(tiny((0, 4, 128)), "fp8", 2, 300, drafts=True)
    pool.poison()
    for planes in pool.planes.values():
        for plane in planes:
            assert not plane[0].any()
            rest = plane[1:]
            assert rest.isnan().all() if plane.is_floating_point() else (rest == 255).all()


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_the_last_streams_are_kept_by_slot(num_drafts):
    config = tiny()
    pool = CachePool(config, "f32", 2, 10, num_drafts=num_drafts, drafts=True)
    assert pool.draft_hidden.shape == (3, 1 + num_drafts, config.hc_mult * config.hidden_size)
    assert pool.draft_hidden.dtype == torch.float32
