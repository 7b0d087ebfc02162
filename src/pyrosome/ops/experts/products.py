"""The two products of an expert, and what lies between them.

A program has a tile of one matrix's outputs and a tile of pairs of one expert.  Weights are the left operand, so that
one pair and many use the same matrix instruction, and a pair's bits do not depend on what is beside it.  K goes in
blocks of 128 in order; one expert alone would leave most of a device idle at few rows, so its K is cut into segments
that different programs sum; where rows are many, one program takes all segments and adds the same sums in order.
Rows are padded to whole blocks of K, and in front of FP4 they are in word order: only weights have masks.  128 outputs
of w1 and w3 are a whole group of what w2 reads, so that the first product rounds its own results.
Shape letters: N pairs, D model dim, I intermediate dim, P and Q those padded, T columns (pairs) of a tile, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import gpu
from pyrosome.ops.device import decode_e4m3, dot
from pyrosome.ops.experts.weight_tiles import matrix_at, weight_tile
from pyrosome.ops.experts.word_order import place_of
from pyrosome.ops.linear.quantize import fp8_groups


@triton.jit
def _tile_of(
    expert_ptr, order_ptr, tile_ptr, tile, num_pairs, first, E: tl.constexpr, MODE: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """(expert, pairs [T], which of them are real) of a tile; an expert of E is none."""
    column = tl.arange(0, BLOCK_T)
    if MODE == "each":  # every pair has a tile of its own
        named = tl.load(expert_ptr + tile).to(tl.int32)
        expert = tl.where((named >= 0) & (named >= first) & (named < first + E), named - first, E)
        return expert, column * 0 + tile, column == 0
    elif MODE == "sorted":  # noqa: RET505  (what is not compiled has other types)
        expert = tl.load(tile_ptr + tile * 3)
        at = tl.load(tile_ptr + tile * 3 + 1) + column
        end = tl.load(tile_ptr + tile * 3 + 2)
        pair = tl.load(order_ptr + at, mask=at < end, other=0)  # past the last, any: it is not stored
        return tl.where(end > 0, expert, E), pair, at < end
    else:  # one expert has every row
        row = tile * BLOCK_T + column
        return tile * 0, tl.minimum(row, num_pairs - 1), row < num_pairs


@triton.jit
def _add(weights, x, at_KT, plane, acc, PARTS: tl.constexpr, PLAIN: tl.constexpr, UPCAST: tl.constexpr):
    """acc + weights [N, K] times x [K, T]: parts of x that add up to it from the smallest on."""
    if PLAIN:
        return tl.dot(weights, tl.load(x + at_KT).to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505
        for part in tl.static_range(PARTS):
            acc = dot(weights, tl.load(x + (PARTS - 1 - part) * plane + at_KT), acc, UPCAST)
        return acc


@triton.jit
def _swiglu(gate, up, limit):
    """As the definition; NaN is neither above nor below a limit."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _rounded(h_TI):
    """What w2 reads: [T, 128] rounded to e4m3 under a scale for each row."""
    code, scale = fp8_groups(h_TI)
    return decode_e4m3(code) * scale[:, None]


