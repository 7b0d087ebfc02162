"""Bytes of cached rows on each rank: pages as a pool allocates them, rings, tables, snapshots and saved sessions."""

from __future__ import annotations

import dataclasses
import functools

from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, StreamSpec, all_streams, pages_for, plan_cache
from pyrosome.config import ModelConfig
from pyrosome.plan.layout import share

BRANCHES = "branch pages"  # pages of coarse streams for short sequences and for branches of the prefix tree
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
    num_drafts: int  # tokens that may be rejected at once: rings are longer by so many
    drafts: bool  # a draft stage is loaded and has a window of its own

    @classmethod
    def of(
        cls, config: ModelConfig, kv_format: str, sequences: int, context: int, shared: int, num_drafts: int,
        drafts: bool,
    ) -> Cache:  # fmt: skip
        """The cache that holds so many sequences to the end of their context, what they share in whole blocks once."""
        shared = shared // BLOCK_TOKENS * BLOCK_TOKENS
        tokens = shared + sequences * (context - shared) if sequences else 0
        unit = PAGE_ROWS * min((r for r in config.layer_ratios if r), default=1)  # a page of the finest stream
        return cls(config, kv_format, sequences, context, -(-tokens // unit) * unit, num_drafts, drafts)

    @property
    def pages(self) -> dict[int, int]:
        """Pages by tokens per row, the spare ones and those for branches of the prefix tree included."""
        return _pages(self)

    @property
    def cache_bytes(self) -> int:
        """The engine's option of that name that makes a pool of exactly these pages."""
        layers = range(self.config.num_hidden_layers)
        return sum(self.history_bytes(layers).values())

    def history_bytes(self, layers: range, rank: int = 0, ranks: int = 1) -> dict[str, int]:
        """Bytes of history by stream in so many layers, "branch pages" apart.

        Args:
            rank: of the ranks that share every session's pages.
        """
        found: dict[str, int] = {}
        if not self.sequences:
            return found
        for (name, ratio), row_bytes in _history_rows(self.config, self.kv_format, layers).items():
            pages, size = self.pages[ratio], PAGE_ROWS * row_bytes
            own = min(pages, pages_for(self.tokens, ratio) + 1)
            found[name] = found.get(name, 0) + len(share(own, rank, ranks)) * size
            found[BRANCHES] = found.get(BRANCHES, 0) + -(-(pages - own) // ranks) * size
        return found

    def state_bytes(self, layers: range) -> dict[str, int]:
        """Bytes of rings by sort in so many layers, the spare slot included; the draft stage is with the last layer."""
        rings = _ring_bytes(self.config, self.kv_format, self.drafts, self.num_drafts, layers)
        return {name: (self.sequences + 1) * n for name, n in rings.items()} if self.sequences else {}

    def table_bytes(self) -> int:
        """Bytes of the tables that say which pages a sequence has."""
        return sum(8 * (self.sequences + 1) * pages_for(self.context, ratio) for ratio in self.pages)


@functools.lru_cache(maxsize=4096)
def _pages(cache: Cache) -> dict[int, int]:
    if not cache.sequences:
        return {}
    c = cache
    return plan_cache(c.config, c.kv_format, c.sequences, c.context, c.num_drafts, c.drafts, c.tokens).num_pages


@functools.lru_cache(maxsize=1024)
def _history_rows(config: ModelConfig, kv_format: str, layers: range) -> dict[tuple[str, int], int]:
    """Bytes of a row in all of these layers, by stream and tokens per row."""
    found: dict[tuple[str, int], int] = {}
    for layer, s in streams(config, kv_format, False):
        if s.is_history and layer in layers:
            found[s.name, s.per_tokens] = found.get((s.name, s.per_tokens), 0) + s.row_bytes
    return found


@functools.lru_cache(maxsize=1024)
def _ring_bytes(config: ModelConfig, kv_format: str, drafts: bool, num_drafts: int, layers: range) -> dict[str, int]:
    """Bytes of one sequence's rings in these layers, by sort."""
    found: dict[str, int] = {}
    last = config.num_hidden_layers - 1
    for layer, s in streams(config, kv_format, drafts):
        if not s.is_history and min(layer, last) in layers:
            name = "tails" if s.name.endswith("tail") else "draft window" if layer > last else "windows"
            found[name] = found.get(name, 0) + s.row_bytes * s.ring_rows(num_drafts)
    return found


@functools.lru_cache(maxsize=64)
def streams(config: ModelConfig, kv_format: str, drafts: bool) -> tuple[tuple[int, StreamSpec], ...]:
    """`cache.streams.all_streams`, kept."""
    return all_streams(config, kv_format, drafts)


@functools.lru_cache(maxsize=1024)
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


@functools.lru_cache(maxsize=1024)
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
