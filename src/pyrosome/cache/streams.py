"""The table of cache streams: one inventory for the allocator, the planner and the saved session file.

Two families.  *History* (compressed rows, index keys) is kept for the whole sequence, in pages shared by
reference.  *State* (windows, compressor tails) only matters for its last rows: a ring addressed by
`position % ring_rows`, so that rejecting drafts is setting a length back.  Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pyrosome.config import BLOCK_TOKENS as BLOCK_TOKENS  # part of this table too
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError

KVFormat = Literal["f32", "bf16", "fp8"]
KV_FORMATS: tuple[KVFormat, ...] = ("f32", "bf16", "fp8")
FP8_INDEX = "fp8-index8"  # rows as "fp8", index keys in e4m3 with a float32 scale: other engines' layout, planned only
PLANNED_FORMATS = (*KV_FORMATS, FP8_INDEX)

PAGE_ROWS = 64  # rows of one page of one history stream; kernels that read pages have the number too
FP8_GROUP, FP4_GROUP = 64, 32  # channels that share a scale in a stored row
_FP8_INDEX_GROUP = 128


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """One kind of remembered row in one layer."""

    name: str
    per_tokens: int  # a row every so many tokens
    width: int  # channels of a row
    format: str  # "f32", "bf16" or "fp8" as `quant.rows` stores it; or FP8_INDEX, which nothing here does
    row_bytes: int
    keep: int | None  # None: the whole sequence (history); else the last rows (state)
    reads_own: bool = True  # whether the newest kept row is the one just written

    @property
    def is_history(self) -> bool:
        return self.keep is None

    def ring_rows(self, num_drafts: int = 0) -> int:
        """Rows a ring needs so that `num_drafts` rejected rows never overwrite a live one.

        A step writes 1 + num_drafts rows and keeps at least the first.  The next one looks back
        keep - 1 rows from there (keep, where it does not read its own row): one row fewer breaks.
        """
        if self.keep is None:
            raise ValueError(f"{self.name} is history: it has pages, not a ring")
        return self.keep + (max(num_drafts, 1) - 1 if self.reads_own else num_drafts)

    def bytes_per_token(self) -> float:
        """Growth with context; 0 for state."""
        return self.row_bytes / self.per_tokens if self.is_history else 0.0


def kv_row_bytes(config: ModelConfig, kv_format: str) -> int:
    """Bytes of one KV row.  fp8: e4m3 codes, bf16 rotary channels, and E8M0 scales padded to 8 bytes."""
    if kv_format not in ("fp8", FP8_INDEX):
        return config.head_dim * _element_bytes(kv_format)
    nope, rope = config.nope_dim, config.qk_rope_head_dim
    if nope % FP8_GROUP:
        raise CheckpointError(
            f"kv_format {kv_format!r} stores the {nope} channels without rotation (head_dim {config.head_dim} - "
            f"qk_rope_head_dim {rope}) in groups of {FP8_GROUP}, which does not divide them; "
            "use kv_format='f32' or 'bf16' for this shape"
        )
    return nope + 2 * rope + -(-(nope // FP8_GROUP) // 8) * 8


def index_row_bytes(config: ModelConfig, kv_format: str) -> int:
    """Bytes of one index key.  fp8: packed e2m1 codes and an E8M0 scale per 32."""
    dim = config.index_head_dim
    if kv_format == FP8_INDEX:
        return dim + 4 * -(-dim // _FP8_INDEX_GROUP)
    if kv_format != "fp8":
        return dim * _element_bytes(kv_format)
    if dim % FP4_GROUP:
        raise CheckpointError(
            f"kv_format 'fp8' stores index keys of {dim} channels in FP4 groups of {FP4_GROUP}, which does not "
            "divide them; use kv_format='f32' or 'bf16' for this shape"
        )
    return dim // 2 + dim // FP4_GROUP


def _element_bytes(kv_format: str) -> int:
    if kv_format not in KV_FORMATS:
        raise CheckpointError(f"kv_format {kv_format!r} is unknown; it is one of {', '.join(KV_FORMATS)}")
    return 4 if kv_format == "f32" else 2


def check_kv_format(config: ModelConfig, kv_format: str) -> None:
    """Refuse a format that a pool of this configuration could not keep rows in.

    Raises:
        CheckpointError: it is unknown or only planned with, or cannot store this shape.
    """
    _element_bytes(kv_format)
    plan_cache(config, kv_format, 1, 1)


def layer_streams(config: ModelConfig, ratio: int, kv_format: str) -> tuple[StreamSpec, ...]:
    """Streams of one block whose compress ratio is `ratio` (0 window only, 4 CSA, else HCA)."""
    kv_bytes = kv_row_bytes(config, kv_format)
    head, stored = config.head_dim, _row_format(kv_format)
    streams = [StreamSpec("window_kv", 1, head, stored, kv_bytes, config.sliding_window)]
    if ratio == 4:
        dim = config.index_head_dim
        streams += [
            StreamSpec("csa_kv", ratio, head, stored, kv_bytes, None),
            StreamSpec("index_k", ratio, dim, kv_format, index_row_bytes(config, kv_format), None),
            _tail("tail", 2 * head, 2 * ratio),
            _tail("index_tail", 2 * dim, 2 * ratio),
        ]
    elif ratio:
        streams += [StreamSpec("hca_kv", ratio, head, stored, kv_bytes, None), _tail("tail", head, ratio)]
    return tuple(streams)


def _row_format(kv_format: str) -> str:
    """Of KV rows, which do not depend on how index keys are kept."""
    return "fp8" if kv_format == FP8_INDEX else kv_format


def _tail(name: str, projected: int, width: int) -> StreamSpec:
    """A compressor's raw kv and gate, always float32: pooling starts from them."""
    return StreamSpec(name, 1, 2 * projected, "f32", 2 * projected * 4, width)


