"""Attention of one token's heads over its keys: the heads are the left operand's rows, as one row serves them all.

Keys are taken in leaves of KEYS in the order of their index, part after part.  `weigh` leaves the weights of each leaf
with its maximum and mass; `gather` multiplies them with the values, a chunk of channels in each program: a token's sums
are too large for the registers of one that also holds its queries.  A leaf joins those before it by `joined`, so it has
the same bits whichever program computes it.  Rows are decoded where they lie.  Maxima are logarithms to base 2.

Shape letters: T tokens, H heads, C head dim, F frequencies, K rows per token of a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device, gpu
from pyrosome.ops.sparse_attention.triton_rows import keys_of, one_of, rows_at

PARTIAL, FINISHED, PART = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what is written
LOWEST = tl.constexpr(-1.0e38)  # stands for a maximum of nothing: finite, so that differences are numbers
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal number, as the definition's


@triton.jit
def rounded(x, UPCAST: tl.constexpr):
    """float32 x rounded to bfloat16, for a `dot`."""
    return device.round_bf16(x) if UPCAST else x.to(tl.bfloat16)  # the interpreter would truncate


@triton.jit
def product(a, b, acc, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b; of float32 tiles by six products of their bfloat16 parts, which is float32's own precision."""
    return device.dot(a, b, acc, UPCAST) if NARROW or UPCAST else tl.dot(a, b, acc, input_precision="bf16x6")


@triton.jit
def joined(top, mass, other_top, other_mass):
    """(top, mass, share, other_share) of two disjoint sets of keys.

    Their sums join as fma(o, share, other * other_share).
    Written with `fma`, so that no compiler chooses what is rounded between.
    """
    high = tl.maximum(top, other_top)
    share, other_share = tl.exp2(top - high), tl.exp2(other_top - high)
    return high, tl.fma(mass, share, other_mass * other_share), share, other_share


@triton.jit
def kept(top, mass, sink):
    """What a sum of values is multiplied by, once the sink has taken its share: e^sink joins the denominator."""
    return 1.0 / (mass + tl.exp2(sink * LOG2_E - top))


@triton.jit
def log_mass(top, mass):
    """The log mass that a part is told by; -inf without a key."""
    return tl.where(mass == 0, float("-inf"), tl.fma(top, LN_2, tl.log(mass)))


