"""Attention of one token's heads over its keys: the heads are the left operand's rows, as one row serves them all.

Keys are taken in leaves of KEYS in the order of their index, part after part, and channels in chunks of BLOCK_C.
`weigh` leaves the weights of each leaf with its maximum and mass, which `gather` multiplies with the values: a token's
sums are too large for the registers of one that also scores.  `attend` does both for one leaf alone.  All use the same
tiles in the same order, so a leaf has the same bits whichever program computes it.  Rows are decoded where they lie.

Shape letters: T tokens, H heads, C head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import gpu
from pyrosome.ops.sparse_attention.triton_rows import KV_GROUP, NOTHING, keys_of, raw_rows, rows_of, scales_of
from pyrosome.ops.sparse_attention.triton_sums import LOWEST, product, rounded


@triton.jit
def _query(q_ptr, token, head, low, H: tl.constexpr, C: tl.constexpr, NARROW: tl.constexpr,
           BLOCK_C: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    inner = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    at = q_ptr + ((token * H + head)[:, None] * C + inner) + low
    BLOCK_H: tl.constexpr = head.shape[0]
    if (H // BLOCK_H * BLOCK_H == H) and (C % BLOCK_C == 0):
        q = tl.load(at)
    else:
        q = tl.load(at, mask=(head < H)[:, None] & (inner < C - low), other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return rounded(q, UPCAST) if NARROW else q


@triton.jit
def _weights(
    q_ptr, held, token, head, leaf, index, place, own, a, b, scale, A_KIND: tl.constexpr, B_KIND: tl.constexpr,
    FORMAT: tl.constexpr, NOPE: tl.constexpr, HELD: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(maximum, mass, weights [heads, KEYS] as their product takes them) of a leaf."""
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    score = tl.zeros((head.shape[0], KEYS), tl.float32)
    if NARROW:
        # All rows are asked for before the first is used.
        raw, scales = (), ()
        for j in tl.static_range(CHUNKS):
            piece, word = 0, 0
            if FORMAT != "":
                piece = raw_rows(leaf, place, a, b, j * BLOCK_C, j * BLOCK_C < NOPE, C, NOPE, FORMAT, KEYS, BLOCK_C)
            if j * BLOCK_C < NOPE:
                word = scales_of(leaf, place, a, b, j // 8, NOPE, KEYS) if j % 8 == 0 else scales[j - 1]
            # Triton's language has no stars.
            raw, scales = raw + (piece,), scales + (word,)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(CHUNKS):
            rows = rows_of(
                raw[j], scales[j], leaf, own, a, b, j * BLOCK_C, j * BLOCK_C < NOPE, A_KIND, B_KIND, C, FORMAT, NARROW,
                KEYS, BLOCK_C, HAS_FP8, UPCAST,
            )  # fmt: skip
            q = held[j] if HELD else _query(q_ptr, token, head, j * BLOCK_C, H, C, NARROW, BLOCK_C, UPCAST)
            score = product(q, tl.trans(rows), score, NARROW, UPCAST)
    else:
        for low in range(0, C, BLOCK_C):
            piece = 0
            if FORMAT != "":
                piece = raw_rows(leaf, place, a, b, low, False, C, NOPE, FORMAT, KEYS, BLOCK_C)
            rows = rows_of(
                piece, 0, leaf, own, a, b, low, False, A_KIND, B_KIND, C, FORMAT, NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST
            )
            q = _query(q_ptr, token, head, low, H, C, NARROW, BLOCK_C, UPCAST)
            score = product(q, tl.trans(rows), score, NARROW, UPCAST)
    lost = tl.where(index == NOTHING, float("-inf"), float("nan"))
    score = tl.where((index >= 0)[None, :], score, lost[None, :])
    top = tl.maximum(tl.max(score, 1), LOWEST) * scale
    p = tl.exp2(tl.fma(score, scale, -top[:, None]))
    mass = tl.sum(p, 1)
    return top, mass, rounded(p, UPCAST) if NARROW else p


@triton.jit
def values(
    p, raw, scales, leaf, own, a, b, low, CODED: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr,
    C: tl.constexpr, FORMAT: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums [heads, BLOCK_C] of a leaf's values by its weights, a chunk of channels."""
    rows = rows_of(
        raw, scales, leaf, own, a, b, low, CODED, A_KIND, B_KIND, C, FORMAT, NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST
    )
    return product(p, rows, tl.zeros((p.shape[0], BLOCK_C), tl.float32), NARROW, UPCAST)


@gpu.jit
def attend(
    q_ptr, top_ptr, mass_ptr, out_ptr,
    a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr, a_width, a_spans, a_K, a_rows,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr, b_width, b_spans, b_K, b_rows,
    leaves, each, scale,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, FORMAT: tl.constexpr, NOPE: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token x leaf, block of heads, chunks of channels), `each` chunks.

    It leaves the sums [T, leaves, H, C], maxima and masses [T, leaves, H]; of a leaf without a key a mass of -1 alone.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0).to(tl.int64)
    token, leaf = row // leaves, (row % leaves).to(tl.int32)
    a = (
        a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr,
        a_width, a_spans, a_K, a_rows,
    )  # fmt: skip
    b = (
        b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr,
        b_width, b_spans, b_K, b_rows,
    )  # fmt: skip
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside, first = head < H, tl.program_id(2) * each
    stop = tl.minimum(first + each, CHUNKS)
    at = row * H + head
    index, place, own = keys_of(token, leaf, a, b, A_KIND, B_KIND, KEYS)
    if tl.max((index != NOTHING).to(tl.int32)) == 0:
        if first == 0:
            tl.store(mass_ptr + at, head * 0.0 - 1.0, mask=inside)
    else:
        top, mass, p = _weights(
            q_ptr, (), token, head, leaf, index, place, own, a, b, scale, A_KIND, B_KIND, FORMAT, NOPE, False, H, C,
            NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST,
        )  # fmt: skip
        if first == 0:
            tl.store(top_ptr + at, top, mask=inside)
            tl.store(mass_ptr + at, mass, mask=inside)
        channel = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
        to = out_ptr + (at[:, None] * C + channel)
        if NOPE > 0:
            for chunk in range(first, tl.minimum(stop, NOPE // BLOCK_C)):
                low = chunk * BLOCK_C
                scales = scales_of(leaf, place, a, b, low // (8 * KV_GROUP), NOPE, KEYS)
                raw = raw_rows(leaf, place, a, b, low, True, C, NOPE, FORMAT, KEYS, BLOCK_C)
                value = values(
                    p, raw, scales, leaf, own, a, b, low, True, A_KIND, B_KIND, C, FORMAT, NARROW, KEYS, BLOCK_C,
                    HAS_FP8, UPCAST,
                )  # fmt: skip
                tl.store(to + low, value, mask=inside[:, None])
        for chunk in range(tl.maximum(first, NOPE // BLOCK_C), stop):
            low = chunk * BLOCK_C
            raw = 0
            if FORMAT != "":
                raw = raw_rows(leaf, place, a, b, low, False, C, NOPE, FORMAT, KEYS, BLOCK_C)
            value = values(
                p, raw, 0, leaf, own, a, b, low, False, A_KIND, B_KIND, C, FORMAT, NARROW, KEYS, BLOCK_C, HAS_FP8,
                UPCAST,
            )  # fmt: skip
            tl.store(to + low, value, mask=inside[:, None] & (channel < C - low))


@gpu.jit
def weigh(
    q_ptr, p_ptr, top_ptr, mass_ptr,
    a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr, a_width, a_spans, a_K, a_rows,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr, b_width, b_spans, b_K, b_rows,
    first_token, leaves, scale,
    RUN: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, FORMAT: tl.constexpr, NOPE: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token, run, block of heads) of RUN leaves.

    It leaves weights [T, leaves, H, KEYS], maxima and masses [T, leaves, H].  A leaf without a key has a mass of -1,
    and nothing else unless one behind it in the run has a key.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    a = (
        a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr,
        a_width, a_spans, a_K, a_rows,
    )  # fmt: skip
    b = (
        b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr,
        b_width, b_spans, b_K, b_rows,
    )  # fmt: skip
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    inner = tl.arange(0, KEYS)
    held = ()
    HELD: tl.constexpr = NARROW  # float32 queries are too large to be kept
    if HELD:
        for j in tl.static_range(CHUNKS):
            part = _query(q_ptr, token, head, j * BLOCK_C, H, C, NARROW, BLOCK_C, UPCAST)
            held = held + (part,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's language has no stars
    first, edge = tl.program_id(1) * RUN, (a_K + KEYS - 1) // KEYS
    # To the last leaf of the run that has a key.
    key = first * KEYS + tl.arange(0, RUN * KEYS)
    more = key - edge * KEYS
    there = tl.load(a_index_ptr + token * a_K + key, mask=key < a_K, other=-1)
    there = tl.maximum(there, tl.load(b_index_ptr + token * b_K + more, mask=(more >= 0) & (more < b_K), other=-1))
    stop = (tl.max(tl.where(there >= 0, key + 1, 0)) + KEYS - 1) // KEYS
    index, place, own = keys_of(token, first, a, b, A_KIND, B_KIND, KEYS)
    for leaf in range(first, stop):
        top, mass, p = _weights(
            q_ptr, held, token, head, leaf, index, place, own, a, b, scale, A_KIND, B_KIND, FORMAT, NOPE, HELD, H, C,
            NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST,
        )  # fmt: skip
        index, place, own = keys_of(token, leaf + 1, a, b, A_KIND, B_KIND, KEYS)
        at = (row * leaves + leaf) * H + head
        tl.store(top_ptr + at, top, mask=head < H)
        tl.store(mass_ptr + at, mass, mask=head < H)
        tl.store(p_ptr + at[:, None] * KEYS + inner[None, :], p, mask=(head < H)[:, None])
    for leaf in range(tl.maximum(first, stop), tl.minimum(first + RUN, leaves)):
        tl.store(mass_ptr + (row * leaves + leaf) * H + head, head * 0.0 - 1.0, mask=head < H)
