"""The prefix tree: what was computed for one request, found again by the next.

A node is a block of 128 ids under its predecessor, and holds the pages its history rows are in; some nodes also hold
a snapshot of the state after them.  Between snapshots state is replayed (`engine.runner`), so any block is a place to
go on from.  Roots are salted: nothing is shared between two salts.

A page holds several blocks' rows.  Who writes a block has all earlier rows of its page in it too, copied or computed;
so a chain's pages are those of its last block within each page, and the blocks before lean on them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from weakref import WeakValueDictionary

import torch

from pyrosome.cache.blocks import read_block, write_blocks
from pyrosome.cache.nodes import Counters as Counters
from pyrosome.cache.nodes import Cursor as Cursor
from pyrosome.cache.nodes import Match as Match
from pyrosome.cache.nodes import Node, common_tokens, keys_of
from pyrosome.cache.pool import CachePool, Holding, Shortage
from pyrosome.cache.shelf import Shelf
from pyrosome.cache.state import Snapshot, snapshot_bytes
from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, pages_for
from pyrosome.cache.tiers import TAG_BYTES, Label, Tiers, block_name
from pyrosome.config import CSA_RATIO, ModelConfig

MAX_SHADOWS = 16_384  # blocks remembered that are not in the pool: in a tier, or gone (then it can be said they were)
RESTORED_AT_ONCE = 64  # blocks brought back together: bounds what is held twice
MAX_USES = 16  # beyond it one more use makes a block no more worth keeping
COMPARED_CHILDREN = 256  # branches looked at to say where a prompt leaves what is known


class PrefixTree:
    """Blocks of history by what they stand for.

    Args:
        snapshot_bytes: host memory that snapshots may take.
        tiers: where blocks and snapshots go that have to leave; None: they are forgotten.
        max_shadows: blocks remembered by their ids after they have left the pool.
    """

    def __init__(
        self, pool: CachePool, *, snapshot_bytes: int, tiers: Tiers | None = None, max_shadows: int = MAX_SHADOWS
    ) -> None:
        self.pool, self.tiers = pool, tiers
        self.counters = Counters()
        self.num_blocks = 0
        self._shelf = Shelf(snapshot_bytes, self.counters, self._store_snapshot)
        # By salt, of which clients choose any number: a root that nothing grows from and nobody stands on goes.
        self._roots: WeakValueDictionary[str, Node] = WeakValueDictionary()
        self._grown: set[Node] = set()  # roots with blocks, which stay
        self._held: dict[tuple[int, int], int] = {}  # (ratio, page) -> nodes that hold it
        self._heap: list[tuple[float, int, Node]] = []  # leaves and what once were leaves, the least worth first
        self._numbers = itertools.count()
        self._clock = 0.0  # worth of what was evicted last: what is not used again grows old against it
        self._shadows: OrderedDict[Node, None] = OrderedDict()  # who left the pool longest ago first
        self._max_shadows = max_shadows
        self._depth_cost = depth_cost(pool.config)
        self._streams = {
            s.per_tokens: s.name for by_name in pool.streams.values() for s in by_name.values() if s.is_history
        }

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of all snapshots in memory."""
        return self._shelf.num_bytes

    @property
    def num_pages(self) -> dict[int, int]:
        """Pages the tree holds, by tokens per row; others may hold them too."""
        held = Counter(ratio for ratio, _ in self._held)
        return {ratio: held[ratio] for ratio in self.pool.ratios}

    @property
    def num_snapshots(self) -> int:
        return len(self._shelf)

    @property
    def num_shadows(self) -> int:
        """Blocks remembered that are not in the pool."""
        return len(self._shadows)

    # Finding

    def cursor(self, salt: str, match: Match | None = None) -> Cursor:
        """Where a new sequence stands: at the root, or at the end of what was found of it."""
        return Cursor(salt, match.nodes[-1] if match and match.nodes else self._root(salt))

    def match(self, ids: Sequence[int], salt: str, limit: int) -> Match:
        """The longest chain of known blocks in the first `limit` ids; of a prompt, all but the last id.

        Nothing is taken: between this and `adopt` nothing else may be done with the tree.
        """
        most = max(0, min(limit, len(ids), self.pool.max_context)) // BLOCK_TOKENS
        keys = list(keys_of(ids, 0, most))
        node, nodes = self._root(salt), []
        for key in keys:
            child = node.children.get(key) or self._stored(node, key)
            if child is None or not self._is_there(child):
                break
            nodes.append(child)
            node = child
        return self._explained(nodes, salt, keys)

    def _explained(self, nodes: list[Node], salt: str, keys: list[bytes]) -> Match:
        snapshot = self._nearest(nodes)
        last, length = nodes[-1] if nodes else self._root(salt), len(nodes) * BLOCK_TOKENS
        at = snapshot.length if snapshot else 0
        replay = "" if at == length else f"; state is kept at token {at}, that at {length} is replayed"
        if len(nodes) == len(keys):
            most = f"all {length} tokens that can be reused are known"
            if not keys:
                most = f"nothing to reuse: a prompt's last token is computed, and no {BLOCK_TOKENS} come before it"
            if at < length:
                return Match(nodes, salt, snapshot, "no snapshot", "window_kv", most + replay)
            return Match(nodes, salt, snapshot, "all", "", most)
        next_key = keys[len(nodes)]
        if gone := last.children.get(next_key):
            count, stream = 1, self._streams.get(gone.short_of, "")
            for key in keys[len(nodes) + 1 :]:
                if key not in gone.children or self._is_there(gone.children[key]):
                    break
                count, gone = count + 1, gone.children[key]
            reason = f"{length} tokens are known; {count} blocks of 128 after them were, and had to leave the cache"
            return Match(nodes, salt, snapshot, "evicted", stream, reason + replay)
        if last.children:  # whoever parts here again finds the state ready
            self._shelf.touch(last, pinned=True)
        others = [c.key for c in itertools.islice(last.children.values(), COMPARED_CHILDREN)]
        parts = f"the prompt leaves what is known at token {length + common_tokens(next_key, others)}"
        reason = f"{parts}; {length} tokens before that are known as whole blocks of 128"
        return Match(nodes, salt, snapshot, "no common prefix", "", reason + replay)

    def _nearest(self, nodes: list[Node]) -> Snapshot | None:
        """The deepest state there is, in memory or in a tier."""
        for n in reversed(nodes):
            if n.snapshot is not None:
                self._shelf.touch(n)
                return n.snapshot
            found = self.tiers.get("state", _label(n)) if self.tiers and self.tiers.has("state", n.name) else None
            if found and found[1].numel() == snapshot_bytes(self.pool, n.length):
                snapshot = Snapshot(n.length, found[0].draft_from, found[1])
                if n.is_linked:
                    self._shelf.put(n, snapshot)
                return snapshot
        return None

    # Going on from what was found

    def adopt(self, match: Match) -> tuple[Holding, Match]:
        """A holding of the matched history, and what of the match there was room for.

        Blocks that are in a tier are brought back into pages first, others making way.
        """
        at = next((i for i, n in enumerate(match.nodes) if n.pages is None), len(match.nodes))
        holding = self.pool.adopt(self._chain_pages(match.nodes[:at]))
        try:
            while at < len(match.nodes):
                count = self._bring_back(match.nodes, at, holding)
                if not count:
                    break
                at += count
        except BaseException:
            self.pool.release(holding)
            raise
        kept = match.nodes[:at]
        for n in kept:
            n.uses += 1
            self._value(n)
        if kept:
            self._offer(kept[-1])
        if at == len(match.nodes):
            return holding, match
        reason = f"{at * BLOCK_TOKENS} of {match.length} known tokens are in the cache, or found room there again"
        return holding, Match(kept, match.salt, self._nearest(kept), "evicted", match.stream, reason)

    def _bring_back(self, nodes: list[Node], first: int, holding: Holding) -> int:
        """Blocks from `first` on from their tier into pages of the holding's own; how many it was."""
        data = []
        for n in nodes[first : first + RESTORED_AT_ONCE]:
            block = self.tiers.get("block", _label(n)) if self.tiers and not n.is_forgotten else None
            if block is None:
                break
            data.append(block[1])
        while data:
            start, stop = first * BLOCK_TOKENS, (first + len(data)) * BLOCK_TOKENS
            missing = self.pool.shortage(holding, start, stop, with_slot=False)
            if not missing or self.make_room(missing, dig=False):
                break
            del data[len(data) // 2 :]
        if not data:
            return 0
        self.pool.prepare(holding, start, stop, with_slot=False)
        write_blocks(self.pool, holding.pages, first, torch.stack(data))
        self.pool.seal(holding, stop)
        for n in nodes[first : first + len(data)]:
            self._retain(n, holding)
        self.counters.restored_blocks += len(data)
        return len(data)

    def _chain_pages(self, nodes: list[Node]) -> dict[int, list[int]]:
        """A chain's pages: for each place the page of the last block in it."""
        pages: dict[int, list[int]] = {}
        for ratio in self.pool.ratios:
            per_page = _blocks_per_page(ratio)
            count = pages_for(len(nodes) * BLOCK_TOKENS, ratio)
            last = [nodes[min(len(nodes), (i + 1) * per_page) - 1] for i in range(count)]
            pages[ratio] = [n.pages[ratio] for n in last if n.pages is not None]
        return pages

    # Adding

    def publish(self, cursor: Cursor, ids: Sequence[int], holding: Holding, length: int) -> None:
        """Make every whole block of a sequence's first `length` tokens known; costs only what is new.

        A sequence that was cut back may go on with other ids, if it was cut back by less than a block since the last
        call.  One whose prefix was forgotten in the meantime is not published again.
        """
        most = length // BLOCK_TOKENS
        node: Node | None = cursor.node
        while node and node.depth and (node.depth > most or node.key != next(keys_of(ids, node.depth - 1, node.depth))):
            node = node.parent
        assert node is not None
        cursor.node = node
        if node.depth >= most and node.pages is not None:
            return
        while node.parent is not None and node.pages is None and not node.is_forgotten:  # it has had to leave
            node = node.parent
        if node.is_forgotten:
            cursor.node = node  # and stays there
            return
        for key in keys_of(ids, node.depth, most):
            child = node.children.get(key) or self._new(node, key)
            if child.pages is None:
                self._retain(child, holding)
            node = child
        cursor.node = node
        self.pool.seal(holding, node.length)
        self._offer(node)

    def keep_snapshot(self, cursor: Cursor, snapshot: Snapshot, *, pinned: bool = False) -> bool:
        """Keep state at a boundary the sequence has published; whether it was kept.

        Args:
            pinned: two requests parted here: it is kept longer than one that is only recent.
        """
        node: Node | None = cursor.node
        while node is not None and node.length > snapshot.length:
            node = node.parent
        if node is None or node.parent is None or node.length != snapshot.length:
            return False
        if node.is_forgotten or not node.is_linked or not self._is_there(node):
            return False
        self._shelf.put(node, snapshot, pinned=pinned)
        if node.snapshot is None:
            return False
        self._shelf.thin(node)
        return True

    # Making room

    def make_room(self, missing: Shortage, *, dig: bool = True) -> bool:
        """Let go of blocks until the pool has what is missing: leaves first, the least worth per byte first.

        Blocks whose pages somebody runs on are passed over, since that frees nothing; unless they stand on others
        where it would, and nothing else is left.  Whether all that is missing is there now; slots never are.

        Args:
            dig: take those it frees nothing to take as well, to reach others.
        """
        wanted = {r: self.pool.num_free_pages(r) + n for r, n in missing.pages.items() if n > 0}
        passed: list[tuple[float, int, Node]] = []
        while self._heap and (short := self._short(wanted)):
            entry = heapq.heappop(self._heap)
            node = entry[2]
            if not _is_current(entry):
                continue
            if not self._frees(node, short):
                passed.append(entry)
                continue
            self._evict(node, short[0])
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if dig and self._short(wanted):
            self._dig(wanted)
        return missing.slots == 0 and not self._short(wanted)

    def _short(self, wanted: dict[int, int]) -> list[int]:
        """Ratios of which too few pages are free, the one with the biggest pages first."""
        short = [r for r, n in wanted.items() if self.pool.num_free_pages(r) < n]
        return sorted(short, key=lambda r: -self.pool.plan.page_bytes[r])

    def _frees(self, node: Node, short: list[int]) -> bool:
        """Whether nobody but the tree holds a page that is missing."""
        assert node.pages is not None
        return any(
            self.pool.num_holders(r, node.pages[r]) == self._held[r, node.pages[r]] for r in short if r in node.pages
        )

    def _dig(self, wanted: dict[int, int]) -> None:
        """Evict leaves that free nothing to reach blocks under them that do."""
        helps: dict[Node, bool] = {}
        stack, leaves, short = list(self._roots.values()), [], self._short(wanted)
        while stack:
            node = stack.pop()
            if node.parent is not None:
                helps[node] = helps.get(node.parent, False) or self._frees(node, short)
                if node.num_resident == 0 and helps[node]:
                    leaves.append(node)
            stack += [c for c in node.children.values() if c.pages is not None]
        for leaf in sorted(leaves, key=lambda n: n.worth):
            node = leaf
            while helps.get(node) and node.num_resident == 0 and (short := self._short(wanted)):
                self._evict(node, short[0])
                assert node.parent is not None
                node = node.parent

    def _evict(self, node: Node, short_of: int) -> None:
        assert node.pages is not None and node.parent is not None
        self._clock = max(self._clock, node.worth)
        self._store(node)
        self._shelf.drop(node)
        self._release(node)
        self.counters.spilled_blocks += self._is_there(node)
        node.short_of = short_of
        self.counters.evicted_blocks += 1
        self._remember(node)
        self._offer(node.parent)

    def _store(self, node: Node) -> None:
        """Put a block, and the state after it, into a tier."""
        if self.tiers is None:
            return
        assert node.pages is not None
        if not self.tiers.has("block", node.name):
            self.tiers.put("block", _label(node), read_block(self.pool, node.pages, node.depth - 1))
        self._store_snapshot(node)

    def _store_snapshot(self, node: Node) -> None:
        if self.tiers is not None and node.snapshot is not None and self._is_there(node):
            self.tiers.put("state", _label(node, node.snapshot.draft_from), node.snapshot.data)

    def store(self) -> None:
        """Write everything that is known to disk, if there is one: what the next process begins with."""
        if self.tiers is None:
            return
        resident = [n for n in self._linked(list(self._roots.values())) if n.parent is not None and n.pages is not None]
        for node in sorted(resident, key=lambda n: -n.depth):  # the last blocks are the first to be dropped again
            self._store(node)
        self.tiers.flush()

    # Forgetting

    def drop_path(self, ids: Sequence[int], salt: str) -> None:
        """Forget a prefix from its first block on, with all that was computed from it: its rows were found wrong."""
        root = self._root(salt)
        for key in keys_of(ids, 0, min(1, len(ids) // BLOCK_TOKENS)):
            if child := root.children.get(key):
                self._cut(child)
                self._forget(child)
            if self.tiers is not None:
                self.tiers.drop(block_name(root.name, key)[: 2 * TAG_BYTES])

    def forget(self, salt: str | None = None) -> None:
        """Forget everything of one salt, or of all that were used, in memory and on disk."""
        for name in [salt] if salt is not None else list(self._roots):
            root = self._root(name)
            del self._roots[name]
            self._grown.discard(root)
            self._forget(root)
            if self.tiers is not None:
                self.tiers.drop(root.name[:TAG_BYTES])

    def _forget(self, top: Node) -> None:
        for node in self._linked([top]):
            node.is_forgotten, node.is_linked = True, False
            self._shadows.pop(node, None)
            self._shelf.drop(node)
            if node.parent is None:
                node.pages = None
            elif node.pages is not None:
                self._release(node)

    # Nodes

    def _root(self, salt: str) -> Node:
        if salt not in self._roots:
            root = self._roots[salt] = Node(None, b"", self.tiers.root(salt) if self.tiers else b"")
            root.pages = {}  # always there
        return self._roots[salt]

    def _new(self, parent: Node, key: bytes) -> Node:
        child = Node(parent, key, block_name(parent.name, key) if self.tiers else b"")
        child.is_linked = parent.is_linked
        if child.is_linked:
            self._link(child)
        return child

    def _link(self, node: Node) -> None:
        """Put a block under the one before it."""
        parent = node.parent
        assert parent is not None
        parent.children[node.key] = node
        if parent.parent is None:
            self._grown.add(parent)

    def _cut(self, node: Node) -> None:
        """Take a block from under the one before it."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            self._grown.discard(parent)

    def _stored(self, node: Node, key: bytes) -> Node | None:
        """A block that is in a tier and not remembered: an earlier process left it there."""
        if self.tiers is None or not self.tiers.has("block", block_name(node.name, key)):
            return None
        child = self._new(node, key)
        if child.is_linked:
            self._remember(child)
        return child

    def _remember(self, node: Node) -> None:
        """Keep a block that is not in the pool in mind; who left longest ago is forgotten in its place."""
        self._shadows[node] = None
        while len(self._shadows) > self._max_shadows:
            for old in self._linked([next(iter(self._shadows))]):  # nothing below it is in the pool
                del self._shadows[old]
                self._cut(old)
                self._shelf.drop(old)
                old.is_linked = False

    def _is_there(self, node: Node) -> bool:
        return node.pages is not None or (self.tiers is not None and self.tiers.has("block", node.name))

    def _linked(self, tops: Collection[Node]) -> list[Node]:
        """Nodes and all below them."""
        found, stack = [], list(tops)
        while stack:
            node = stack.pop()
            found.append(node)
            stack += node.children.values()
        return found

    def _retain(self, node: Node, holding: Holding) -> None:
        """Hold the pages that have a block's rows; its predecessor is in the pool."""
        assert node.parent is not None
        self._shadows.pop(node, None)
        if not node.is_linked:
            self._link(node)
            node.is_linked = True
        first = (node.depth - 1) * BLOCK_TOKENS
        node.pages = {r: held[first // r // PAGE_ROWS] for r, held in holding.pages.items()}
        for ratio, page in node.pages.items():
            self._hold(ratio, page)
        node.parent.num_resident += 1
        self.num_blocks += 1
        node.uses = max(node.uses, 1)
        self._value(node)
        self._lean_on(node)

    def _release(self, node: Node) -> None:
        """Let go of a block's pages; what leans on them finds others to lean on."""
        assert node.pages is not None and node.parent is not None
        pages, node.pages, above = node.pages, None, node.parent
        above.num_resident -= 1
        self.num_blocks -= 1
        for ratio, page in pages.items():
            self._let_go(ratio, page)
        if above.pages and above.num_resident and any(above.pages[r] == page for r, page in pages.items()):
            self._lean_on(next(c for c in above.children.values() if c.pages is not None))

    def _lean_on(self, node: Node) -> None:
        """Blocks before this one move to its pages, which have their rows too: else each turn of a talk kept a page."""
        assert node.pages is not None
        for ratio, page in node.pages.items():
            first = (node.depth - 1) // _blocks_per_page(ratio) * _blocks_per_page(ratio)  # block the page begins with
            above = node.parent
            while above is not None and above.depth > first and above.pages is not None and above.pages[ratio] != page:
                self._hold(ratio, page)
                self._let_go(ratio, above.pages[ratio])
                above.pages[ratio] = page
                above = above.parent

    def _hold(self, ratio: int, page: int) -> None:
        self.pool.retain(ratio, page)
        self._held[ratio, page] = self._held.get((ratio, page), 0) + 1

    def _let_go(self, ratio: int, page: int) -> None:
        self.pool.drop(ratio, page)
        self._held[ratio, page] -= 1
        if not self._held[ratio, page]:
            del self._held[ratio, page]

    def _value(self, node: Node) -> None:
        """Worth of keeping: cost of computing it again, the same bytes for every block, times its uses (GDSF)."""
        node.worth = self._clock + min(node.uses, MAX_USES) * (1 + self._depth_cost * (node.depth - 1))

    def _offer(self, node: Node) -> None:
        """Put a block among those to be evicted, if it is a leaf."""
        if node.parent is None or node.num_resident or node.pages is None:
            return
        heapq.heappush(self._heap, (node.worth, next(self._numbers), node))
        if len(self._heap) > 2 * self.num_blocks + 1024:
            current = {entry[2]: entry for entry in self._heap if _is_current(entry)}
            self._heap = list(current.values())
            heapq.heapify(self._heap)


def _is_current(entry: tuple[float, int, Node]) -> bool:
    """Whether a node is still a leaf of that worth; if not, it is or will be offered again."""
    worth, _, node = entry
    return node.pages is not None and node.num_resident == 0 and node.worth == worth


def _label(node: Node, draft_from: int = 0) -> Label:
    assert node.parent is not None
    return Label(node.name, node.parent.name, node.key, node.length, draft_from)


def _blocks_per_page(ratio: int) -> int:
    return PAGE_ROWS * ratio // BLOCK_TOKENS


def depth_cost(config: ModelConfig) -> float:
    """How much more a block costs for each block before it, as a share of the first one's FLOPs."""
    c, inner = config, config.num_attention_heads * config.head_dim
    weights = c.hidden_size * (c.q_lora_rank + c.head_dim + c.o_groups * c.o_lora_rank)
    weights += inner * (c.q_lora_rank + c.o_lora_rank)
    weights += (c.num_experts_per_tok + c.n_shared_experts) * 3 * c.hidden_size * c.moe_intermediate_size
    is_csa = [r == CSA_RATIO for r in c.layer_ratios]
    reads = sum(4 * inner * (c.sliding_window + c.index_topk * csa) for csa in is_csa)  # once there are so many rows
    fixed = 2 * (c.num_hidden_layers * weights + c.hidden_size * c.vocab_size) + reads
    grows = sum(
        (2 * c.index_n_heads * c.index_head_dim if csa else 4 * inner) / r
        for csa, r in zip(is_csa, c.layer_ratios, strict=True)
        if r
    )
    return grows * BLOCK_TOKENS / fixed