@triton.jit
def _sums(
    w1, s1, w3, s3, x, at_KT, plane, row, begin, length, INNER: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gate and up [BLOCK_I, T] of `length` blocks of inputs from `begin` on."""
    PLAIN: tl.constexpr = FORMAT == "f32" or FORMAT == "f16"
    gate = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
    for b in range(begin, tl.minimum(begin + length, (D + BLOCK_K - 1) // BLOCK_K)):
        w = weight_tile(w1, s1, row, b, INNER, D, FORMAT, BLOCK_I, BLOCK_K, UPCAST)
        gate = _add(w, x + b * BLOCK_K, at_KT, plane, gate, PARTS, PLAIN, UPCAST)
        w = weight_tile(w3, s3, row, b, INNER, D, FORMAT, BLOCK_I, BLOCK_K, UPCAST)
        up = _add(w, x + b * BLOCK_K, at_KT, plane, up, PARTS, PLAIN, UPCAST)
    return gate, up


@gpu.jit
def gate_up(
    table_ptr, x_ptr, expert_ptr, weight_ptr, order_ptr, tile_ptr, h_ptr, part_ptr, num_pairs, num_rows, first, limit,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, MODE: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, ROUND: tl.constexpr, SEGMENTS: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [N, Q] of x [PARTS, num_rows, P], or with `part_ptr` a segment's sums [S, N, 2, Q]."""
    expert, pair, real = _tile_of(expert_ptr, order_ptr, tile_ptr, tl.program_id(1), num_pairs, first, E, MODE, BLOCK_T)
    if expert >= E:
        return
    P: tl.constexpr = (D + 127) // 128 * 128
    Q: tl.constexpr = (INNER + 127) // 128 * 128
    SEGMENT: tl.constexpr = (D + SEGMENTS * BLOCK_K - 1) // (SEGMENTS * BLOCK_K)  # blocks
    row = tl.program_id(0) * BLOCK_I
    w1, s1 = matrix_at(table_ptr, 0, expert, FORMAT, E, ALIGN)
    w3, s3 = matrix_at(table_ptr, 1, expert, FORMAT, E, ALIGN)
    at_KT = (pair // K).to(tl.int64)[None, :] * P + tl.arange(0, BLOCK_K)[:, None]
    plane = num_rows.to(tl.int64) * P
    begin = 0 if part_ptr is None else tl.program_id(2) * SEGMENT
    gate, up = _sums(
        w1, s1, w3, s3, x_ptr, at_KT, plane, row, begin, SEGMENT,
        INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_I)
    if part_ptr is not None:
        at = (tl.program_id(2) * num_pairs.to(tl.int64) + pair)[None, :] * (2 * Q) + i[:, None]
        tl.store(part_ptr + at, gate, mask=real[None, :] & (i < Q)[:, None])
        tl.store(part_ptr + at + Q, up, mask=real[None, :] & (i < Q)[:, None])
    else:
        for s in range(1, SEGMENTS):
            more_gate, more_up = _sums(
                w1, s1, w3, s3, x_ptr, at_KT, plane, row, s * SEGMENT, SEGMENT,
                INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST,
            )  # fmt: skip
            gate += more_gate
            up += more_up
        h = _swiglu(gate, up, limit)
        if weight_ptr is not None:
            h = h * tl.load(weight_ptr + pair, mask=real, other=0.0).to(tl.float32)[None, :]
        h_TI = tl.trans(h)
        if ROUND:
            h_TI = _rounded(h_TI)
        place = place_of(i) if ROUND and FORMAT == "fp4" else i
        at = pair.to(tl.int64)[:, None] * Q + place[None, :]
        tl.store(h_ptr + at, h_TI.to(h_ptr.dtype.element_ty), mask=real[:, None] & (i < Q)[None, :])


@gpu.jit
def join(
    part_ptr, h_ptr, num_rows, limit, Q: tl.constexpr, SEGMENTS: tl.constexpr, ROUND: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """h [N, Q] of the segments' sums [S, N, 2, Q], 128 channels of a row by a program."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * 128 + tl.arange(0, 128)
    gate = tl.zeros([128], tl.float32)
    up = tl.zeros([128], tl.float32)
    for s in tl.static_range(SEGMENTS):
        at = part_ptr + (s * num_rows.to(tl.int64) + n) * (2 * Q) + i
        gate += tl.load(at)
        up += tl.load(at + Q)
    h = _swiglu(gate, up, limit)
    place = i
    if ROUND:
        h = tl.reshape(_rounded(tl.reshape(h, [1, 128])), [128])
        place = place_of(i) if FORMAT == "fp4" else i
    tl.store(h_ptr + n * Q + place, h.to(h_ptr.dtype.element_ty))


@gpu.jit
def down(
    table_ptr, h_ptr, expert_ptr, order_ptr, tile_ptr, onto_ptr, out_ptr, num_pairs, first,
    E: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, MODE: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, D] of h [PARTS, N, Q], added to `onto` [N, D] where there is one."""
    expert, pair, real = _tile_of(expert_ptr, order_ptr, tile_ptr, tl.program_id(1), num_pairs, first, E, MODE, BLOCK_T)
    if expert >= E:
        return
    Q: tl.constexpr = (INNER + 127) // 128 * 128
    PLAIN: tl.constexpr = FORMAT == "f32" or FORMAT == "f16"
    row = tl.program_id(0) * BLOCK_D
    w2, s2 = matrix_at(table_ptr, 2, expert, FORMAT, E, ALIGN)
    pair = pair.to(tl.int64)
    at_KT = pair[None, :] * Q + tl.arange(0, BLOCK_K)[:, None]
    plane = num_pairs.to(tl.int64) * Q
    acc = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
    for b in range((INNER + BLOCK_K - 1) // BLOCK_K):
        w = weight_tile(w2, s2, row, b, D, INNER, FORMAT, BLOCK_D, BLOCK_K, UPCAST)
        acc = _add(w, h_ptr + b * BLOCK_K, at_KT, plane, acc, PARTS, PLAIN, UPCAST)
    d = row + tl.arange(0, BLOCK_D)
    at = pair[None, :] * D + d[:, None]
    inside = real[None, :] & (d < D)[:, None]
    if onto_ptr is not None:
        acc = tl.load(onto_ptr + at, mask=inside, other=0.0) + acc
    tl.store(out_ptr + at, acc, mask=inside)


@gpu.jit
def combine(
    row_ptr, expert_ptr, out_ptr, first, E: tl.constexpr, TOTAL: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, D]: a token's rows [K, D], each added to its virtual shard by ascending expert, then the shards."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    k = tl.arange(0, BLOCK_E)
    expert = tl.load(expert_ptr + t * K + k, mask=k < K, other=-1).to(tl.int32)
    held = (expert >= 0) & (expert >= first) & (expert < first + E)
    # By expert, then by place among the token's pairs; what is not held comes last, and adds nothing.
    key = tl.where(held, expert, 0x7FFFFFFF)
    before = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (k[None, :] < k[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    shard = expert * 8 // TOTAL
    s0 = tl.zeros([BLOCK], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for r in range(K):
        chosen = (rank == r) & held
        at = tl.sum(tl.where(chosen, k, 0))
        s = tl.max(tl.where(chosen, shard, -1))
        row = tl.load(row_ptr + (t * K + at) * D + d, mask=inside & (s >= 0), other=0.0)
        s0 += tl.where(s == 0, row, 0.0)
        s1 += tl.where(s == 1, row, 0.0)
        s2 += tl.where(s == 2, row, 0.0)
        s3 += tl.where(s == 3, row, 0.0)
        s4 += tl.where(s == 4, row, 0.0)
        s5 += tl.where(s == 5, row, 0.0)
        s6 += tl.where(s == 6, row, 0.0)
        s7 += tl.where(s == 7, row, 0.0)
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    tl.store(out_ptr + t * D + d, total, mask=inside)


@gpu.jit
def swiglu(gate_ptr, up_ptr, out_ptr, limit, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, _swiglu(gate, up, limit), mask=inside)
