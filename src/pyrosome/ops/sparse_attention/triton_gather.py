"""Sums of values by weights that are there: a run of leaves, and a few chunks of channels, in each program.

Shape letters: T tokens, H heads, C head dim, F frequencies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device, gpu
from pyrosome.ops.sparse_attention.triton_attend import values
from pyrosome.ops.sparse_attention.triton_rows import KV_GROUP, keys_of, raw_rows, scales_of
from pyrosome.ops.sparse_attention.triton_sums import (
    FINISHED,
    LOWEST,
    TINY,
    joined,
    kept,
    log_mass,
    turned_back,
)


@triton.jit
def _gather(
    p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr, row, token, head, first, stop,
    leaves, a, b, low, CODED: tl.constexpr, COUNT: tl.constexpr, WRITES: tl.constexpr, A_KIND: tl.constexpr,
    B_KIND: tl.constexpr, FORMAT: tl.constexpr, NOPE: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """COUNT chunks of channels from `low`, the first CODED of them in e4m3."""
    BLOCK_H: tl.constexpr = head.shape[0]
    inner, inside = tl.arange(0, KEYS), head < H
    none = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    top, mass = tl.zeros((BLOCK_H,), tl.float32) + LOWEST, tl.zeros((BLOCK_H,), tl.float32)
    o = ()
    for _j in tl.static_range(COUNT):
        o = o + (none,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's language has no stars
    _, place, own = keys_of(token, first, a, b, A_KIND, B_KIND, KEYS)
    for leaf in range(first, stop):
        at = (row * leaves + leaf) * H + head
        p = tl.load(p_ptr + at[:, None] * KEYS + inner[None, :], mask=inside[:, None], other=0.0)
        leaf_mass = tl.load(mass_ptr + at, mask=inside, other=0.0)
        leaf_top = tl.load(top_ptr + at, mask=inside, other=LOWEST)
        raw, scales = (), ()
        for j in tl.static_range(COUNT):
            piece, word = 0, 0
            if FORMAT != "":
                piece = raw_rows(leaf, place, a, b, low + j * BLOCK_C, j < CODED, C, NOPE, FORMAT, KEYS, BLOCK_C)
            if j < CODED:
                word = scales_of(leaf, place, a, b, (low + j * BLOCK_C) // (8 * KV_GROUP), NOPE, KEYS)
            raw, scales = raw + (piece,), scales + (word,)  # type: ignore[assignment]  # noqa: RUF005
        if UPCAST:
            p = p.to(tl.float32)
        next_top, mass, share, leaf_share = joined(top, mass, leaf_top, leaf_mass)
        top = next_top
        sums = ()
        for j in tl.static_range(COUNT):
            value = values(
                p, raw[j], scales[j], leaf, own, a, b, low + j * BLOCK_C, j < CODED, A_KIND, B_KIND, C, FORMAT, NARROW,
                KEYS, BLOCK_C, HAS_FP8, UPCAST,
            )  # fmt: skip
            sums = sums + (tl.fma(o[j], share[:, None], value * leaf_share[:, None]),)  # type: ignore[assignment]  # noqa: RUF005
        o = sums
        _, place, own = keys_of(token, leaf + 1, a, b, A_KIND, B_KIND, KEYS)
    channel = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    if tl.num_programs(1) > 1:
        at = (row * tl.num_programs(1) + tl.program_id(1)) * H + head
        if low == 0:
            tl.store(run_top_ptr + at, top, mask=inside)
            tl.store(run_mass_ptr + at, tl.where(stop > first, mass, -1.0), mask=inside)
        to = out_ptr + (at[:, None] * C + channel) + low
        for j in tl.static_range(COUNT):
            tl.store(to + j * BLOCK_C, o[j], mask=inside[:, None] & (channel < C - low - j * BLOCK_C))
    else:
        # As `merge_runs` would join the one run to nothing.
        lowest = tl.zeros((BLOCK_H,), tl.float32) + LOWEST
        top, mass, share, run_share = joined(lowest, lowest * 0.0, top, mass)
        at = token * H + head
        if WRITES == FINISHED:
            whole = kept(top, mass, tl.load(sink_ptr + head, mask=inside, other=0.0))
        else:
            whole = 1.0 / tl.maximum(mass, TINY)
            if low == 0:
                tl.store(run_top_ptr + at, log_mass(top, mass), mask=inside)
        to = out_ptr + (at[:, None] * C + channel) + low
        for j in tl.static_range(COUNT):
            sums = tl.fma(none, share[:, None], o[j] * run_share[:, None]) * whole[:, None]
            if WRITES == FINISHED:
                if (j >= CODED) or (2 * F > C - NOPE):
                    sums = turned_back(sums, turn_ptr + token * 2 * F, low + j * BLOCK_C, C, F)
                if NARROW:
                    sums = device.round_bf16(sums)
            tl.store(to + j * BLOCK_C, sums, mask=inside[:, None] & (channel < C - low - j * BLOCK_C))


@gpu.jit
def gather(
    p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr,
    a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr, a_width, a_spans, a_K, a_rows,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr, b_width, b_spans, b_K, b_rows,
    first_token, leaves,
    WRITES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, F: tl.constexpr, A_KIND: tl.constexpr,
    B_KIND: tl.constexpr, FORMAT: tl.constexpr, NOPE: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    NARROW: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, HAS_FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token x block of heads x group of GROUP chunks, run): what `weigh` left, times the values.

    Of several runs it writes the sums [T, runs, H, C] with the maximum and mass [T, runs, H], a mass of -1 where there
    is no key.  Of one it writes the attention: FINISHED with sink and rotation; PART without and, as `run_top`, its log
    mass.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = (CHUNKS + GROUP - 1) // GROUP
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    row = (program // (GROUPS * BLOCKS)).to(tl.int64)
    token = first_token + row
    a = (
        a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_fresh_ptr, a_index_ptr,
        a_width, a_spans, a_K, a_rows,
    )  # fmt: skip
    b = (
        b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_fresh_ptr, b_index_ptr,
        b_width, b_spans, b_K, b_rows,
    )  # fmt: skip
    group, block, first = program % GROUPS, program // GROUPS % BLOCKS, tl.program_id(1) * RUN
    head = block * BLOCK_H + tl.arange(0, BLOCK_H)
    leaf = first + tl.arange(0, RUN)
    # All heads see the same keys.
    there = tl.load(mass_ptr + (row * leaves + leaf) * H + block * BLOCK_H, mask=leaf < leaves, other=-1.0)
    stop = tl.max(tl.where(there != -1.0, leaf + 1, first))
    # Groups of one kind of chunks are told apart by a number; those after them have a branch of their own.
    CODES: tl.constexpr = NOPE // BLOCK_C
    ALIKE: tl.constexpr = CODES // GROUP if CODES > 0 else CHUNKS // GROUP
    if group < ALIKE:
        _gather(
            p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr, row, token, head, first,
            stop, leaves, a, b, group * (GROUP * BLOCK_C), GROUP if CODES > 0 else 0, GROUP, WRITES, A_KIND, B_KIND,
            FORMAT, NOPE, H, C, F, NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST,
        )  # fmt: skip
    for j in tl.static_range(ALIKE, GROUPS):
        if group == j:
            _gather(
                p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr, row, token, head,
                first, stop, leaves, a, b, j * GROUP * BLOCK_C, CODES - j * GROUP if j * GROUP < CODES else 0,
                GROUP if j * GROUP + GROUP <= CHUNKS else CHUNKS - j * GROUP, WRITES, A_KIND, B_KIND, FORMAT, NOPE, H,
                C, F, NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST,
            )  # fmt: skip
