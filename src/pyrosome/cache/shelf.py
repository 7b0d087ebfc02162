"""Snapshots beside the nodes of a prefix tree, within a budget: which to keep, and which to let go."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

from pyrosome.cache.nodes import Counters, Node
from pyrosome.cache.state import Snapshot

PIN_PATIENCE = 8  # a pinned snapshot goes when it is so many times longer unused than one that is not pinned


class Shelf:
    """State after some blocks.

    Along one path it is dense near the end and sparse before: where requests go on is mostly near the end, and
    replay bridges the rest.  Where requests were seen to part (`pinned`) it stays through that thinning.

    Args:
        budget: bytes that snapshots may take.
        moved: called with a node whose snapshot has to go for want of room alone, while it is still there.
    """

    def __init__(self, budget: int, counters: Counters, moved: Callable[[Node], None]) -> None:
        self.budget, self.counters, self.num_bytes = budget, counters, 0
        self._moved = moved
        # Node -> when it was last used, least recently used first; those not pinned, those pinned.
        self._used: tuple[OrderedDict[Node, int], OrderedDict[Node, int]] = OrderedDict(), OrderedDict()
        self._now = 0

    def __len__(self) -> int:
        return sum(map(len, self._used))

    def put(self, node: Node, snapshot: Snapshot, *, pinned: bool = False) -> None:
        """Keep a snapshot with its node, others making way; of two of one node, that whose draft window is longer."""
        old = node.snapshot
        if snapshot.num_bytes > self.budget:
            return
        if old is not None:
            if old.draft_from <= snapshot.draft_from:
                self.touch(node, pinned=pinned)
                return
            self.drop(node)
        node.snapshot = snapshot
        node.pinned |= pinned
        self.num_bytes += snapshot.num_bytes
        self.counters.snapshots_kept += 1
        self._now += 1
        self._used[node.pinned][node] = self._now
        while self.num_bytes > self.budget:
            victim = self._victim()
            self._moved(victim)
            self.drop(victim)

    def touch(self, node: Node, *, pinned: bool = False) -> None:
        """A node's snapshot was used; `pinned`: requests part there."""
        if node.snapshot is None:
            return
        del self._used[node.pinned][node]
        node.pinned |= pinned
        self._now += 1
        self._used[node.pinned][node] = self._now

    def drop(self, node: Node) -> None:
        """Let a node's snapshot go, if it has one."""
        if node.snapshot is None:
            return
        self.num_bytes -= node.snapshot.num_bytes
        self.counters.snapshots_dropped += 1
        node.snapshot = None
        del self._used[node.pinned][node]

    def thin(self, newest: Node) -> None:
        """Along the path to `newest`, drop what leaves a gap no longer than the distance from there to the newest.

        So distances double, about; the beginning counts as state, since nothing has to be replayed there.
        """
        path = [n for n in _upwards(newest) if n.snapshot is not None or n.parent is None]
        near = path[0]
        for node, far in itertools.pairwise(path[1:]):
            if node.pinned or near.depth - far.depth > newest.depth - near.depth:
                near = node
            else:
                self.drop(node)

    def _victim(self) -> Node:
        plain, pinned = (next(iter(used.items()), None) for used in self._used)
        if plain is None or pinned is None:
            found = plain or pinned
            assert found is not None
            return found[0]
        is_older = self._now - pinned[1] > PIN_PATIENCE * (self._now - plain[1])
        return pinned[0] if is_older else plain[0]


def _upwards(node: Node | None) -> list[Node]:
    path = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path
