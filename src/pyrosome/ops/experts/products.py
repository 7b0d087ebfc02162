"""The two products of an expert, and what lies between them.

A program has a tile of one matrix's outputs and a tile of pairs of one expert.  Weights are the left operand, so that
one pair and many use the same matrix instruction, and a pair's bits do not depend on what is beside it.  K goes in
order, in blocks of 128 or 256.  Few pairs leave most of a device idle where one program has both w1 and w3: then each
has its own, and `join` makes h of their sums.  One expert alone leaves it idle even so: its K is cut into segments that
different programs sum; where rows are many, one program takes all segments and adds the same sums in order.
Rows are padded to whole blocks of K, and in front of codes they are in word order: only weights have masks.  128
outputs of w1 and w3 are a whole group of what w2 reads, so that the first product rounds its own results.
Shape letters: N pairs, D model dim, I intermediate dim, P and Q those padded, T columns (pairs) of a tile, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import gpu
from pyrosome.ops.device import decode_e4m3, dot
from pyrosome.ops.experts.weight_tiles import block_scale, matrix_at, weight_tile
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
def _step(
    w, scale, x, at_KT, real, plane, row, block, acc, ROWS: tl.constexpr, INPUTS: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + a block of weights [N, K] times x [K, T]: parts of x that add up to it from the smallest on."""
    weights = weight_tile(w, scale, row, block, ROWS, INPUTS, FORMAT, BLOCK_N, BLOCK_K, UPCAST)
    x += block * BLOCK_K
    if FORMAT == "f32" or FORMAT == "f16":
        return tl.dot(
            weights, tl.load(x + at_KT, mask=real[None, :], other=0.0).to(tl.float32), acc, input_precision="ieee"
        )
    else:  # noqa: RET505
        total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32) if FORMAT == "fp8" else acc
        for part in tl.static_range(PARTS):
            x_KT = tl.load(x + (PARTS - 1 - part) * plane + at_KT, mask=real[None, :], other=0.0)  # unread where empty
            total = dot(weights, x_KT, total, UPCAST)
        if FORMAT == "fp8":  # the tile has one scale, a power of two
            total = acc + total * block_scale(scale, row, block, INPUTS, BLOCK_K)
        return total


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
    w1, s1, w3, s3, x, at_KT, real, plane, row, begin, length, INNER: tl.constexpr, D: tl.constexpr,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gate and up [BLOCK_I, T] of `length` blocks of inputs from `begin` on."""
    gate = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
    for b in range(begin, tl.minimum(begin + length, (D + BLOCK_K - 1) // BLOCK_K)):
        gate = _step(
            w1, s1, x, at_KT, real, plane, row, b, gate, INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST
        )  # fmt: skip
        up = _step(
            w3, s3, x, at_KT, real, plane, row, b, up, INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST
        )  # fmt: skip
    return gate, up


@triton.jit
def _sum(
    w, scale, x, at_KT, real, plane, row, begin, length, ROWS: tl.constexpr, INPUTS: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One matrix's outputs [BLOCK_N, T] of `length` blocks of inputs from `begin` on."""
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for b in range(begin, tl.minimum(begin + length, (INPUTS + BLOCK_K - 1) // BLOCK_K)):
        acc = _step(
            w, scale, x, at_KT, real, plane, row, b, acc, ROWS, INPUTS, FORMAT, PARTS, BLOCK_N, BLOCK_T, BLOCK_K, UPCAST
        )  # fmt: skip
    return acc


@gpu.jit
def gate_up(
    table_ptr, x_ptr, expert_ptr, weight_ptr, order_ptr, tile_ptr, h_ptr, part_ptr, num_pairs, num_rows, first, limit,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, MODE: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, ROUND: tl.constexpr, SEGMENTS: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [N, Q] of x [PARTS, num_rows, P], or with `part_ptr` a segment's sums [S, N, 2, Q] of one of both matrices."""
    expert, pair, real = _tile_of(expert_ptr, order_ptr, tile_ptr, tl.program_id(1), num_pairs, first, E, MODE, BLOCK_T)
    if expert >= E:
        return
    P: tl.constexpr = (D + 127) // 128 * 128
    Q: tl.constexpr = (INNER + 127) // 128 * 128
    SEGMENT: tl.constexpr = (D + SEGMENTS * BLOCK_K - 1) // (SEGMENTS * BLOCK_K)  # blocks
    row = tl.program_id(0) * BLOCK_I
    at_KT = (pair // K).to(tl.int64)[None, :] * P + tl.arange(0, BLOCK_K)[:, None]
    plane = num_rows.to(tl.int64) * P
    i = row + tl.arange(0, BLOCK_I)
    if part_ptr is not None:
        matrix, segment = tl.program_id(2) % 2, tl.program_id(2) // 2
        w, scale = matrix_at(table_ptr, matrix, expert, FORMAT, E, ALIGN)
        acc = _sum(
            w, scale, x_ptr, at_KT, real, plane, row, segment * SEGMENT, SEGMENT,
            INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST,
        )  # fmt: skip
        # Read again, rather than held in registers through the sum.
        _, pair, real = _tile_of(expert_ptr, order_ptr, tile_ptr, tl.program_id(1), num_pairs, first, E, MODE, BLOCK_T)
        part = part_ptr + (segment * num_pairs.to(tl.int64) * 2 + matrix) * Q
        at = pair.to(tl.int64)[None, :] * (2 * Q) + i[:, None]
        tl.store(part + at, acc, mask=real[None, :] & (Q % BLOCK_I == 0 or (i < Q)[:, None]))
    else:
        w1, s1 = matrix_at(table_ptr, 0, expert, FORMAT, E, ALIGN)
        w3, s3 = matrix_at(table_ptr, 1, expert, FORMAT, E, ALIGN)
        tl.static_assert(not ROUND or BLOCK_I == 128, "a group of 128 is rounded by one program")
        if SEGMENTS == 1:
            gate, up = _sums(
                w1, s1, w3, s3, x_ptr, at_KT, real, plane, row, 0, SEGMENT,
                INNER, D, FORMAT, PARTS, BLOCK_I, BLOCK_T, BLOCK_K, UPCAST,
            )  # fmt: skip
        else:
            gate = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
            up = tl.zeros([BLOCK_I, BLOCK_T], tl.float32)
            for s in range(SEGMENTS):
                more_gate, more_up = _sums(
                    w1, s1, w3, s3, x_ptr, at_KT, real, plane, row, s * SEGMENT, SEGMENT,
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
        at = pair.to(tl.int64)[:, None] * Q + _place(i, FORMAT, ROUND)[None, :]
        tl.store(h_ptr + at, h_TI.to(h_ptr.dtype.element_ty), mask=real[:, None] & (i < Q)[None, :])


@triton.jit
def _place(i, FORMAT: tl.constexpr, ROUND: tl.constexpr):
    """Where a channel of h goes: rows that are not rounded here are put in order by who splits them."""
    if ROUND and FORMAT == "fp4":
        return place_of(i, 8)
    elif ROUND and FORMAT == "fp8":  # noqa: RET505
        return place_of(i, 4)
    else:
        return i


@gpu.jit
def join(
    part_ptr, weight_ptr, h_ptr, num_rows, limit, Q: tl.constexpr, SEGMENTS: tl.constexpr, ROUND: tl.constexpr,
    FORMAT: tl.constexpr,
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
    if weight_ptr is not None:
        h = h * tl.load(weight_ptr + n).to(tl.float32)
    if ROUND:
        h = tl.reshape(_rounded(tl.reshape(h, [1, 128])), [128])
    tl.store(h_ptr + n * Q + _place(i, FORMAT, ROUND), h.to(h_ptr.dtype.element_ty))


@gpu.jit
def down(
    table_ptr, h_ptr, expert_ptr, order_ptr, tile_ptr, onto_ptr, out_ptr, part_ptr, num_pairs, first,
    E: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr, MODE: tl.constexpr, FORMAT: tl.constexpr,
    PARTS: tl.constexpr, SEGMENTS: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, D] of h [PARTS, N, Q], added to `onto` [N, D] where there is one; or a segment's sums [S, N, D]."""
    expert, pair, real = _tile_of(expert_ptr, order_ptr, tile_ptr, tl.program_id(1), num_pairs, first, E, MODE, BLOCK_T)
    if expert >= E:
        return
    Q: tl.constexpr = (INNER + 127) // 128 * 128
    SEGMENT: tl.constexpr = (INNER + SEGMENTS * BLOCK_K - 1) // (SEGMENTS * BLOCK_K)  # blocks
    row = tl.program_id(0) * BLOCK_D
    w2, s2 = matrix_at(table_ptr, 2, expert, FORMAT, E, ALIGN)
    pair = pair.to(tl.int64)
    at_KT = pair[None, :] * Q + tl.arange(0, BLOCK_K)[:, None]
    plane = num_pairs.to(tl.int64) * Q
    d = row + tl.arange(0, BLOCK_D)
    at = pair[None, :] * D + d[:, None]
    inside = real[None, :] & (d < D)[:, None]
    if part_ptr is not None or SEGMENTS == 1:
        segment = 0 if part_ptr is None else tl.program_id(2)
        acc = _sum(
            w2, s2, h_ptr, at_KT, real, plane, row, segment * SEGMENT, SEGMENT,
            D, INNER, FORMAT, PARTS, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST,
        )  # fmt: skip
    else:
        acc = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        for s in range(SEGMENTS):
            acc += _sum(
                w2, s2, h_ptr, at_KT, real, plane, row, s * SEGMENT, SEGMENT,
                D, INNER, FORMAT, PARTS, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST,
            )  # fmt: skip
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(2) * num_pairs.to(tl.int64) * D + at, acc, mask=inside)
    else:
        if onto_ptr is not None:
            acc = tl.load(onto_ptr + at, mask=inside, other=0.0) + acc
        tl.store(out_ptr + at, acc, mask=inside)


@gpu.jit
def add(part_ptr, onto_ptr, out_ptr, num, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [num] of the segments' sums [S, num], added to `onto` where there is one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SEGMENTS):
        total += tl.load(part_ptr + s * num.to(tl.int64) + i, mask=i < num, other=0.0)
    if onto_ptr is not None:
        total = tl.load(onto_ptr + i, mask=i < num, other=0.0) + total
    tl.store(out_ptr + i, total, mask=i < num)


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
