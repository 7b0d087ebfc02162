"""Rows that attention reads where they are stored: through page tables, from rings, and from this step's own.

Shape letters: T tokens, C head dim, K rows per token of a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device

PAGE_ROWS = tl.constexpr(64)
KV_GROUP = tl.constexpr(64)  # channels that share a scale
PAGES, RING, OWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where a part's rows are


@triton.jit
def place_of(index, token, map_ptr, span_ptr, width, spans, KIND: tl.constexpr):
    """(place in the pool, number among own rows) of each index; below 0 where it is not there."""
    if KIND == PAGES:
        at = tl.maximum(index, 0)
        pages = map_ptr + tl.load(span_ptr + token).to(tl.int64) * width
        page = tl.load(pages + at // PAGE_ROWS, mask=index >= 0, other=0).to(tl.int64)
        place, own = tl.where(index >= 0, page * PAGE_ROWS + at % PAGE_ROWS, -1), index * 0 - 1
    elif KIND == OWN:
        place, own = index * 0 - 1, index
    else:
        at = index - 1  # 0 stands for nothing: a row of zeros
        in_ring = (at >= 0) & (at < spans * width)
        ring = tl.where(in_ring, at, 0)
        span = ring // tl.maximum(width, 1)
        slot = tl.load(map_ptr + span, mask=in_ring, other=0).to(tl.int64)
        place = tl.where(in_ring, slot * width + ring - span * width, -1)
        own = tl.where(in_ring, -1, at - spans * width)  # below 0 for nothing, too
    return place.to(tl.int64), own.to(tl.int64)


@triton.jit
def _scale(scale_ptr, place, LOW: tl.constexpr, NOPE: tl.constexpr):
    """Scales [KEYS, 1] of the group of channels that LOW begins."""
    at = scale_ptr + place * ((NOPE // KV_GROUP + 7) // 8 * 8) + LOW // KV_GROUP
    return device.decode_e8m0(tl.load(at, mask=place >= 0, other=0))[:, None]


@triton.jit
def rows_at(
    data_ptr, wide_ptr, scale_ptr, own_ptr, place, own, LOW: tl.constexpr, C: tl.constexpr, NOPE: tl.constexpr,
    FORMAT: tl.constexpr, HAS_OWN: tl.constexpr, NARROW: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Channels LOW .. of rows [KEYS, BLOCK_C], as their products take them; zeros where a row is nowhere."""
    # What a chunk adds to an address comes last, as a number: then the rest is computed once for all chunks.
    inner = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    stored, is_own = (place >= 0)[:, None], (own >= 0)[:, None]
    if LOW + BLOCK_C > C:
        stored, is_own = stored & (inner < C - LOW), is_own & (inner < C - LOW)
    at = place[:, None]
    if FORMAT == "fp8":
        # e4m3 bytes of the first NOPE channels, then bfloat16: a tile may have both.
        if LOW < NOPE:
            coded = stored
            if LOW + BLOCK_C > NOPE:
                coded = stored & (inner < NOPE - LOW)
            code = tl.load(data_ptr + (at * (2 * C - NOPE) + inner) + LOW, mask=coded, other=0)
            scale = _scale(scale_ptr, place, LOW, NOPE)
            if (BLOCK_C > KV_GROUP) and (LOW + KV_GROUP < NOPE):
                scale = tl.where(inner < KV_GROUP, scale, _scale(scale_ptr, place, LOW + KV_GROUP, NOPE))
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if HAS_FP8 else device.decode_e4m3(code)
            rows = device.narrow(value * scale, UPCAST)
        if LOW + BLOCK_C > NOPE:
            is_wide = stored
            if LOW < NOPE:
                is_wide = stored & (inner >= NOPE - LOW)
            wide = tl.load(wide_ptr + (at * (C - NOPE // 2) + inner) + (LOW - NOPE // 2), mask=is_wide, other=0.0)
            if UPCAST:
                wide = wide.to(tl.float32)
            rows = tl.where(inner < NOPE - LOW, rows, wide) if LOW < NOPE else wide
    elif FORMAT != "":
        rows = tl.load(data_ptr + (at * C + inner) + LOW, mask=stored, other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
    if HAS_OWN:
        fresh = tl.load(own_ptr + (own[:, None] * C + inner) + LOW, mask=is_own, other=0.0)
        if UPCAST:
            fresh = fresh.to(tl.float32)
        elif NARROW:
            fresh = fresh.to(tl.bfloat16)  # which holds them
        rows = fresh if FORMAT == "" else tl.where(is_own, fresh, rows)
    return rows


@triton.jit
def keys_of(
    token, is_first, leaf,
    a_map_ptr, a_span_ptr, a_index_ptr, a_width, a_spans, a_K,
    b_map_ptr, b_span_ptr, b_index_ptr, b_width, b_spans, b_K,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(index, place in the pool, number among own rows) of the keys of a leaf of part a (`is_first`) or b."""
    key = leaf * KEYS + tl.arange(0, KEYS)
    if b_index_ptr is None:
        index = tl.load(a_index_ptr + token * a_K + key, mask=key < a_K, other=-1)
        index = index.to(tl.int32)  # no number of rows is larger
        place, own = place_of(index, token, a_map_ptr, a_span_ptr, a_width, a_spans, A_KIND)
    else:
        # Chosen by numbers and not by a branch, which would be one in the loop over leaves.
        K = tl.where(is_first, a_K, b_K)
        index = tl.load(tl.where(is_first, a_index_ptr, b_index_ptr) + token * K + key, mask=key < K, other=-1)
        index = index.to(tl.int32)
        place, own = place_of(tl.where(is_first, index, -1), token, a_map_ptr, a_span_ptr, a_width, a_spans, A_KIND)
        b_place, b_own = place_of(tl.where(is_first, -1, index), token, b_map_ptr, b_span_ptr, b_width, b_spans, B_KIND)
        place, own = tl.maximum(place, b_place), tl.maximum(own, b_own)
    return index, place, own


@triton.jit
def one_of(is_first, a_ptr, b_ptr):
    """A pointer of part a or b."""
    return tl.where(is_first, a_ptr, b_ptr)
