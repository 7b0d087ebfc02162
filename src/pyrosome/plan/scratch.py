"""Memory that the native library takes for itself during a step: kept by each thread, so that no step allocates.

A thread's scratch (`ops/native.cpp`) is a list of chunks; what a call takes lies in them one behind the other until the
call ends, and the next call begins anew.  Here the same calls take the same sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyrosome.config import CSA_RATIO, ModelConfig

if TYPE_CHECKING:
    from pyrosome.plan.workspace import Spans

FIRST_CHUNK = 1 << 20
ALIGNMENT, BASE = (
    64,
    48,
)  # of what is taken; what is lost to it at the beginning of a chunk, which lies 16 bytes behind a page
ROW_BLOCK, TILE, RUN = 384, 64, 128  # rows together, outputs of a tile, inputs of a prepared run (tiles.h)
TILE_ROWS = 192  # rows whose sums one tile keeps (tiles.cpp)
SPLIT, TOKENS, BLOCK = 128, 8, 64  # keys of a split, tokens that share them, channels at a time (attend.cpp)
ROWS_EACH = 128  # rows that an expert is given at least, where there are tokens enough (experts/cpu.cpp)
QUERIES, PAGE, LANES, HEADS = 16, 64, 16, 4  # index_topk/cpu.cpp


class Arena:
    """One thread's scratch."""

    def __init__(self) -> None:
        self.rooms: list[int] = []  # bytes of each chunk
        self.touched: list[int] = []  # of each, at the most
        self._at = (0, 0)  # chunk, and bytes used of it

    @property
    def held_bytes(self) -> int:
        """What the library asked of the system; pages that were never written take no memory."""
        return sum(self.rooms)

    @property
    def touched_bytes(self) -> int:
        return sum(self.touched)

    @contextmanager
    def block(self) -> Iterator[None]:
        """What is taken inside is free again after it."""
        before = self._at
        yield
        self._at = before

    def take(self, num_bytes: int) -> None:
        """Memory until the block ends: in the first chunk from here on with so much room, or in a new one."""
        need = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        chunk, used = self._at
        while True:
            if chunk == len(self.rooms):
                self.rooms.append(max(need + ALIGNMENT, 2 * self.rooms[-1] if self.rooms else FIRST_CHUNK))
                self.touched.append(0)
            if BASE + used + need <= self.rooms[chunk]:
                break
            chunk, used = chunk + 1, 0
        self._at = chunk, used + need
        self.touched[chunk] = max(self.touched[chunk], used + need)


def scratch_bytes(spans: Spans) -> int:
    """Of all threads, in the pages that are written."""
    caller, worker = arenas(spans)
    return caller.touched_bytes + (spans.threads - 1) * worker.touched_bytes + spans.threads * _vectors(spans)


def arenas(spans: Spans) -> tuple[Arena, Arena]:
    """Scratch of the thread that calls, and of each other one, after a step."""
    caller, worker = Arena(), Arena()
    for arena, calls in ((caller, True), (worker, False)):
        step = _Calls(spans, arena, calls)
        for ratio in dict.fromkeys(spans.config.layer_ratios):
            step.layer(ratio)
        step.head()
        if spans.has_drafts and spans.is_drafting:
            step.draft()
    return caller, worker


