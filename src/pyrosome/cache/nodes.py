"""What the prefix tree is made of: blocks under their predecessors, and places in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pyrosome.cache.state import Snapshot
from pyrosome.cache.streams import BLOCK_TOKENS


class Node:
    """One block of a prefix.  With pages it is in the pool; without, in a tier or a ghost."""

    __slots__ = (
        "__weakref__", "children", "depth", "is_forgotten", "is_linked", "key", "name", "num_resident", "pages",
        "parent", "pinned", "short_of", "snapshot", "uses", "worth",
    )  # fmt: skip

    def __init__(self, parent: Node | None, key: bytes, name: bytes) -> None:
        self.parent = parent
        self.key = key  # the block's ids, int32: what is in the tree is found by them alone
        self.name = name  # for tiers; b"" where there are none
        self.depth: int = parent.depth + 1 if parent else 0  # blocks up to and with this one
        self.children: dict[bytes, Node] = {}
        self.num_resident = 0  # children that are in the pool
        self.pages: dict[int, int] | None = None  # ratio -> page
        self.snapshot: Snapshot | None = None
        self.pinned = False  # requests were seen to part here
        self.is_linked = True  # found from the root
        self.is_forgotten = False  # its rows, or those of a block before it, must not be used again
        self.short_of = 0  # the ratio whose pages were missing when it was evicted
        self.uses, self.worth = 0, 0.0

    @property
    def length(self) -> int:
        """Tokens up to and with this block."""
        return self.depth * BLOCK_TOKENS


@dataclasses.dataclass
class Cursor:
    """Where one sequence is in the tree."""

    salt: str
    node: Node


@dataclasses.dataclass(frozen=True)
class Match:
    """How much of a prompt is known."""

    nodes: list[Node]
    salt: str
    snapshot: Snapshot | None  # nearest at or below `length`
    limit: str  # "all", "no common prefix", "evicted" or "no snapshot"
    stream: str  # the cache stream that limits it
    reason: str  # the same as a sentence with its numbers

    @property
    def length(self) -> int:
        """Tokens whose history is there."""
        return len(self.nodes) * BLOCK_TOKENS


@dataclasses.dataclass
class Counters:
    """What became of blocks and snapshots."""

    evicted_blocks: int = 0
    spilled_blocks: int = 0  # of the evicted, those that went to a tier
    restored_blocks: int = 0
    snapshots_kept: int = 0
    snapshots_dropped: int = 0


def keys_of(ids: Sequence[int], first: int, last: int) -> Iterator[bytes]:
    """The ids of blocks first..last, each as bytes."""
    if last > first:
        packed = np.asarray(ids[first * BLOCK_TOKENS : last * BLOCK_TOKENS], dtype=np.int32).reshape(-1, BLOCK_TOKENS)
        for row in packed:
            yield row.tobytes()


def common_tokens(key: bytes, others: list[bytes]) -> int:
    """How many ids of a block the most similar of `others` begins with too."""
    if not others:
        return 0
    same = np.frombuffer(b"".join(others), np.int32).reshape(len(others), -1) == np.frombuffer(key, np.int32)
    return int(np.logical_and.accumulate(same, axis=1).sum(axis=1).max())
