"""Rows that attention reads where they are stored: through page tables, from rings, and from this step's own.

A part of the keys is a tuple of what the kernels are told of it, in the order of `DATA` .. `ROWS`.

Shape letters: T tokens, C head dim, K rows per token of a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device
from pyrosome.ops.rows import PAGE_ROWS as _PAGE_ROWS
from pyrosome.quant.rows import KV_GROUP as _KV_GROUP

PAGE_ROWS = tl.constexpr(_PAGE_ROWS)
KV_GROUP = tl.constexpr(_KV_GROUP)  # a chunk of channels is such a group, or a part of one
PAGES, RING, OWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where a part's rows are
NOTHING, OUTSIDE = tl.constexpr(-1), tl.constexpr(-2)  # an index that names no row, and one past all rows
# Its pool, the same as bfloat16, scales as int64; page tables or slots of spans; the span of each token; this step's
# rows; indices; pages of a span or rows of a ring; spans; indices of a token; the least index that is too large.
DATA, WIDE, SCALE, MAP, SPAN, FRESH = (tl.constexpr(i) for i in range(6))
INDEX, WIDTH, SPANS, COUNT, ROWS = (tl.constexpr(i) for i in range(6, 11))


@triton.jit
def _place_of(index, token, part, is_here, KIND: tl.constexpr):
    """(place in the pool, number among own rows) of each index; below 0 where it is not there."""
    width, spans = part[WIDTH], part[SPANS]
    if KIND == PAGES:
        at = tl.maximum(index, 0)
        pages = part[MAP] + tl.load(part[SPAN] + token, mask=is_here, other=0).to(tl.int64) * width
        page = tl.load(pages + at // PAGE_ROWS, mask=index >= 0, other=0).to(tl.int64)
        place, own = tl.where(index >= 0, page * PAGE_ROWS + at % PAGE_ROWS, -1), index * 0 - 1
    elif KIND == OWN:
        place, own = index * 0 - 1, index
    else:
        at = index - 1  # 0 stands for nothing: a row of zeros
        in_ring = (at >= 0) & (at < spans * width)
        ring = tl.where(in_ring, at, 0)
        span = ring // tl.maximum(width, 1)
        slot = tl.load(part[MAP] + span, mask=in_ring, other=0).to(tl.int64)
        place = tl.where(in_ring, slot * width + ring - span * width, -1)
        own = tl.where(in_ring, -1, at - spans * width)  # below 0 for nothing, too
    return place.to(tl.int64), own.to(tl.int64)


@triton.jit
def is_of_a(leaf, a, KEYS: tl.constexpr):
    """Whether a leaf is one of part a's, which come before those of b."""
    return leaf < (a[COUNT] + KEYS - 1) // KEYS


@triton.jit
def keys_of(token, leaf, a, b, A_KIND: tl.constexpr, B_KIND: tl.constexpr, KEYS: tl.constexpr):
    """(index, place in the pool, number among own rows) of the keys of a leaf.

    An index past all rows is OUTSIDE, and nowhere: no memory is read for it, and its score is no number.
    """
    # Chosen by numbers and not by a branch, which would be one in the loop over leaves.
    is_first = is_of_a(leaf, a, KEYS)
    edge = (a[COUNT] + KEYS - 1) // KEYS
    key = tl.where(is_first, leaf, leaf - edge) * KEYS + tl.arange(0, KEYS)
    count = tl.where(is_first, a[COUNT], b[COUNT])
    index = tl.load(tl.where(is_first, a[INDEX], b[INDEX]) + token * count + key, mask=key < count, other=-1)
    index = tl.where(index < tl.where(is_first, a[ROWS], b[ROWS]), tl.maximum(index, NOTHING), OUTSIDE).to(tl.int32)
    place, own = _place_of(tl.where(is_first, index, NOTHING), token, a, is_first, A_KIND)
    b_place, b_own = _place_of(tl.where(is_first, NOTHING, index), token, b, leaf >= edge, B_KIND)
    return index, tl.maximum(place, b_place), tl.maximum(own, b_own)


