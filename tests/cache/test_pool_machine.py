"""Pages and slots at random: opened, grown, cut back, forked, adopted, retained, released, asked for too much.

No network runs: every row and every ring place holds a number that is written once, so whose it is shows at once.
`PYROSOME_FUZZ_STEPS=1000000 pytest tests/cache/test_pool_machine.py` goes on for as long as one likes.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, pages_for
from pyrosome.errors import CacheInvariantBroken, ContextTooLong, DoesNotFit
from pyrosome.testing.shapes import tiny
from tests.machines import machine_test
from tests.networks import free

CONFIG = tiny((4, 8))  # pages of 256 and of 512 tokens
MAX_CONTEXT = 1300
MAX_OWNERS = 6
WHO = st.integers(0, 7)


@dataclasses.dataclass
class Owner:
    """A sequence, and what it wrote: per ratio its rows, and the ring's places that it may read."""

    holding: Holding
    length: int
    rows: dict[int, list[float]]
    ring: dict[int, float]


class Pages(RuleBasedStateMachine):
    @initialize(
        slots=st.sampled_from([2, 6, 6]),
        tokens=st.sampled_from([1300, 4000, 9000]),
        num_drafts=st.sampled_from([0, 3]),
    )
    def begin(self, slots, tokens, num_drafts):
        self.pool = CachePool(CONFIG, "f32", slots, MAX_CONTEXT, num_drafts=num_drafts, cache_tokens=tokens)
        self.pool.poison()
        self.owners: list[Owner] = []
        self.retained: list[tuple[int, int, list[float]]] = []  # ratio, page, its rows when it was retained
        self.numbers = itertools.count(1)
        streams = self.pool.streams
        self.planes = {  # one history plane of each ratio
            spec.per_tokens: planes[0]
            for (layer, name), planes in self.pool.planes.items()
            if (spec := streams[layer][name]).is_history
        }
        self.ring = next(p[0] for (layer, name), p in self.pool.planes.items() if name == "window_kv")
        self.open()
        self.grow(who=0, count=300, with_slot=True)

    # What happens

    @rule()
    def open(self):
        if len(self.owners) < MAX_OWNERS:
            self.owners.append(Owner(self.pool.open(), 0, {r: [] for r in self.planes}, {}))

    @precondition(lambda self: self.owners)
    @rule(who=WHO, count=st.integers(0, 9) | st.integers(0, 400), with_slot=st.sampled_from([True, True, True, False]))
    def grow(self, who, count, with_slot):
        o = self.one(who)
        start, stop = o.length, o.length + count
        if not with_slot and o.holding.slot:
            if sum(x.holding.slot == o.holding.slot for x in self.owners) > 1:
                with pytest.raises(CacheInvariantBroken, match="leave its slot"):
                    self.pool.prepare(o.holding, start, stop, with_slot=False)
            self.pool.leave_slot(o.holding)  # history alone is brought back: there is no state of that length
            o.ring = {}
        missing = self.pool.shortage(o.holding, start, stop, with_slot=with_slot)
        before = free(self.pool)
        if stop > MAX_CONTEXT or missing:
            with pytest.raises(ContextTooLong if stop > MAX_CONTEXT else DoesNotFit):
                self.pool.prepare(o.holding, start, stop, with_slot=with_slot)
            assert free(self.pool) == before, "all or nothing"
            return
        self.pool.prepare(o.holding, start, stop, with_slot=with_slot)
        for ratio, plane in self.planes.items():
            for row in range(start // ratio, stop // ratio):
                number = float(next(self.numbers))
                plane[o.holding.pages[ratio][row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS] = number
                o.rows[ratio].append(number)
        if with_slot:
            size = self.ring.shape[1]
            for position in range(max(start, stop - size), stop):
                o.ring[position % size] = number = float(next(self.numbers))
                self.ring[o.holding.slot, position % size] = number
        o.length = stop

    @precondition(lambda self: self.owners)
    @rule(who=WHO, count=st.integers(0, 9) | st.integers(0, 600))
    def cut_back(self, who, count):
        o = self.one(who)
        o.length = max(0, o.length - count)
        for ratio in o.rows:
            del o.rows[ratio][o.length // ratio :]
        self.pool.truncate(o.holding, o.length)

    @precondition(lambda self: self.owners)
    @rule(who=WHO, count=st.integers(1, 40), more=st.integers(1, 40))
    def go_another_way(self, who, count, more):
        """Cut back and go on at once: what was shared before must stay as it is for the others."""
        self.cut_back(who=who, count=count)
        self.grow(who=who, count=more, with_slot=True)

    @precondition(lambda self: self.owners)
    @rule(who=WHO, back=st.integers(0, 9), count=st.integers(1, 40), more=st.integers(1, 40), first=st.booleans())
    def part(self, who, back, count, more, first):
        """Fork twice, at two lengths; the first and the last go another way, one after the other."""
        self.fork(who=who, back=0)
        self.fork(who=who, back=back)
        at = [who % len(self.owners), len(self.owners) - 1]
        for each in at if first else at[::-1]:
            self.go_another_way(who=each, count=count, more=more)
            self.every_row_is_what_its_owner_wrote()

    @precondition(lambda self: self.owners)
    @rule(who=WHO, back=st.integers(0, 9))
    def fork(self, who, back):
        o = self.one(who)
        if len(self.owners) < MAX_OWNERS:
            before = free(self.pool)
            length = max(0, o.length - back)
            twin = self.pool.fork(o.holding, length)
            assert free(self.pool) == before, "a fork takes nothing"
            rows = {r: rows[: length // r] for r, rows in o.rows.items()}
            self.owners.append(Owner(twin, length, rows, dict(o.ring)))

    @precondition(lambda self: self.owners)
    @rule(who=WHO, blocks=st.integers(0, 10))
    def adopt(self, who, blocks):
        """Another begins with whole blocks of it, as a prefix hit does."""
        o = self.one(who)
        length = min(blocks, o.length // BLOCK_TOKENS) * BLOCK_TOKENS
        if len(self.owners) < MAX_OWNERS:
            self.pool.seal(o.holding, length)
            pages = {r: held[: pages_for(length, r)] for r, held in o.holding.pages.items()}
            rows = {r: rows[: length // r] for r, rows in o.rows.items()}
            self.owners.append(Owner(self.pool.adopt(pages), length, rows, {}))

    @precondition(lambda self: self.owners)
    @rule(who=WHO, which=WHO)
    def retain(self, who, which):
        """A page is held by itself, as the prefix tree holds them, with the whole blocks that are in it."""
        o = self.one(who)
        length = o.length // BLOCK_TOKENS * BLOCK_TOKENS
        self.pool.seal(o.holding, length)
        places = [(r, at) for r in self.planes for at in range(pages_for(length, r))]
        if places and len(self.retained) < 8:
            ratio, at = places[which % len(places)]
            page = o.holding.pages[ratio][at]
            self.pool.retain(ratio, page)
            rows = o.rows[ratio][: length // ratio][at * PAGE_ROWS : (at + 1) * PAGE_ROWS]
            self.retained.append((ratio, page, rows))

    @precondition(lambda self: self.retained)
    @rule(which=WHO)
    def drop(self, which):
        ratio, page, _ = self.retained.pop(which % len(self.retained))
        holders = self.pool.num_holders(ratio, page)
        assert self.pool.drop(ratio, page) == (holders == 1)

    @precondition(lambda self: self.owners)
    @rule(who=WHO)
    def leave_slot(self, who):
        o = self.one(who)
        self.pool.leave_slot(o.holding)
        o.ring = {}

    @precondition(lambda self: self.owners)
    @rule(who=WHO)
    def release(self, who):
        o = self.one(who)
        self.owners.remove(o)
        self.pool.release(o.holding)
        before = free(self.pool)
        for misuse in (
            lambda: self.pool.release(o.holding), lambda: self.pool.prepare(o.holding, 0, 1),
            lambda: self.pool.fork(o.holding, 0), lambda: self.pool.truncate(o.holding, 0),
        ):  # fmt: skip
            with pytest.raises(CacheInvariantBroken):
                misuse()
        assert free(self.pool) == before

    @rule(ratio=st.sampled_from([4, 8]))
    def take(self, ratio):
        if not self.pool.num_free_pages(ratio):
            with pytest.raises(DoesNotFit):
                self.pool.take(ratio)
        elif len(self.retained) < 8:
            page = self.pool.take(ratio)
            self.planes[ratio][page * PAGE_ROWS] = number = float(next(self.numbers))
            self.retained.append((ratio, page, [number]))

    def one(self, who) -> Owner:
        return self.owners[who % len(self.owners)]

    # What must hold

    @invariant()
    def every_row_is_what_its_owner_wrote(self):
        for o in getattr(self, "owners", []):
            for ratio, plane in self.planes.items():
                rows = [
                    plane[p * PAGE_ROWS : (p + 1) * PAGE_ROWS, 0] for p in o.holding.pages[ratio]
                ]  # one channel tells
                found = [v for part in rows for v in part.tolist()][: o.length // ratio]
                assert found == o.rows[ratio]
            if o.holding.slot:
                ring = self.ring[o.holding.slot, :, 0].tolist()
                assert all(ring[at] == number for at, number in o.ring.items())
        for ratio, page, rows in getattr(self, "retained", []):
            assert self.planes[ratio][page * PAGE_ROWS : page * PAGE_ROWS + len(rows), 0].tolist() == rows

    @invariant()
    def holders_add_up_and_nothing_is_both_free_and_held(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        for ratio in pool.ratios:
            held = [p for o in self.owners for p in o.holding.pages[ratio]]
            held += [p for r, p, _ in self.retained if r == ratio]
            assert 0 not in held
            assert all(pool.num_holders(ratio, p) == held.count(p) for p in set(held))
            assert pool.num_free_pages(ratio) + len(set(held)) == pool.plan.num_pages[ratio] - 1
            assert all(len(o.holding.pages[ratio]) >= pages_for(o.length, ratio) for o in self.owners)
            for o in self.owners:  # what a step reads through is what is held
                if o.holding.slot and sum(x.holding.slot == o.holding.slot for x in self.owners) == 1:
                    pages = o.holding.pages[ratio]
                    assert pool._tables[ratio][o.holding.slot, : len(pages)].tolist() == pages
        slots = {o.holding.slot for o in self.owners} - {0}
        assert pool.num_free_slots + len(slots) == pool.plan.num_slots - 1
        assert all(not table[0].any() for table in pool._tables.values()), "padding's pages are nobody's"

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for o in self.owners:
            self.pool.release(o.holding)
        for ratio, page, _ in self.retained:
            self.pool.drop(ratio, page)
        plan = self.pool.plan
        assert free(self.pool) == (plan.num_slots - 1, {r: n - 1 for r, n in plan.num_pages.items()})


TestPages = machine_test(Pages)