@triton.jit
def turned_back(x, turn_ptr, LOW: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """x [rows, channels from LOW], its rotary channels turned back by the angles [F] (cos, sin) of one token."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    if LOW + WIDTH > C - 2 * F:
        even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
        pair = tl.arange(0, WIDTH // 2) + (LOW - C + 2 * F) // 2
        turns = (pair >= 0) & (pair < F)
        cos = tl.load(turn_ptr + 2 * pair, mask=turns, other=1.0)[None, :]
        sin = tl.load(turn_ptr + 2 * pair + 1, mask=turns, other=0.0)[None, :]
        straight = tl.where(turns[None, :], tl.fma(even, cos, odd * sin), even)
        across = tl.where(turns[None, :], tl.fma(odd, cos, -(even * sin)), odd)
        x = tl.reshape(tl.join(straight, across), (ROWS, WIDTH))
    return x


@triton.jit
def _query(q_ptr, token, head, LOW: tl.constexpr, H: tl.constexpr, C: tl.constexpr, NARROW: tl.constexpr,
           BLOCK_C: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    inner = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    at = q_ptr + ((token * H + head)[:, None] * C + inner) + LOW
    BLOCK_H: tl.constexpr = head.shape[0]
    if (H // BLOCK_H * BLOCK_H == H) and (LOW + BLOCK_C <= C):
        q = tl.load(at)
    else:
        q = tl.load(at, mask=(head < H)[:, None] & (inner < C - LOW), other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    if NARROW:
        q = rounded(q, UPCAST)
    return q


@gpu.jit
def weigh(
    q_ptr, p_ptr, top_ptr, mass_ptr,
    a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_own_ptr, a_index_ptr, a_width, a_spans, a_K,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_own_ptr, b_index_ptr, b_width, b_spans, b_K,
    first_token, leaves, scale,
    RUN: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, FORMAT: tl.constexpr, NOPE: tl.constexpr,
    HAS_OWN: tl.constexpr, H: tl.constexpr, C: tl.constexpr, NARROW: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token, run, block of heads) of RUN leaves.

    It leaves weights [T, leaves, H, KEYS], maxima and masses [T, leaves, H].

    A leaf without a key has a mass of -1, and nothing else unless one behind it in the run has a key.  The parts are
    a and b (None: there is no second).
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    inner = tl.arange(0, KEYS)
    held = ()
    HELD: tl.constexpr = (RUN > 1) and NARROW  # float32 queries are too large to be kept
    if HELD:
        for j in tl.static_range(CHUNKS):
            part = _query(q_ptr, token, head, j * BLOCK_C, H, C, NARROW, BLOCK_C, UPCAST)
            held = held + (part,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's language has no stars
    first, edge = tl.program_id(1) * RUN, (a_K + KEYS - 1) // KEYS
    # To the last leaf of the run that has a key.
    key = first * KEYS + tl.arange(0, RUN * KEYS)
    there = tl.load(a_index_ptr + token * a_K + key, mask=key < a_K, other=-1)
    if b_index_ptr is not None:
        more = key - edge * KEYS
        there = tl.maximum(there, tl.load(b_index_ptr + token * b_K + more, mask=(more >= 0) & (more < b_K), other=-1))
    stop = (tl.max(tl.where(there >= 0, key + 1, 0)) + KEYS - 1) // KEYS
    for leaf in range(first, stop):
        is_first = leaf < edge
        index, place, own = keys_of(
            token, is_first, tl.where(is_first, leaf, leaf - edge), a_map_ptr, a_span_ptr, a_index_ptr, a_width,
            a_spans, a_K, b_map_ptr, b_span_ptr, b_index_ptr, b_width, b_spans, b_K, A_KIND, B_KIND, KEYS,
        )  # fmt: skip
        data_ptr, wide_ptr, scale_ptr, own_ptr = a_data_ptr, a_wide_ptr, a_scale_ptr, a_own_ptr
        if b_index_ptr is not None:
            if FORMAT != "":
                data_ptr = one_of(is_first, a_data_ptr, b_data_ptr)
            if FORMAT == "fp8":
                wide_ptr, scale_ptr = (
                    one_of(is_first, a_wide_ptr, b_wide_ptr),
                    one_of(is_first, a_scale_ptr, b_scale_ptr),
                )
            if HAS_OWN:
                own_ptr = one_of(is_first, a_own_ptr, b_own_ptr)
        score = tl.zeros((BLOCK_H, KEYS), tl.float32)
        for j in tl.static_range(CHUNKS):
            rows = rows_at(
                data_ptr, wide_ptr, scale_ptr, own_ptr, place, own, j * BLOCK_C, C, NOPE, FORMAT, HAS_OWN, NARROW,
                BLOCK_C, HAS_FP8, UPCAST,
            )  # fmt: skip
            q = held[j] if HELD else _query(q_ptr, token, head, j * BLOCK_C, H, C, NARROW, BLOCK_C, UPCAST)
            score = product(q, tl.trans(rows), score, NARROW, UPCAST)
        score = tl.where((index >= 0)[None, :], score, float("-inf"))
        top = tl.maximum(tl.max(score, 1), LOWEST) * scale
        p = tl.exp2(tl.fma(score, scale, -top[:, None]))
        at = (row * leaves + leaf) * H + head
        tl.store(top_ptr + at, top, mask=head < H)
        tl.store(mass_ptr + at, tl.sum(p, 1), mask=head < H)
        if NARROW:
            p = rounded(p, UPCAST)
        tl.store(p_ptr + at[:, None] * KEYS + inner[None, :], p, mask=(head < H)[:, None])
    for leaf in range(tl.maximum(first, stop), tl.minimum(first + RUN, leaves)):
        tl.store(mass_ptr + (row * leaves + leaf) * H + head, head * 0.0 - 1.0, mask=head < H)


@triton.jit
def _gather(
    p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr, row, token, head, first, stop,
    leaves, a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_own_ptr, a_index_ptr, a_width, a_spans, a_K,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_own_ptr, b_index_ptr, b_width, b_spans, b_K,
    LOW: tl.constexpr, WRITES: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, FORMAT: tl.constexpr,
    NOPE: tl.constexpr, HAS_OWN: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, NARROW: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of channels from LOW."""
    BLOCK_H: tl.constexpr = head.shape[0]
    inner, edge, inside = tl.arange(0, KEYS), (a_K + KEYS - 1) // KEYS, head < H
    o = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    top, mass = tl.zeros((BLOCK_H,), tl.float32) + LOWEST, tl.zeros((BLOCK_H,), tl.float32)
    for leaf in range(first, stop):
        is_first = leaf < edge
        _, place, own = keys_of(
            token, is_first, tl.where(is_first, leaf, leaf - edge), a_map_ptr, a_span_ptr, a_index_ptr, a_width,
            a_spans, a_K, b_map_ptr, b_span_ptr, b_index_ptr, b_width, b_spans, b_K, A_KIND, B_KIND, KEYS,
        )  # fmt: skip
        data_ptr, wide_ptr, scale_ptr, own_ptr = a_data_ptr, a_wide_ptr, a_scale_ptr, a_own_ptr
        if b_index_ptr is not None:
            if FORMAT != "":
                data_ptr = one_of(is_first, a_data_ptr, b_data_ptr)
            if FORMAT == "fp8":
                wide_ptr, scale_ptr = (
                    one_of(is_first, a_wide_ptr, b_wide_ptr),
                    one_of(is_first, a_scale_ptr, b_scale_ptr),
                )
            if HAS_OWN:
                own_ptr = one_of(is_first, a_own_ptr, b_own_ptr)
        rows = rows_at(
            data_ptr, wide_ptr, scale_ptr, own_ptr, place, own, LOW, C, NOPE, FORMAT, HAS_OWN, NARROW, BLOCK_C,
            HAS_FP8, UPCAST,
        )  # fmt: skip
        at = (row * leaves + leaf) * H + head
        own_mass = tl.load(mass_ptr + at, mask=inside, other=-1.0)
        is_there = own_mass != -1.0
        own_top = tl.load(top_ptr + at, mask=is_there, other=LOWEST)
        p = tl.load(p_ptr + at[:, None] * KEYS + inner[None, :], mask=is_there[:, None], other=0.0)
        if UPCAST:
            p = p.to(tl.float32)
        value = product(p, rows, tl.zeros((BLOCK_H, BLOCK_C), tl.float32), NARROW, UPCAST)
        top, mass, share, own_share = joined(top, mass, own_top, tl.where(is_there, own_mass, 0.0))
        o = tl.fma(o, share[:, None], value * own_share[:, None])
    if WRITES == PARTIAL:
        at = (row * tl.num_programs(1) + tl.program_id(1)) * H + head
        if (LOW == 0) and (run_top_ptr is not None):
            tl.store(run_top_ptr + at, top, mask=inside)
            tl.store(run_mass_ptr + at, tl.where(stop > first, mass, -1.0), mask=inside)
    else:
        at = token * H + head
        if WRITES == FINISHED:
            sink = tl.load(sink_ptr + head, mask=inside, other=0.0)
            o = turned_back(o * kept(top, mass, sink)[:, None], turn_ptr + token * 2 * F, LOW, C, F)
            if NARROW:
                o = device.round_bf16(o)
        else:
            o = o * (1.0 / tl.maximum(mass, TINY))[:, None]
            if LOW == 0:
                tl.store(run_top_ptr + at, log_mass(top, mass), mask=inside)
    channel = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    to = out_ptr + (at[:, None] * C + channel) + LOW
    tl.store(to, o, mask=inside[:, None] & (channel < C - LOW))


@gpu.jit
def gather(
    p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr,
    a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_own_ptr, a_index_ptr, a_width, a_spans, a_K,
    b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_own_ptr, b_index_ptr, b_width, b_spans, b_K,
    first_token, leaves,
    WRITES: tl.constexpr, RUN: tl.constexpr, A_KIND: tl.constexpr, B_KIND: tl.constexpr, FORMAT: tl.constexpr,
    NOPE: tl.constexpr, HAS_OWN: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, NARROW: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, HAS_FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (token, run, chunk of channels x block of heads): what `weigh` left, times the values.

    PARTIAL writes the sums [T, runs, H, C] of the run and, unless it is one leaf, its maximum and mass [T, runs, H], a
    mass of -1 where it has no key; FINISHED the attention with sink and rotation; PART the attention without and, as
    `run_top`, its log mass.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    head = tl.program_id(2) // CHUNKS * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk, first = tl.program_id(2) % CHUNKS, tl.program_id(1) * RUN
    leaf = first + tl.arange(0, RUN)
    one = mass_ptr + tl.program_id(2) // CHUNKS * BLOCK_H  # all heads see the same keys
    there = tl.load(one + (row * leaves + leaf) * H, mask=leaf < leaves, other=-1.0)
    stop = tl.max(tl.where(there != -1.0, leaf + 1, first))
    for j in tl.static_range(CHUNKS):
        if chunk == j:
            _gather(
                p_ptr, top_ptr, mass_ptr, out_ptr, sink_ptr, turn_ptr, run_top_ptr, run_mass_ptr, row, token, head,
                first, stop, leaves, a_data_ptr, a_wide_ptr, a_scale_ptr, a_map_ptr, a_span_ptr, a_own_ptr, a_index_ptr,
                a_width, a_spans, a_K, b_data_ptr, b_wide_ptr, b_scale_ptr, b_map_ptr, b_span_ptr, b_own_ptr,
                b_index_ptr, b_width, b_spans, b_K, j * BLOCK_C, WRITES, A_KIND, B_KIND, FORMAT, NOPE, HAS_OWN, H, C, F,
                NARROW, KEYS, BLOCK_C, HAS_FP8, UPCAST,
            )  # fmt: skip