@triton.jit
def scales_of(leaf, place, a, b, word, NOPE: tl.constexpr, KEYS: tl.constexpr):
    """The scales of groups 8 x word .. 8 x word + 7 of each row, the bytes of an int64."""
    scale_ptr = tl.where(is_of_a(leaf, a, KEYS), a[SCALE], b[SCALE])
    return tl.load(scale_ptr + place * ((NOPE // KV_GROUP + 7) // 8) + word, mask=place >= 0, other=0)


@triton.jit
def raw_rows(
    leaf, place, a, b, low, CODED: tl.constexpr, C: tl.constexpr, NOPE: tl.constexpr, FORMAT: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels low .. of rows [KEYS, BLOCK_C] as a pool has them (CODED: in e4m3); zeros where a row is in none."""
    # What a chunk adds to an address comes last, as a number: then the rest is computed once for all chunks.
    inner, at, stored = tl.arange(0, BLOCK_C).to(tl.int64)[None, :], place[:, None], (place >= 0)[:, None]
    is_first = is_of_a(leaf, a, KEYS)
    if not CODED and C % BLOCK_C != 0:
        stored = stored & (inner < C - low)
    if FORMAT != "fp8":
        raw = tl.load(tl.where(is_first, a[DATA], b[DATA]) + (at * C + inner) + low, mask=stored, other=0.0)
    elif CODED:
        raw = tl.load(tl.where(is_first, a[DATA], b[DATA]) + (at * (2 * C - NOPE) + inner) + low, mask=stored, other=0)
    else:  # bfloat16 behind NOPE bytes
        wide_ptr = tl.where(is_first, a[WIDE], b[WIDE])
        raw = tl.load(wide_ptr + (at * (C - NOPE // 2) + inner) + (low - NOPE // 2), mask=stored, other=0.0)
    return raw


@triton.jit
def rows_of(
    raw, scales, leaf, own, a, b, low, CODED: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr,
    C: tl.constexpr, FORMAT: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows [KEYS, BLOCK_C] as their products take them: those of `raw_rows`, or this step's own."""
    if FORMAT == "":
        rows = _own_rows(leaf, own, a, b, low, C, NARROW, KEYS, BLOCK_C, UPCAST)
    elif CODED:
        value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32) if HAS_FP8 else device.decode_e4m3(raw)
        scale = device.decode_e8m0((scales >> (low // KV_GROUP % 8 * 8)).to(tl.int32) & 255)
        rows = device.narrow(value * scale[:, None], UPCAST)
    elif UPCAST:
        rows = raw.to(tl.float32)
    else:
        rows = raw
    if FORMAT != "" and (A_KIND != PAGES or B_KIND != PAGES):
        has_own = leaf >= 0
        if B_KIND == PAGES:
            has_own = is_of_a(leaf, a, KEYS)
        elif A_KIND == PAGES:
            has_own = is_of_a(leaf, a, KEYS) == 0
        if has_own:
            fresh = _own_rows(leaf, own, a, b, low, C, NARROW, KEYS, BLOCK_C, UPCAST)
            rows = tl.where((own >= 0)[:, None], fresh, rows)
    return rows


@triton.jit
def _own_rows(
    leaf, own, a, b, low, C: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    inner, is_own = tl.arange(0, BLOCK_C).to(tl.int64)[None, :], (own >= 0)[:, None]
    if C % BLOCK_C != 0:
        is_own = is_own & (inner < C - low)
    fresh_ptr = tl.where(is_of_a(leaf, a, KEYS), a[FRESH], b[FRESH])
    fresh = tl.load(fresh_ptr + (own[:, None] * C + inner) + low, mask=is_own, other=0.0)
    if UPCAST:
        fresh = fresh.to(tl.float32)
    elif NARROW:
        fresh = fresh.to(tl.bfloat16)  # which holds them
    return fresh
