"""Whatever is published, cut back, forked, evicted, spilled, brought back or damaged: every row is what was written.

No network runs: each row holds a hash of its salt and of all ids up to it, so a row of anybody else's shows at once.
`PYROSOME_FUZZ_STEPS=1000000 pytest tests/cache/test_prefix_machine.py` goes on for as long as one likes.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyrosome.cache.blocks import block_bytes
from pyrosome.cache.nodes import Cursor, Node
from pyrosome.cache.pool import CachePool, Holding, Shortage
from pyrosome.cache.prefix import PrefixTree
from pyrosome.cache.state import Snapshot, snapshot_bytes
from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS
from pyrosome.cache.tiers import Tiers
from pyrosome.testing.shapes import tiny
from tests.machines import machine_test

CONFIG = tiny((4, 8))  # pages of two and of four blocks
MAX_CONTEXT = 12 * BLOCK_TOKENS
MAX_LIVE = 3
GROUP = 4  # tokens of the finest row
WHO = st.integers(0, 5)
SELDOM = st.sampled_from([False] * 7 + [True])
OFTEN = st.sampled_from([True, True, False])


def _books() -> list[list[int]]:
    """Texts that begin alike and part within a block, at the end of one, and at the end of a page."""
    chance = random.Random(3)

    def text(n: int) -> list[int]:
        return [chance.randrange(160) for _ in range(n)]

    first = text(MAX_CONTEXT)
    return [first, *(first[:at] + text(MAX_CONTEXT - at) for at in (150, 256, 384, 640))]


BOOKS = _books()


def hashes(salt: str, ids: list[int], known: list[int] | None = None) -> list[int]:
    """After each four ids, a hash of all so far."""
    out = list(known or [])
    h = out[-1] if out else hash((len(salt), *salt.encode()))
    for at in range(GROUP * len(out), len(ids) - GROUP + 1, GROUP):
        h = hash((h, *ids[at : at + GROUP]))
        out.append(h)
    return out


def rows_of(after: np.ndarray, ratio: int) -> np.ndarray:
    """What the rows of one ratio must hold."""
    return ((after[ratio // GROUP - 1 :: ratio // GROUP] + ratio) & 0xFFFFFF).astype(np.float32)


@dataclasses.dataclass
class Written:
    """A sequence, and what it wrote."""

    salt: str
    ids: list[int]
    holding: Holding
    cursor: Cursor
    length: int
    after: list[int]

    @property
    def hashes(self) -> np.ndarray:
        return np.array(self.after[: self.length // GROUP], dtype=np.int64)


class Prefixes(RuleBasedStateMachine):
    @initialize(host=st.sampled_from([0, 3, 8]), disk=st.booleans(), states=st.sampled_from([0, 3, 20]), keep=WHO)
    def begin(self, host, disk, states, keep):
        self.folder = tempfile.mkdtemp() if disk else ""
        self.host, self.states, self.shadows = host, states, 4 + 4 * keep
        self.live: list[Written] = []
        self.boot()
        self.enter("", BOOKS[0][:300])

    def boot(self):
        self.pool = CachePool(CONFIG, "f32", 3, MAX_CONTEXT, cache_tokens=24 * BLOCK_TOKENS)
        self.pool.poison()
        size = block_bytes(self.pool)
        tiers = None
        if self.host or self.folder:
            tiers = Tiers(self.host * size, self.folder, 30 * (size + 2000), "model", size)
        self.state_size = snapshot_bytes(self.pool, BLOCK_TOKENS)
        self.tree = PrefixTree(
            self.pool, snapshot_bytes=self.states * self.state_size, tiers=tiers, max_shadows=self.shadows
        )
        self.rows = {ratio: [] for ratio in self.pool.ratios}
        for (layer, name), planes in self.pool.planes.items():
            spec = self.pool.streams[layer][name]
            if spec.is_history:
                self.rows[spec.per_tokens] += [p.numpy()[:, 0] for p in planes] + [p.numpy()[:, -1] for p in planes]
        self.published: set[tuple[str, int]] = set()
        self.node_hashes: dict[Node, np.ndarray] = {}

    def teardown(self):
        for s in getattr(self, "live", []):
            self.pool.release(s.holding)
        if hasattr(self, "tree"):
            self.tree.forget()
            for ratio in self.pool.ratios:
                assert self.pool.num_free_pages(ratio) == self.pool.plan.num_pages[ratio] - 1
            assert self.tree.num_blocks == self.tree.snapshot_bytes == self.tree.num_shadows == 0
            shutil.rmtree(self.folder, ignore_errors=True)

    # What happens

    @rule(book=st.integers(0, 4), length=st.integers(100, MAX_CONTEXT), salt=st.sampled_from(["", "", "", "b"]))
    def open(self, book, length, salt):
        self.enter(salt, BOOKS[book][:length])

    @rule(book=st.integers(0, 4), blocks=st.integers(1, 11), past=st.sampled_from([0, 1]))
    def open_at_a_boundary(self, book, blocks, past):
        self.enter("", BOOKS[book][: blocks * BLOCK_TOKENS + past])

    def enter(self, salt, ids):
        if len(self.live) == MAX_LIVE:
            self.release(0)
        after = hashes(salt, ids)
        match = self.tree.match(ids, salt, len(ids) - 1)
        found = match.length
        assert found <= len(ids) - 1 and found % BLOCK_TOKENS == 0
        most = 0
        while (most + 1) * BLOCK_TOKENS < len(ids) and (salt, after[(most + 1) * 32 - 1]) in self.published:
            most += 1
        assert found >= most * BLOCK_TOKENS, "what was published and never evicted is found"
        whole = (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        has_state = match.snapshot is not None or found == 0
        at = match.snapshot.length if match.snapshot else 0
        assert (match.limit in ("all", "no snapshot")) == (found == whole)
        assert (match.limit == "all") == (found == whole and has_state and at == found)
        evicted = self.tree.counters.evicted_blocks
        holding, match = self.tree.adopt(match)
        if self.tree.counters.evicted_blocks > evicted:
            self.published.clear()
        assert match.length <= found
        assert all(len(p) == -(-match.length // (r * PAGE_ROWS)) for r, p in holding.pages.items())
        if match.snapshot:
            assert match.snapshot.length <= match.length
            self.check_state(match.snapshot, after)
        self.live.append(
            Written(salt, ids[: match.length], holding, self.tree.cursor(salt, match), match.length, after)
        )

    def check_state(self, snapshot: Snapshot, after: list[int]):
        assert snapshot.num_bytes == self.state_size
        assert int(snapshot.data[:8].clone().view(torch.int64)) == after[snapshot.length // GROUP - 1]

    @rule(who=WHO, book=st.integers(0, 4), count=st.sampled_from([1, 5, 60, 128, 131, 256, 700, 1100]), tell=OFTEN)
    def extend(self, who, book, count, tell):
        s = self.live[who % len(self.live)]
        stop = min(s.length + count, MAX_CONTEXT)
        missing = self.pool.shortage(s.holding, s.length, stop, with_slot=False)
        if missing:
            self.published.clear()
            if not self.tree.make_room(missing):
                return
            assert not self.pool.shortage(s.holding, s.length, stop, with_slot=False)
        self.pool.prepare(s.holding, s.length, stop, with_slot=False)
        start, s.ids = s.length, s.ids[: s.length] + BOOKS[book][s.length : stop]
        s.after, s.length = hashes(s.salt, s.ids, s.after[: s.length // GROUP]), stop
        for ratio, planes in self.rows.items():
            row = np.arange(start // ratio, stop // ratio)
            place = np.array(s.holding.pages[ratio], dtype=np.int64)[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
            for plane in planes:
                plane[place] = rows_of(s.hashes, ratio)[row]
        if tell:
            self.publish(who, True)

    @rule(who=WHO, with_state=OFTEN, pinned=st.booleans())
    def publish(self, who, with_state, pinned=False):
        s = self.live[who % len(self.live)]
        self.tree.publish(s.cursor, s.ids, s.holding, s.length)
        whole = s.length // BLOCK_TOKENS
        if s.cursor.node.is_forgotten:
            return
        self.published |= {(s.salt, s.after[(i + 1) * 32 - 1]) for i in range(whole)}
        assert s.cursor.node.depth == whole
        if whole and with_state:
            data = torch.zeros(self.state_size, dtype=torch.uint8)
            data[:8] = torch.tensor([s.after[whole * 32 - 1]]).view(torch.uint8)
            self.tree.keep_snapshot(s.cursor, Snapshot(whole * BLOCK_TOKENS, 0, data), pinned=pinned)

    @rule(who=WHO, count=st.integers(1, BLOCK_TOKENS - 1), give_back=st.booleans())
    def rewind(self, who, count, give_back):
        s = self.live[who % len(self.live)]
        s.length = max(0, s.length - count)
        self.settle_back(s, give_back)
        # The cursor is behind by less than a block since the last publication: it is told by the next one.
        self.tree.publish(s.cursor, s.ids, s.holding, s.length)

    @rule(who=WHO, count=st.integers(BLOCK_TOKENS, 900), give_back=st.booleans())
    def rewind_far(self, who, count, give_back):
        s = self.live[who % len(self.live)]
        s.length = max(0, s.length - count)
        self.settle_back(s, give_back)
        s.cursor = self.tree.cursor(s.salt, self.tree.match(s.ids, s.salt, s.length))

    def settle_back(self, s, give_back):
        s.ids = s.ids[: s.length]
        if give_back:
            self.pool.truncate(s.holding, s.length)

    @rule(who=WHO, count=st.sampled_from([1, 2, 8]), book=st.integers(0, 4), more=st.sampled_from([1, 9, 130, 260]))
    def take_back_and_go_on(self, who, count, book, more):
        """As after rejected ids: nobody tells the tree."""
        s = self.live[who % len(self.live)]
        s.length = max(0, s.length - count)
        self.settle_back(s, False)
        self.extend(who, book, more, True)

    @rule(who=WHO)
    def fork(self, who):
        s = self.live[who % len(self.live)]
        if len(self.live) == MAX_LIVE:
            return
        twin = dataclasses.replace(s, ids=list(s.ids), cursor=copy.copy(s.cursor), after=list(s.after))
        twin.holding = self.pool.fork(s.holding, s.length)
        self.live.append(twin)

    @rule(who=WHO)
    def release(self, who):
        if len(self.live) > 1:  # never all: something is there to go on with
            self.pool.release(self.live.pop(who % len(self.live)).holding)

    @rule(who=WHO, book=st.integers(0, 4), length=st.integers(100, MAX_CONTEXT), pages=st.integers(0, 15))
    def come_and_go(self, who, book, length, pages):
        """One ends, some of what is known has to leave, another comes and computes all of its prompt."""
        self.release(who)
        if pages:
            self.evict(pages, 4)
        self.enter("", BOOKS[book][:length])
        self.extend(len(self.live) - 1, book, length - self.live[-1].length, True)

    @rule(pages=st.integers(1, 12), ratio=st.sampled_from([4, 8]))
    def evict(self, pages, ratio):
        self.published.clear()
        free = self.pool.num_free_pages(ratio)
        could = self.could_free(ratio)
        assert self.tree.make_room(Shortage(0, {ratio: pages})) == (could >= pages)
        assert self.pool.num_free_pages(ratio) >= free + min(pages, could)

    def could_free(self, ratio):
        """Pages that nobody but the tree holds."""
        held = {p for s in self.live for p in s.holding.pages[ratio]}
        return len({p for r, p in self.tree._held if r == ratio} - held)

    @rule(book=st.integers(0, 4), salt=st.sampled_from(["", "b"]), now=SELDOM)
    def drop_path(self, book, salt, now):
        if now and self.tree.match(BOOKS[book], salt, BLOCK_TOKENS).length:
            self.published.clear()
            self.tree.drop_path(BOOKS[book], salt)
            assert self.tree.match(BOOKS[book], salt, MAX_CONTEXT).length == 0

    @rule(salt=st.sampled_from(["", "b", None]), now=SELDOM)
    def forget(self, salt, now):
        if now:
            self.published.clear()
            self.tree.forget(salt)
            assert self.tree.match(BOOKS[0], salt or "", MAX_CONTEXT).length == 0

    @rule(stored=st.booleans(), now=SELDOM)
    def restart(self, stored, now):
        """Another process, on the same folder."""
        if self.folder and now:
            if stored:
                self.tree.store()
            self.live.clear()
            self.boot()
            self.enter("", BOOKS[0][:300])

    @rule(
        which=st.integers(0, 1000), at=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["cut", "flip", "gone"])
    )
    def damage(self, which, at, how):
        files = sorted(Path(self.folder).iterdir()) if self.folder else []
        if files:
            path = files[which % len(files)]
            raw = bytearray(path.read_bytes())
            at = int(at * len(raw))
            if how == "gone":
                path.unlink()
            elif how == "cut":
                path.write_bytes(raw[:at])
            elif raw:
                raw[at] ^= 0x40
                path.write_bytes(raw)

    # What must hold

    @invariant()
    def every_row_is_what_its_sequence_wrote(self):
        for s in getattr(self, "live", []):
            after = s.hashes
            for ratio, planes in self.rows.items():
                row = np.arange(s.length // ratio)
                pages = np.array(s.holding.pages[ratio], dtype=np.int64)
                place = pages[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
                for plane in planes:
                    assert np.array_equal(plane[place], rows_of(after, ratio))

    @invariant()
    def the_tree_s_pages_hold_what_it_says(self):
        """A block's rows and those before it in its page; so that no sealed row ever changes."""
        if not hasattr(self, "tree"):
            return
        held: Counter[tuple[int, int]] = Counter()
        num_blocks = state_bytes = 0
        current = {e[2] for e in self.tree._heap if e[0] == e[2].worth}
        stack = [(root, salt) for salt, root in self.tree._roots.items()]
        while stack:
            node, salt = stack.pop()
            stack += [(c, salt) for c in node.children.values()]
            resident = [c for c in node.children.values() if c.pages is not None]
            assert node.num_resident == len(resident)
            assert node.is_linked and not node.is_forgotten
            if node.snapshot:
                state_bytes += node.snapshot.num_bytes
                self.check_state(node.snapshot, self.hashes_of(node, salt).tolist())
            if node.parent is None:
                continue
            assert node.parent.children[node.key] is node
            assert (node.pages is None) == (node in self.tree._shadows)
            if node.pages is None:
                continue
            assert node.parent.pages is not None, "a block's predecessor is in the pool as well"
            assert resident or node in current, "a leaf can be evicted"
            num_blocks += 1
            after = self.hashes_of(node, salt)
            for ratio, page in node.pages.items():
                held[ratio, page] += 1
                per_page = PAGE_ROWS * ratio // BLOCK_TOKENS
                first = (node.depth - 1) // per_page * per_page * BLOCK_TOKENS // ratio
                expected = rows_of(after, ratio)[first:]
                for plane in self.rows[ratio]:
                    assert np.array_equal(plane[page * PAGE_ROWS :][: len(expected)], expected)
                if resident and node.depth % per_page:
                    assert page in {c.pages[ratio] for c in resident}, "a block leans on one after it in its page"
        assert held == self.tree._held
        assert num_blocks == self.tree.num_blocks
        assert state_bytes == self.tree.snapshot_bytes <= self.states * self.state_size
        assert self.tree.num_shadows <= self.shadows

    def hashes_of(self, node, salt):
        if node not in self.node_hashes:
            before = self.hashes_of(node.parent, salt).tolist() if node.parent else []
            ids = [0] * GROUP * len(before) + np.frombuffer(node.key, np.int32).tolist()
            self.node_hashes[node] = np.array(hashes(salt, ids, before), dtype=np.int64)
        return self.node_hashes[node]

    @invariant()
    def holders_add_up_and_no_page_is_both_free_and_held(self):
        for ratio in self.pool.ratios if hasattr(self, "pool") else ():
            book = self.pool._pages[ratio]
            holders = np.zeros(len(book.refs), dtype=np.int64)
            for s in self.live:
                np.add.at(holders, s.holding.pages[ratio], 1)
            for (r, page), count in self.tree._held.items():
                if r == ratio:
                    holders[page] += count
            assert np.array_equal(holders, book.refs)
            free = np.array(book.free, dtype=np.int64)
            assert len(set(book.free)) == len(free) and 0 not in book.free
            assert not holders[free].any() and len(free) + (holders > 0).sum() == len(holders) - 1


TestPrefixes = machine_test(Prefixes)