def draft_streams(config: ModelConfig, kv_format: str) -> tuple[StreamSpec, ...]:
    """Streams of the MTP stage: its window, and the trunk's last residual streams that it starts from."""
    hidden, stored = config.hc_mult * config.hidden_size, _row_format(kv_format)
    return (
        StreamSpec("draft_kv", 1, config.head_dim, stored, kv_row_bytes(config, kv_format), config.sliding_window),
        StreamSpec("draft_hidden", 1, hidden, "f32", hidden * 4, 1, reads_own=False),
    )


def all_streams(config: ModelConfig, kv_format: str, drafts: bool) -> tuple[tuple[int, StreamSpec], ...]:
    """(layer, stream) for the whole network; the draft stage counts as the layer after the last."""
    trunk = [(i, s) for i, ratio in enumerate(config.layer_ratios) for s in layer_streams(config, ratio, kv_format)]
    head = [(config.num_hidden_layers, s) for s in draft_streams(config, kv_format)] if drafts else []
    return (*trunk, *head)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Bytes a pool allocates, before it does: the planner prints it and a test holds the allocator to it."""

    bytes_per_token: float  # growth of one sequence with its context
    state_bytes: int  # one sequence's rings
    page_bytes: dict[int, int]  # ratio -> bytes of one page in all layers of that ratio
    num_pages: dict[int, int]  # ratio -> pages, the spare one (for padding) included
    num_slots: int  # sequences, the spare one included
    table_bytes: int

    @property
    def total_bytes(self) -> int:
        pages = sum(self.page_bytes[r] * n for r, n in self.num_pages.items())
        return self.state_bytes * self.num_slots + pages + self.table_bytes

    def sequence_bytes(self, context: int) -> int:
        """Bytes of rows of one sequence of `context` tokens (pages counted by the row, tables not)."""
        rows = {r: context // r for r in self.page_bytes}
        return self.state_bytes + sum(self.page_bytes[r] // PAGE_ROWS * n for r, n in rows.items())


def pages_for(context: int, ratio: int) -> int:
    """Pages that hold the rows of `context` tokens."""
    return -(-(context // ratio) // PAGE_ROWS)


# Coarse pages (HCA: 8,192 tokens) are also taken by short sequences and by branches of the prefix tree: beside those
# that a full cache of long sequences needs, there is one for each of so many tokens.
BRANCH_TOKENS = 2048


def plan_cache(
    config: ModelConfig,
    kv_format: str,
    max_sequences: int,
    max_context: int,
    num_drafts: int = 0,
    drafts: bool = False,
    cache_tokens: int | None = None,
) -> CachePlan:
    """What a pool for `max_sequences` sequences of up to `max_context` tokens each will allocate, in bytes.

    Args:
        cache_tokens: tokens of history that all sequences hold together; None: each its whole context.
    """
    streams = all_streams(config, kv_format, drafts)
    page_bytes = _page_bytes(streams)
    if cache_tokens is None:
        pages = {r: max_sequences * pages_for(max_context, r) + 1 for r in page_bytes}
    else:
        pages = {r: pages_for(cache_tokens, r) + _branches(r, cache_tokens, max_sequences) + 1 for r in page_bytes}
    return CachePlan(
        bytes_per_token=sum(s.bytes_per_token() for _, s in streams),
        state_bytes=sum(s.row_bytes * s.ring_rows(num_drafts) for _, s in streams if not s.is_history),
        page_bytes=page_bytes,
        num_pages=pages,
        num_slots=max_sequences + 1,
        table_bytes=sum(8 * (max_sequences + 1) * pages_for(max_context, r) for r in page_bytes),
    )


def cache_tokens_in(config: ModelConfig, kv_format: str, cache_bytes: int, max_sequences: int) -> int:
    """Tokens of history whose pages take no more than `cache_bytes`, in whole pages of the finest stream; 0: not one.

    A network that keeps no history holds any number: its positions are the limit.
    """
    page_bytes = _page_bytes(all_streams(config, kv_format, drafts=False))
    if not page_bytes:
        return config.max_position_embeddings
    unit = PAGE_ROWS * min(page_bytes)

    def taken(tokens: int) -> int:
        return sum(b * (pages_for(tokens, r) + _branches(r, tokens, max_sequences) + 1) for r, b in page_bytes.items())

    low, high = 0, cache_bytes // (page_bytes[min(page_bytes)]) + 1
    while high - low > 1:  # the most units that fit
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle * unit) <= cache_bytes else (low, middle)
    return low * unit


def _page_bytes(streams: tuple[tuple[int, StreamSpec], ...]) -> dict[int, int]:
    page_bytes: dict[int, int] = {}
    for _, s in streams:
        if s.is_history:
            page_bytes[s.per_tokens] = page_bytes.get(s.per_tokens, 0) + s.row_bytes * PAGE_ROWS
    return page_bytes


def _branches(ratio: int, cache_tokens: int, max_sequences: int) -> int:
    """Pages beyond those a full cache of long sequences needs: one partly filled page per sequence and branch."""
    return max_sequences + (cache_tokens // BRANCH_TOKENS if ratio * PAGE_ROWS > BRANCH_TOKENS else 0)
