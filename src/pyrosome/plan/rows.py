"""Bytes of cached rows on each rank: pages as a pool allocates them, rings, tables, snapshots and saved sessions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, StreamSpec, all_streams, pages_for, plan_cache
from pyrosome.config import ModelConfig

FILE_BYTES = 4096  # that a file's size is rounded up to; an entry of the disk tier has a header of up to 2,048 bytes
ENTRY_HEADER_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class Cache:
    """One rank's cache: sequences of up to `context` tokens, with `tokens` of history in all."""

    config: ModelConfig
    kv_format: str
    sequences: int
    context: int
    tokens: int
    num_drafts: int
    drafts: bool  # a draft stage is loaded and has a window of its own

    @classmethod
    def of(
        cls, config: ModelConfig, kv_format: str, sequences: int, context: int, shared: int, num_drafts: int,
        drafts: bool,
    ) -> Cache:  # fmt: skip
        """The cache that holds so many sequences to the end of their context, what they share in whole blocks once."""
        shared = shared // BLOCK_TOKENS * BLOCK_TOKENS
        tokens = shared + sequences * (context - shared) if sequences else 0
        # A pool's history is counted in pages of the finest stream.
        unit = PAGE_ROWS * min((s.per_tokens for _, s in streams(config, kv_format, False) if s.is_history), default=1)
        return cls(config, kv_format, sequences, context, -(-tokens // unit) * unit, num_drafts, drafts)

    @functools.cached_property
    def pages(self) -> dict[int, int]:
        """Pages by tokens per row, the spare ones and those for branches of the prefix tree included."""
        if not self.sequences:
            return {}
        plan = plan_cache(
            self.config, self.kv_format, self.sequences, self.context, self.num_drafts, self.drafts, self.tokens
        )
        return plan.num_pages

    @property
    def cache_bytes(self) -> int:
        """The engine's option of that name that makes a pool of exactly these pages."""
        return sum(
            self.pages[s.per_tokens] * PAGE_ROWS * s.row_bytes
            for _, s in streams(self.config, self.kv_format, False)
            if s.is_history and self.pages
        )

    def history_bytes(self, layers: Sequence[int], rank: int = 0, ranks: int = 1) -> dict[str, int]:
        """Bytes of history by stream in so many layers, "branch pages" apart.

        Args:
            rank: of the ranks that share every session's pages.
        """
        found: dict[str, int] = {}
        for layer, stream in streams(self.config, self.kv_format, self.drafts):
            if not stream.is_history or layer not in layers or not self.pages:
                continue
            pages = self.pages[stream.per_tokens]
            own = min(pages, pages_for(self.tokens, stream.per_tokens) + 1)
            for name, num in ((stream.name, own), ("branch pages", pages - own)):
                mine = -(-num // ranks) if name == "branch pages" else _dealt(num, rank, ranks)
                found[name] = found.get(name, 0) + mine * PAGE_ROWS * stream.row_bytes
        return found

    def state_bytes(self, layers: Sequence[int]) -> dict[str, int]:
        """Bytes of rings by sort in so many layers, the spare slot included; the draft stage is with the last layer."""
        found: dict[str, int] = {}
        last = self.config.num_hidden_layers - 1
        for layer, stream in streams(self.config, self.kv_format, self.drafts):
            if stream.is_history or min(layer, last) not in layers or not self.sequences:
                continue
            name = "tails" if stream.name.endswith("tail") else "draft window" if layer > last else "windows"
            num_bytes = (self.sequences + 1) * stream.row_bytes * stream.ring_rows(self.num_drafts)
            found[name] = found.get(name, 0) + num_bytes
        return found

    def table_bytes(self) -> int:
        """Bytes of the tables that say which pages a sequence has."""
        return sum(8 * (self.sequences + 1) * pages_for(self.context, ratio) for ratio in self.pages)


def _dealt(pages: int, rank: int, ranks: int) -> int:
    return -(-pages * (rank + 1) // ranks) - -(-pages * rank // ranks)


@functools.lru_cache(maxsize=64)
def streams(config: ModelConfig, kv_format: str, drafts: bool) -> tuple[tuple[int, StreamSpec], ...]:
    """`cache.streams.all_streams`, kept."""
    return all_streams(config, kv_format, drafts)


def snapshot_bytes(config: ModelConfig, kv_format: str, length: int, drafts: bool) -> int:
    """Bytes of one state after `length` tokens, as `cache.state` copies it."""
    return sum(_kept_bytes(config, s, layer, length) for layer, s in streams(config, kv_format, drafts))


def _kept_bytes(config: ModelConfig, s: StreamSpec, layer: int, length: int) -> int:
    if s.keep is None:  # rows finished since the last whole block
        return (length // s.per_tokens - length // BLOCK_TOKENS * (BLOCK_TOKENS // s.per_tokens)) * s.row_bytes
    if not s.name.endswith("tail"):
        end = length - 1 if s.name == "draft_kv" else length
        return max(0, min(end, s.keep - 1 if s.reads_own else s.keep)) * s.row_bytes
    ratio = config.layer_ratios[layer]
    end = length // ratio * ratio + ratio - 1
    rows = length - min(max(0, end - s.keep + 1), length)
    is_narrow = s.keep > ratio and length % ratio == 0  # the older half of a window gives its first channels only
    return rows * (s.row_bytes // 2 if is_narrow else s.row_bytes)


@dataclasses.dataclass(frozen=True)
class Parked:
    """Bytes of one session that is set aside: its blocks beyond the shared prefix, and its state."""

    ram_bytes: int
    disk_bytes: int


def parked(config: ModelConfig, kv_format: str, context: int, shared: int, drafts: bool) -> Parked:
    """What an idle session of `context` tokens takes in host memory, and in files."""
    block = sum(
        s.row_bytes * (BLOCK_TOKENS // s.per_tokens) for _, s in streams(config, kv_format, drafts) if s.is_history
    )
    blocks = context // BLOCK_TOKENS - shared // BLOCK_TOKENS
    state = snapshot_bytes(config, kv_format, context, drafts)
    return Parked(blocks * block + state, blocks * _file_bytes(block) + _file_bytes(state))


def _file_bytes(payload: int) -> int:
    return -(-(payload + ENTRY_HEADER_BYTES) // FILE_BYTES) * FILE_BYTES
