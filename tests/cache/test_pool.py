"""The pool: what was planned is what is allocated, and no page or slot is ever in two places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyrosome.cache.pool import CachePool
from pyrosome.cache.streams import PAGE_ROWS, pages_for
from pyrosome.errors import CacheInvariantBroken, CheckpointError, ContextTooLong, DoesNotFit
from pyrosome.testing.shapes import tiny

MIXES = [(0,), (4,), (128,), (0, 4, 128, 4), (128, 0, 128), (4, 8, 64, 8), (1, 2)]


def all_pages(pool: CachePool, ratio: int) -> list[int]:
    """Every page somebody holds, or that is free."""
    held = [p for pages in pool._pages.values() for p in pages[ratio]]
    return held + pool._free_pages[ratio]


def state_of(pool: CachePool):
    """Everything the pool knows about who owns what."""
    return (
        {s: {r: list(p) for r, p in pages.items()} for s, pages in pool._pages.items()},
        {r: sorted(free) for r, free in pool._free_pages.items()},
        sorted(pool._free_slots),
        {r: t.tolist() for r, t in pool._tables.items()},
    )


# Planned is allocated.


@pytest.mark.parametrize("ratios", MIXES, ids=str)
@pytest.mark.parametrize("kv_format", ["f32", "bf16", "fp8"])
def test_planned_bytes_are_allocated_bytes(ratios, kv_format):
    config = tiny(ratios)
    for drafts in (False, True):
        for num_drafts in (0, 1, 3):
            for sequences, context in ((1, 1), (1, 255), (2, 257), (3, 1000), (2, 8192), (1, 8321)):
                pool = CachePool(config, kv_format, sequences, context, num_drafts=num_drafts, drafts=drafts)
                assert pool.allocated_bytes == pool.plan.total_bytes, (drafts, num_drafts, sequences, context)


def test_allocated_bytes_are_those_of_the_storages():
    """Counted another way: from the storages behind the tensors."""
    pool = CachePool(tiny((0, 4, 128)), "fp8", 2, 300, num_drafts=2, drafts=True)
    tensors = [p for planes in pool._planes.values() for p in planes] + list(pool._tables.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == pool.plan.total_bytes


def test_a_sequence_s_bytes_are_what_one_more_sequence_allocates():
    config = tiny((0, 4, 128))
    context = PAGE_ROWS * 128  # whole pages, so that rows and pages are the same bytes
    one, two = (CachePool(config, "fp8", n, context, drafts=True) for n in (1, 2))
    tables = two.plan.table_bytes - one.plan.table_bytes
    assert two.allocated_bytes - one.allocated_bytes - tables == one.plan.sequence_bytes(context)


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
    assert [pool.open(), pool.open(), pool.open()] == [1, 2, 3]
    assert pool.num_free_slots == 0


def test_no_slot_free_says_how_many_are_taken_and_what_to_do():
    pool = CachePool(tiny((0, 4)), "f32", 2, 10)
    slots = [pool.open(), pool.open()]
    before = state_of(pool)
    with pytest.raises(
        DoesNotFit, match=r"all 2 slots are taken: close a sequence or open the pool with more"
    ) as caught:
        pool.open()
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (pool.plan.state_bytes, 0)
    assert state_of(pool) == before
    pool.close(slots[0])
    assert pool.open() == slots[0]


@pytest.mark.parametrize("slot", [0, 2, 7, -1])
def test_closing_what_is_not_open_is_a_broken_invariant(slot):
    pool = CachePool(tiny(), "f32", 2, 300)
    opened = pool.open()
    pool.grow(opened, 300)
    before = state_of(pool)
    with pytest.raises(CacheInvariantBroken, match=f"slot {slot} "):
        pool.close(slot)
    assert state_of(pool) == before


def test_closing_twice_is_a_broken_invariant_and_frees_nothing_twice():
    pool = CachePool(tiny(), "f32", 2, 300)
    slot = pool.open()
    pool.grow(slot, 300)
    pool.close(slot)
    before = state_of(pool)
    with pytest.raises(CacheInvariantBroken, match="closed"):
        pool.close(slot)
    assert state_of(pool) == before


# Growth.


def test_growing_takes_pages_when_a_row_needs_one():
    pool = CachePool(tiny((4, 128)), "f32", 1, 9000)
    slot = pool.open()
    for context in (0, 3, 4, 256, 257, 259, 260, 8191, 8192, 8319, 8320, 9000):
        pool.grow(slot, context)
        assert {r: len(p) for r, p in pool._pages[slot].items()} == {r: pages_for(context, r) for r in (4, 128)}


def test_growing_to_less_gives_nothing_back_and_keeps_the_pages_in_order():
    pool = CachePool(tiny((4,)), "f32", 2, 2000)
    slot = pool.open()
    pool.grow(slot, 2000)
    held = list(pool._pages[slot][4])
    for context in (0, 1, 1999):
        pool.grow(slot, context)
        assert pool._pages[slot][4] == held


def test_a_context_too_long_carries_both_numbers_and_changes_nothing():
    pool = CachePool(tiny((4, 128)), "f32", 2, 300)
    slot = pool.open()
    pool.grow(slot, 100)
    before = state_of(pool)
    with pytest.raises(ContextTooLong, match="301 tokens were asked for and the context holds 300") as caught:
        pool.grow(slot, 301)
    assert (caught.value.asked_tokens, caught.value.max_tokens) == (301, 300)
    assert state_of(pool) == before
    pool.grow(slot, 300)


def without_free_pages(ratio: int) -> tuple[CachePool, int]:
    """A pool whose other sequences hold every page of one ratio, and a slot that has none yet."""
    pool = CachePool(tiny((4, 128)), "f32", 2, 9000)
    greedy, slot = pool.open(), pool.open()
    taken, pool._free_pages[ratio] = pool._free_pages[ratio], []
    pool._pages[greedy][ratio] += taken
    pool._tables[ratio][greedy] = torch.tensor(taken)[: pool._tables[ratio].shape[1]]
    return pool, slot


def test_no_page_free_says_how_many_bytes_are_missing():
    pool, slot = without_free_pages(4)
    with pytest.raises(DoesNotFit, match=r"a longer history.*close a sequence first") as caught:
        pool.grow(slot, 9000)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (36 * pool.plan.page_bytes[4], 0)


@pytest.mark.parametrize("ratio", [4, 128])
def test_growth_that_fails_for_one_ratio_leaves_everything_as_it_was(ratio):
    """A sequence that cannot grow must not keep the pages that its other layers found."""
    pool, slot = without_free_pages(ratio)
    before = state_of(pool)
    with pytest.raises(DoesNotFit):
        pool.grow(slot, 9000)
    assert state_of(pool) == before


@pytest.mark.parametrize("ratio", [4, 128])
def test_growth_that_fails_leaks_no_page(ratio):
    pool, slot = without_free_pages(ratio)
    with pytest.raises(DoesNotFit):
        pool.grow(slot, 9000)
    pool.close(slot)
    for r in (4, 128):
        assert sorted(all_pages(pool, r)) == list(range(1, pool.plan.num_pages[r]))


# Any order of opening, growing and closing.


class Pools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = CachePool(tiny((0, 4, 128, 16)), "f32", 3, 8500)
        self.grown: dict[int, int] = {}  # slot -> the longest context it was grown to

    def choose(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.grown)))

    @precondition(lambda self: len(self.grown) < 3)
    @rule()
    def open(self) -> None:
        slot = self.pool.open()
        assert slot not in self.grown
        self.grown[slot] = 0

    @precondition(lambda self: len(self.grown) == 3)
    @rule()
    def open_too_many(self) -> None:
        with pytest.raises(DoesNotFit):
            self.pool.open()

    @precondition(lambda self: self.grown)
    @rule(data=st.data(), context=st.one_of(st.integers(0, 8500), st.sampled_from([256, 260, 8191, 8192, 8320, 8500])))
    def grow(self, data, context) -> None:
        slot = self.choose(data)
        self.pool.grow(slot, context)
        self.grown[slot] = max(self.grown[slot], context)

    @precondition(lambda self: self.grown)
    @rule(data=st.data(), beyond=st.integers(1, 10**9))
    def grow_too_far(self, data, beyond) -> None:
        with pytest.raises(ContextTooLong):
            self.pool.grow(self.choose(data), 8500 + beyond)

    @precondition(lambda self: self.grown)
    @rule(data=st.data())
    def close(self, data) -> None:
        slot = self.choose(data)
        self.pool.close(slot)
        del self.grown[slot]

    @precondition(lambda self: len(self.grown) < 3)
    @rule(data=st.data())
    def close_what_is_not_open(self, data) -> None:
        with pytest.raises(CacheInvariantBroken):
            self.pool.close(data.draw(st.sampled_from(sorted({0, 1, 2, 3} - self.grown.keys()))))

    @invariant()
    def slots_add_up(self) -> None:
        assert sorted([*self.grown, *self.pool._free_slots]) == [1, 2, 3]
        assert self.pool.num_free_slots == 3 - len(self.grown)

    @invariant()
    def every_page_is_in_one_place_and_page_zero_in_none(self) -> None:
        for ratio, total in self.pool.plan.num_pages.items():
            assert sorted(all_pages(self.pool, ratio)) == list(range(1, total))
            held = sum(pages_for(context, ratio) for context in self.grown.values())
            assert self.pool.num_free_pages(ratio) == total - 1 - held

    @invariant()
    def tables_are_the_lists(self) -> None:
        for ratio, table in self.pool._tables.items():
            for slot in range(4):
                pages = self.pool._pages[slot][ratio] if slot in self.grown else []
                assert len(pages) == pages_for(self.grown.get(slot, 0), ratio)
                assert table[slot].tolist() == pages + [0] * (table.shape[1] - len(pages))


Pools.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_no_order_of_opening_growing_and_closing_breaks_the_pool = Pools.TestCase


# Rows.


def test_poison_fills_every_row_but_the_spare_ones():
    pool = CachePool(tiny((0, 4, 128)), "fp8", 2, 300, drafts=True)
    pool.poison()
    for planes in pool._planes.values():
        for plane in planes:
            assert not plane[0].any()
            rest = plane[1:]
            assert rest.isnan().all() if plane.is_floating_point() else (rest == 255).all()


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_the_last_streams_are_kept_by_slot(num_drafts):
    config = tiny()
    pool = CachePool(config, "f32", 2, 10, num_drafts=num_drafts, drafts=True)
    assert pool.draft_hidden.shape == (3, 1 + num_drafts, config.hc_mult * config.hidden_size)