class _Calls:
    """What the calls of a step take; a thread that does not call takes what its share of the parts does."""

    def __init__(self, spans: Spans, arena: Arena, calls: bool) -> None:
        self.spans, self.config, self.arena, self.calls = spans, spans.config, arena, calls
        self.T = spans.num_tokens
        self.quantised = spans.form == "tiles" and spans.quantised
        self.is_exact = spans.numerics == "exact"

    def layer(self, ratio: int) -> None:
        """`Block.forward`."""
        c, T = self.config, self.T
        self._streams()
        self._linear(T, c.hidden_size, norm=False)
        self._linear(T, c.q_lora_rank, norm=True)
        if ratio == CSA_RATIO and self.spans.kv_format == "fp8":
            self._index()
        if self.spans.kv_format != "f32":
            self._attention(ratio)
        self._grouped()
        self._linear(T, c.o_groups * c.o_lora_rank, norm=False)
        self._streams()
        self._route()
        block = max(256, ROWS_EACH * c.n_routed_experts // c.num_experts_per_tok)
        for tokens in {min(block, T), T % block or block}:
            self._routed(min(tokens, T))
        with self.arena.block():
            if self.calls:
                self.arena.take(4 * T * c.moe_intermediate_size)
            self._experts(T, T, 1)

    def head(self) -> None:
        """The norm before the head, whose weight is not quantised."""
        rows = self.T if self.spans.every_row else len(self.spans.spans)
        if self.calls:
            with self.arena.block():
                self.arena.take(4 * rows * self.config.hidden_size)

    def draft(self) -> None:
        """What goes into the draft stage's block, and the block, whose layer has no history."""
        c = self.config
        self._linear(self.T, c.hidden_size, norm=False)
        self._linear(self.T * c.hc_mult, c.hidden_size, norm=False)
        self.layer(0)
        self.head()

    def _inputs(self, rows: int, width: int, *, floats: bool | None = None) -> int:
        """Bytes of rows that are prepared for a quantised weight: pairs of bfloat16, or of floats."""
        floats = self.is_exact if floats is None else floats
        return -(-width // RUN) * rows * (512 if floats else 256)

    def _linear(self, rows: int, width: int, *, norm: bool) -> None:
        with self.arena.block():
            if self.calls and norm:
                self.arena.take(4 * rows * width)
            if self.calls and self.quantised:
                self.arena.take(self._inputs(rows, width))
            self._tile(min(rows, ROW_BLOCK))

    def _tile(self, rows: int) -> None:
        """Sums of one tile, and its codes spread out."""
        if not self.quantised or rows <= 8:
            return
        with self.arena.block():
            self.arena.take(4 * min(rows, TILE_ROWS) * TILE)
            self.arena.take(4 * TILE * TILE)

    def _grouped(self) -> None:
        c, rows = self.config, min(self.T, ROW_BLOCK)
        width = c.num_attention_heads // c.o_groups * c.head_dim
        with self.arena.block():
            if self.calls and self.quantised:
                self.arena.take(c.o_groups * self._inputs(rows, width, floats=self.spans.kv_format == "f32"))
            self._tile(rows)

    def _routed(self, tokens: int) -> None:
        """`visit`: pairs in order of their experts, what these make of them, and the sums.

        Experts of other ranks are taken to be chosen as often as this one's.
        """
        c = self.config
        chosen, experts = tokens * c.num_experts_per_tok, -(-c.n_routed_experts // self.spans.ranks)
        pairs = -(-chosen // self.spans.ranks)
        take = self.arena.take
        with self.arena.block():
            if self.calls:
                take(8 * chosen)
                take(8 * (experts + 1))
                take(4 * pairs * c.moe_intermediate_size)
                take(4 * pairs * c.hidden_size)
            self._experts(tokens, pairs, experts)
            if self.calls:
                take(8 * tokens)
                take(16 * chosen)

    def _experts(self, tokens: int, pairs: int, experts: int) -> None:
        """`up` and `down`, by tiles of rows of one expert: it may be every token's."""
        c, rows = self.config, min(tokens, ROW_BLOCK)
        is_few = pairs <= 6 * experts and -(-c.moe_intermediate_size // TILE) >= 8 * self.spans.threads
        for count, width, raised in (
            (tokens, c.hidden_size, rows * TILE * (4 if is_few else 1)), (pairs, c.moe_intermediate_size, 0),
        ):  # fmt: skip
            with self.arena.block():
                if self.calls:
                    if self.quantised:
                        self.arena.take(self._inputs(count, width))
                    self.arena.take(4 * pairs)
                    self.arena.take(8 * pairs)
                    self.arena.take(24 * (experts + pairs // ROW_BLOCK))
                with self.arena.block():
                    self.arena.take(4 * raised)
                    self._tile(rows)

    def _streams(self) -> None:
        c = self.config
        rows = min(self.T, max(4, (256 << 10) // 4 // (c.hc_mult * c.hidden_size) // 4 * 4))
        with self.arena.block():
            self.arena.take(4 * rows * (2 + c.hc_mult) * c.hc_mult)
            self.arena.take(8 * rows)
            self.arena.take(8 * rows)

    def _route(self) -> None:
        c, rows = self.config, -(-self.T // self.spans.threads)
        with self.arena.block():
            self.arena.take(4 * rows * c.n_routed_experts)
            self.arena.take(8 * rows)
            self.arena.take(8 * rows)
            self.arena.take(4 * (c.n_routed_experts + LANES))

    def _attention(self, ratio: int) -> None:
        """What a group of neighbouring tokens is computed in (`Work::run`)."""
        c, s, take = self.config, self.spans, self.arena.take
        heads = min(c.num_attention_heads, 32 if c.num_attention_heads <= 32 or s.threads > self.T else 64)
        blocks = -(-c.num_attention_heads // heads)
        tokens = max(1, min(TOKENS, 128 // heads, self.T * blocks // s.threads))
        lanes, width = -(-tokens * heads // LANES) * LANES, -(-c.head_dim // 32) * 32
        keys = SPLIT + TOKENS - 1
        pairs = -(-keys // 32) * 16
        with self.arena.block():
            for num_bytes in (
                4 * width // 2 * lanes, 2 * (keys + 1) * width, 8 * keys, 4 * pairs * BLOCK, 4 * keys * lanes,
                4 * pairs * lanes, 4 * pairs * lanes, 4 * lanes * width, 4 * lanes, 4 * lanes,
            ):  # fmt: skip
                take(num_bytes)
            rows = min(c.index_topk, s.num_rows(ratio)) if ratio == CSA_RATIO else s.context // ratio if ratio else 0
            take(8 * (max(rows, c.sliding_window) + tokens))

    def _index(self) -> None:
        """`index_topk` for some queries of a span: each as codes, with the best rows it has seen, beside one page."""
        c, s, take = self.config, self.spans, self.arena.take
        groups, heads = c.index_head_dim // 32, -(-c.index_n_heads // HEADS) * HEADS
        rows = s.num_rows(CSA_RATIO)
        K = min(c.index_topk, rows)
        if not K:
            return
        room = min(K + max(K, 1024), rows) + LANES
        queries = min(QUERIES, max(tokens for _, tokens in s.spans))
        with self.arena.block():
            for _ in range(queries):
                for num_bytes in (heads * c.index_head_dim, 4 * heads * groups, 4 * heads * groups, 4 * heads):
                    take(num_bytes)
                if self.is_exact:
                    take(4 * heads * c.index_head_dim)
                take(4 * (room + LANES))
                take(4 * (room + LANES))
            take(PAGE * c.index_head_dim)
            take(4 * PAGE * groups)
            if self.is_exact:
                take(4 * PAGE * c.index_head_dim)


def _vectors(spans: Spans) -> int:
    """What attention over float32 rows takes beside the scratch, on each thread."""
    c: ModelConfig = spans.config
    if spans.kv_format != "f32":
        return 0
    return 4 * (SPLIT * c.head_dim + c.num_attention_heads * (SPLIT + c.head_dim))
