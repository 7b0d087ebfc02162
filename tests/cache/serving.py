"""A prefix tree in front of a tiny network, used as an engine uses it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import Tensor

from pyrosome.cache.blocks import block_bytes
from pyrosome.cache.prefix import Cursor, Match, PrefixTree, _is_current
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.cache.tiers import Tiers
from pyrosome.config import ModelConfig
from pyrosome.engine.runner import Runner, Sequence
from pyrosome.testing.shapes import tiny
from tests.networks import network, run, tokens

CONFIG = tiny((0, 4, 8, 128))  # pages of 2, 4 and 64 blocks
IDS = tokens(1400)
LONG = 8192 + 3 * BLOCK_TOKENS  # past one page of HCA rows


def fresh(ids: list[int], config: ModelConfig = CONFIG, kv_format: str = "f32") -> Tensor:
    """Logits after the last id, computed alone."""
    return run(network(config), ids, kv_format=kv_format)[-1]


def branch(at: int, length: int = 150, seed: int = 9) -> list[int]:
    """IDS up to `at`, then something else."""
    return IDS[:at] + tokens(length, seed=seed + at)


@dataclasses.dataclass
class Served:
    """What came of one prompt."""

    logits: Tensor  # [V] after its last id
    match: Match
    num_computed: int  # tokens that went through steps
    replayed: float


class Serving:
    """Prompts one after the other, through one cache that starts out poisoned."""

    def __init__(
        self,
        config: ModelConfig = CONFIG,
        *,
        cache_tokens: int = 4096,
        max_context: int = 4096,
        snapshot_bytes: int = 64 << 20,
        host_blocks: int = 0,
        disk_path: str = "",
        kv_format: str = "f32",
        **tree,
    ) -> None:
        self.runner = Runner(network(config), kv_format, 3, max_context, cache_tokens=cache_tokens)
        self.pool = self.runner.pool
        self.pool.poison()
        size, tiers = block_bytes(self.pool), None
        if host_blocks or disk_path:
            tiers = Tiers(host_blocks * size, disk_path, 1 << 30, "model", size)
        self.tree = PrefixTree(self.pool, snapshot_bytes=snapshot_bytes, tiers=tiers, **tree)

    def enter(self, ids: list[int], salt: str = "") -> tuple[Sequence, Cursor, Match, float]:
        """A sequence of as much of `ids` as is known, its last id not among them."""
        holding, match = self.tree.adopt(self.tree.match(ids, salt, len(ids) - 1))
        sequence, cursor, replayed = Sequence(holding), self.tree.cursor(salt, match), 0.0
        if match.snapshot:
            self.runner.restore(sequence, match.snapshot)
        else:
            self.pool.prepare(holding, 0, 0)
        if match.length > sequence.length:
            replayed = self.runner.replay(sequence, ids, match.length)
            self.tree.keep_snapshot(cursor, self.runner.snapshot(sequence), pinned=True)
        return sequence, cursor, match, replayed

    def go_on(self, sequence: Sequence, cursor: Cursor, ids: list[int], cuts=()) -> Tensor:
        """Compute `ids` from where the sequence is, in spans that end at the cuts and at the last whole block."""
        whole = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
        edges = sorted({sequence.length, whole, *cuts, len(ids)})
        logits = torch.empty(0)
        for a, b in pairwise(e for e in edges if e >= sequence.length):
            missing = self.pool.shortage(sequence.holding, a, b)
            assert not missing or self.tree.make_room(missing)
            (logits,) = self.runner.step([(sequence, ids[a:b])])
            self.tree.publish(cursor, ids, sequence.holding, sequence.length)
            if b % BLOCK_TOKENS == 0:
                self.tree.keep_snapshot(cursor, self.runner.snapshot(sequence))
        return logits

    def serve(self, ids: list[int], salt: str = "", cuts=()) -> Served:
        """Everything of one prompt, and the sequence given back."""
        sequence, cursor, match, replayed = self.enter(ids, salt)
        num_computed = len(ids) - sequence.length
        logits = self.go_on(sequence, cursor, ids, cuts)
        self.runner.close(sequence)
        return Served(logits, match, num_computed, replayed)

    def evict(self, blocks: int | None = None) -> None:
        """Have the tree let go of so many blocks, or of all, one by one as `make_room` would."""
        stop = 0 if blocks is None else self.tree.num_blocks - blocks
        while self.tree.num_blocks > stop:
            node = min(e for e in self.tree._heap if _is_current(e))[2]
            self.tree._evict(node, min(self.pool.ratios, default=0))

    def assert_nothing_is_held(self) -> None:
        """Whether all pages and slots come back once the tree forgets."""
        self.tree.forget()
        assert self.pool.num_free_slots == self.pool.plan.num_slots - 1
        for ratio in self.pool.ratios:
            assert self.pool.num_free_pages(ratio) == self.pool.plan.num_pages[ratio] - 1
