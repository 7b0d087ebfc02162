"""A step's tensors, made and dropped in the order of the code that computes it.

Shape letters: T tokens in step, B spans, J residual streams, D model dim, H heads, C head dim, K rows chosen, N rows at
hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyrosome.cache.streams import StreamSpec, draft_streams, layer_streams, pages_for
from pyrosome.config import CSA_RATIO, ModelConfig

if TYPE_CHECKING:
    from pyrosome.plan.workspace import Spans

LEAST_LENT = 4 << 20  # bytes of a tensor that memory is kept for (`ops.workspace`)
INDEX_ROWS, INDEX_ELEMENTS = 8192, 1 << 20  # scored at once (`ops.index_topk`)
FINITE_ROWS = 256  # of streams looked at together for what is no number (`engine.runner`)


@dataclasses.dataclass(slots=True)
class Held:
    """Memory of one tensor; `room` is that of the block it was lent, 0 for memory of its own."""

    num_bytes: int
    room: int = 0


class Memory:
    """What is alive, and the most there ever was, by phase."""

    def __init__(self, *, keeps_all: bool = False) -> None:
        self.keeps_all = keeps_all  # nothing that was made is ever dropped
        self.now = self.peak = 0
        self.phase = ""
        self.phases: dict[str, int] = {}
        self._free: dict[int, int] = {}  # blocks by size

    def make(self, *shape: int, size: int = 4) -> Held:
        """A tensor of elements of `size` bytes."""
        held = Held(size)
        for n in shape:
            held.num_bytes *= n
        self._grow(held.num_bytes)
        return held

    def lend(self, *shape: int) -> Held:
        """A float32 tensor by `ops.workspace.empty`: a large one in a block that may have been used before."""
        num_bytes = 4
        for n in shape:
            num_bytes *= n
        if num_bytes < LEAST_LENT:
            return self.make(num_bytes, size=1)
        fits = [room for room, count in self._free.items() if count and num_bytes <= room <= num_bytes * 3 // 2]
        if fits:
            room = min(fits)
            self._free[room] -= 1
            return Held(num_bytes, room)
        step = 1 << (num_bytes.bit_length() - 4)
        room = -(-num_bytes // step) * step
        self._grow(room)
        return Held(num_bytes, room)

    def drop(self, *held: Held) -> None:
        """The tensors are gone; what was lent stays, for the next."""
        for h in held if not self.keeps_all else ():
            if h.room:
                self._free[h.room] = self._free.get(h.room, 0) + 1
            else:
                self.now -= h.num_bytes

    def passing(self, *shape: int, size: int = 4) -> None:
        """A tensor that is gone at once, kept by nobody."""
        held = self.make(*shape, size=size)
        self.now -= held.num_bytes

    def _grow(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), self.now)


class Walk:
    """One step from its beginning to its end."""

    def __init__(self, spans: Spans, memory: Memory, prefix: str = "") -> None:
        self.spans, self.config, self.memory, self.prefix = spans, spans.config, memory, prefix
        self.T, self.B = spans.num_tokens, len(spans.spans)
        self.derived: dict[tuple[object, ...], list[Held]] = {}  # what layers share, kept as long as the step
        self._index_bytes = 0

    def run(self) -> None:
        """`Runner.step`, and the draft stage behind it."""
        m, c = self.memory, self.config
        self._now("step")
        packed = m.make(3 * self.T + 4 * self.B, size=8)
        streams = self._trunk()
        logits = self._logits(streams)
        self._now("check")
        before = []
        hidden = self._rings(draft_streams(c, self.spans.kv_format))["draft_hidden"]
        if self.spans.has_drafts:
            before = [m.make(self.B, hidden, c.hc_mult * c.hidden_size)]
            self._place(hidden)
        m.passing(min(self.T, FINITE_ROWS), c.hc_mult * c.hidden_size)
        if self.spans.has_drafts and self.spans.is_drafting:
            Walk(self.spans, m, "draft stage: ").draft(hidden)
        m.drop(packed, streams, *logits, *before)
        self._forget()

    def draft(self, ring_rows: int) -> None:
        """`Runner.draft`, while the trunk's step and streams are still there: from them and the next ids."""
        m, (T, J, D) = self.memory, (self.T, self.config.hc_mult, self.config.hidden_size)
        self._now("inputs")
        packed = m.make(3 * T + 4 * self.B, size=8)
        united = m.make(1 + self.B * ring_rows + T, J, D)
        given = m.make(T, J, D)
        m.drop(united)
        embedded = m.make(T, D)
        normed = m.make(T, D)
        m.drop(embedded)
        by_id, normed_streams = m.lend(T, D), m.make(T, J, D)
        by_streams = m.lend(T, J, D)
        m.drop(normed_streams)
        streams = m.make(T, J, D)
        m.drop(by_id, by_streams)
        turns = m.make(T, self.config.qk_rope_head_dim)
        streams = self._block(streams, self.config.num_hidden_layers, 0, [])
        m.drop(turns, normed, given)
        m.drop(*self._logits(streams), packed, streams)
        self._forget()

    def _now(self, phase: str) -> None:
        self.memory.phase = self.prefix + phase

    def capture(self) -> None:
        """`engine.graphs.capture`: streams before the first layer, and all that is made after."""
        self.memory.make(3 * self.T + 4 * self.B, size=8)
        self._logits(self._trunk())

    def _trunk(self) -> Held:
        m, c, T = self.memory, self.config, self.T
        turns = [m.make(T, c.qk_rope_head_dim)]  # unit complex numbers: half as many, of 8 bytes
        ratios = sorted({r for r in c.layer_ratios if r})
        if ratios:
            turns.append(m.make(T, c.qk_rope_head_dim))
        for ratio in ratios:
            rows = self.spans.num_emits(ratio)
            self._once("emit", ratio, sizes=[rows + 1, rows + 1, rows, rows] if rows else [])
            turns.append(m.make(rows, c.qk_rope_head_dim))
        self._now("embedding")
        streams = m.make(T, c.hc_mult, c.hidden_size)
        m.passing(T, c.hidden_size)
        scores: list[Held] = []
        for layer, ratio in enumerate(c.layer_ratios):
            streams = self._block(streams, layer, ratio, scores)
        m.drop(*turns, *scores)
        return streams

    def _block(self, streams: Held, layer: int, ratio: int, scores: list[Held]) -> Held:
        """`Block.forward`; the caller holds the streams until it has the new ones."""
        m, (T, J, D) = self.memory, (self.T, self.config.hc_mult, self.config.hidden_size)
        self._now("hyper-connections")
        sub = self._read_streams()
        out = self._attention(ratio, scores)
        self._now("hyper-connections")
        turned, next_sub = m.lend(T, J, D), self._read_streams()
        m.drop(*sub)
        done = self._moe(layer)
        m.drop(out)
        self._now("hyper-connections")
        new = m.lend(T, J, D)
        m.drop(turned, *next_sub, done, streams)
        return new

    def _read_streams(self) -> list[Held]:
        """What a sub-block reads, and how its output goes back."""
        m, (T, J, D) = self.memory, (self.T, self.config.hc_mult, self.config.hidden_size)
        return [m.lend(T, D), m.make(T, J), m.make(T, J, J)]

    def _attention(self, ratio: int, scores: list[Held]) -> Held:
        m, c, s, T = self.memory, self.config, self.spans, self.T
        H, C, narrow = c.num_attention_heads, c.head_dim, s.kv_format != "f32"
        rings = self._rings(layer_streams(c, ratio, s.kv_format))
        self._now("attention: projections")
        widths = [c.q_lora_rank, C, *_compressed_widths(c, ratio)]
        latent, row, *inputs = [m.lend(T, n) for n in widths]
        raised = m.lend(T, H, C)
        index_q = [m.lend(T, c.index_n_heads, c.index_head_dim)] if ratio == CSA_RATIO else []
        q = m.lend(T, H, C)
        m.drop(raised)
        normed = m.lend(T, C)
        m.drop(row)
        row = normed
        if narrow:
            row = m.make(T, C)
            m.drop(normed)
        self._window_index(rings["window_kv"])
        held = [latent, *inputs, *index_q]
        if ratio:
            self._compressor(C, ratio, rings["tail"])
        if ratio == CSA_RATIO:
            scores += self._indexer(rings["index_tail"])
        elif ratio:
            self._all_rows(ratio)
        self._now("attention")
        if narrow:
            o = m.lend(T, H, C)
        else:
            o, united = self._attention_over_floats(ratio, rings["window_kv"])
            held.append(united)
        m.drop(q)
        self._place(rings["window_kv"])
        self._now("attention: output")
        z, out = m.lend(T, c.o_groups, c.o_lora_rank), m.lend(T, c.hidden_size)
        m.drop(row, o, z, *held)
        return out

    def _rings(self, streams: Sequence[StreamSpec]) -> dict[str, int]:
        return {s.name: s.ring_rows(self.spans.num_drafts) for s in streams if not s.is_history}

    def _compressor(self, width: int, ratio: int, ring_rows: int) -> None:
        """`Compressor.forward`, and its rows in their pages: by then they are not needed any more."""
        m, rows = self.memory, self.spans.num_emits(ratio)
        made = m.make(rows, width)
        self._place(ring_rows)
        if rows:
            self._once("place", ratio, sizes=[rows])
        self._once("pages", ratio, sizes=[self.B * pages_for(self.spans.max_context, ratio)])
        m.drop(made)

    def _indexer(self, ring_rows: int) -> list[Held]:
        """`Indexer.forward`: what it returns is kept until the last layer is done."""
        m, c, s, T = self.memory, self.config, self.spans, self.T
        self._now("indexer")
        rows, N = s.num_emits(CSA_RATIO), s.num_rows(CSA_RATIO)
        K = min(c.index_topk, N)
        pooled = m.make(rows, c.index_head_dim)
        self._place(ring_rows)
        key = m.lend(rows, c.index_head_dim)
        m.drop(pooled)
        q, weight = m.lend(T, c.index_n_heads, c.index_head_dim), m.make(T, c.index_n_heads)
        self._once("visible", CSA_RATIO, sizes=[T])
        if s.kv_format != "fp8" and K:
            m.passing(self._index_over_floats(N, K), size=1)
        choice = [m.make(T, K), m.make(T, K, size=8)]
        m.drop(key, q, weight)
        return choice

    def _index_over_floats(self, N: int, K: int) -> int:
        """Bytes at the peak of `index_topk`'s definition, which reads keys of any format as floats."""
        if self._index_bytes:
            return self._index_bytes  # every CSA layer's are alike
        m, c, T = Memory(), self.config, self.T
        kept: list[Held] = []  # of the last range of rows, until the function ends
        best: list[Held] = []
        for low in range(0, N, INDEX_ROWS):
            n = min(INDEX_ROWS, N - low)
            numbers, keys = m.make(n, size=8), self._decoded(m, self.B * n, c.index_head_dim)
            m.drop(*kept)
            parts = self._ranked(m, n, low, K)
            joined = m.make(T, min(K, low + n), size=8)
            m.drop(*best)
            best, kept = [joined], [numbers, keys, *parts]
        index = m.make(T, K, size=16)  # sorted: which, and in what order
        m.passing(T, K, size=8)
        m.passing(T, K, size=33)  # scores that are read out of ranks again
        m.drop(index, *best, *kept)
        self._index_bytes = m.peak
        return m.peak

    def _ranked(self, m: Memory, n: int, low: int, K: int) -> list[Held]:
        """What is left of ranking rows low..low + n: the best of every tile of tokens, and the last tile's scores."""
        tile, wide = max(1, INDEX_ELEMENTS // (self.config.index_n_heads * n)), n + min(K, low)
        parts: list[Held] = []
        last: list[Held] = []
        ranked: list[Held] = []
        for _, tokens in self.spans.spans:
            alike = max(0, -(-tokens // tile) - 3) * tile  # all but the last tiles leave their part, and no more
            if alike:
                parts.append(m.make(alike, min(K, wide), size=8))
            for first in range(alike, tokens, tile):
                rows = min(tile, tokens - first)
                score = m.make(rows, n)
                m.drop(*last)
                last, rank = [score], m.make(rows, n, size=8)
                m.passing(rows, n, size=24)  # bits, their order, and it moved up: beside the rank they become
                m.drop(*ranked)
                if low:
                    joined = m.make(rows, wide, size=8)
                    m.drop(rank)
                    rank = joined
                if wide > K:
                    parts.append(m.make(rows, K, size=8))
                    m.passing(rows, K, size=8)
                    ranked = [rank]
                else:
                    parts.append(rank)
        return [*parts, *last, *ranked]

    def _decoded(self, m: Memory, rows: int, width: int) -> Held:
        """Rows of pages as floats."""
        if self.spans.kv_format == "f32":
            return m.make(rows, width)
        stored = m.make(rows, width, size=2)
        wide = m.make(rows, width)
        m.drop(stored)
        return wide

    def _attention_over_floats(self, ratio: int, ring_rows: int) -> tuple[Held, Held]:
        """The definition of `attention` over float32 rows: (its output, the window's rows, kept with their view)."""
        m, c, s, T = self.memory, self.config, self.spans, self.T
        H, C = c.num_attention_heads, c.head_dim
        parts = [m.make(T, H, C), m.make(T, H)]
        ring = m.make(self.B, ring_rows, C)
        united = m.make(1 + self.B * ring_rows + T, C)
        m.drop(ring)
        m.passing(T, c.sliding_window, size=8)
        if ratio:
            N = s.num_rows(ratio)
            K = min(c.index_topk, N) if ratio == CSA_RATIO else s.context // ratio
            parts += [m.make(T, H, C), m.make(T, H)]
            m.drop(*self._rows_read(N, K))
        o = m.make(T, H, C)
        m.drop(*parts)
        return o, united

    def _rows_read(self, N: int, K: int) -> list[Held]:
        """`PagedRows.read`: all rows of the step's sequences, where that is fewer than K of each token; and which."""
        m, C, T = self.memory, self.config.head_dim, self.T
        if not K:
            return []
        read = m.make(min(self.B * N, T * K), C)
        if self.B * N <= T * K:
            whole = m.make(1 + self.B * N, C)
            m.drop(read)
            read = whole
        return [read, m.make(T, K, size=8)]

    def _moe(self, layer: int) -> Held:
        m, c, T = self.memory, self.config, self.T
        self._now("experts")
        if c.is_hash(layer):
            self._once("picked", layer, sizes=[T * c.num_experts_per_tok])
        route = [m.make(T, c.num_experts_per_tok, size=8), m.make(T, c.num_experts_per_tok)]
        routed = m.lend(T, c.hidden_size)
        if self.spans.ranks > 1:
            routed = self._sum_of_ranks(routed)
        out = m.lend(T, c.hidden_size)
        m.drop(routed, *route)
        return out

    def _sum_of_ranks(self, part: Held) -> Held:
        """`Mesh.sum`: every rank's part, added as a tree."""
        m, size, shape = self.memory, self.spans.ranks, (self.T, self.config.hidden_size)
        parts = m.make(size, *shape)
        while size > 1:
            size //= 2
            sums = m.make(size, *shape)
            m.drop(parts)
            parts = sums
        m.drop(part)
        return parts

    def _logits(self, streams: Held) -> list[Held]:
        m, c = self.memory, self.config
        self._now("logits")
        rows = self.T if self.spans.every_row else self.B
        at = m.make(rows, size=8)
        picked = [] if rows == self.T else [m.make(rows, c.hc_mult, c.hidden_size)]
        collapsed, logits = m.make(rows, c.hidden_size), m.lend(rows, c.vocab_size)
        m.drop(*picked, collapsed)
        return [at, logits]

    # What depends on the step alone is derived once, and kept as long as it.

    def _once(self, *key: object, sizes: Sequence[int]) -> None:
        if key not in self.derived:
            self.derived[key] = [self.memory.make(n, size=8) for n in sizes]

    def _forget(self) -> None:
        self.memory.drop(*(held for made in self.derived.values() for held in made))

    def _place(self, ring_rows: int) -> None:
        """Where each token's row of a ring is written: slot, row, and both as one number."""
        self._once("ring", ring_rows, sizes=[self.T] * 3)

    def _window_index(self, ring_rows: int) -> None:
        if ("window", ring_rows) in self.derived:
            return
        self.memory.passing(self.T, self.config.sliding_window, size=5 * 8 + 1)
        self._once("window", ring_rows, sizes=[self.T * self.config.sliding_window])

    def _all_rows(self, ratio: int) -> None:
        self._once("visible", ratio, sizes=[self.T])
        if ("rows", ratio) in self.derived:
            return
        self._now("attention: all rows")
        self._once("rows", ratio, sizes=[self.T * (self.spans.context // ratio)])
        self.memory.passing(self.T, self.spans.context // ratio, size=1)


def _compressed_widths(config: ModelConfig, ratio: int) -> list[int]:
    """Widths of what a layer's compressors and indexer read of its input."""
    if not ratio:
        return []
    own = config.head_dim * (2 if ratio == CSA_RATIO else 1)
    index = [2 * config.index_head_dim] * 2 + [config.index_n_heads] if ratio == CSA_RATIO else []
    return [own, own, *index]
