"""Products of rows with stored weights, on the device.

Weights are the left operand, tokens the right one's columns: one token and many take the same matrix instruction, with
the same order over K.  K is cut into segments that (N, K) alone decide.  With few tokens a program has one segment of a
tile, and `sums` adds the segments in order; with many it has them all, and adds them in the same order.  Several
weights of a kind are read in one launch: a program compares its number to find its weight, so that their addresses are
arguments like any other, and so are their sizes: whatever shapes a model has, a kernel is compiled once.
Hopper's FP8 units keep few bits of a long sum: they sum blocks of 128 inputs, and blocks are added in float32.
Shape letters: M tokens, N outputs of a weight, K inputs, P of them with padding, S segments, G groups of outputs each
of which has inputs of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import gpu
from pyrosome.ops.device import decode_e2m1, decode_e4m3, decode_e8m0, dot, narrow

MOST = 6  # weights of one launch
MOST_SUMS = 8  # outputs of one launch of `sums`
MOST_SEGMENTS = 16
_SEGMENTS = tl.constexpr(MOST_SEGMENTS)


@gpu.jit
def code_products(
    x_ptr, x_scale_ptr,
    w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr,
    s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr,
    N0, N1, N2, N3, N4, N5, S0, S1, S2, S3, S4, S5, M, K,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y [S if SPLIT, M, N] of e4m3 x [M, P] under scales [blocks, M], and weights [N, K] with one per 128 x 128.

    EVEN: as `_even`.
    """
    weight_ptr, scale_ptr, y_ptr, rows, segments, segment, tile, column = _place(
        tl.program_id(0), M, (w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr),
        (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr), (y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr),
        (N0, N1, N2, N3, N4, N5), (S0, S1, S2, S3, S4, S5), 1, SPLIT, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    rows, K, blocks = _even(rows, K, EVEN)
    y_ptr += segment.to(tl.int64) * M * rows
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = column * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 128)
    # Rows and tokens past the end are read as the last one, and never stored.
    token = tl.minimum(m, M - 1).to(tl.int64)
    weight_ptrs = weight_ptr + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + token[None, :] * (blocks * 128) + k[:, None]
    M16 = (M + 15).to(tl.int64) // 16 * 16
    x_scale_ptrs, known = x_scale_ptr + m, m < M16
    scale_ptr += (tile * BLOCK_N // 128).to(tl.int64) * blocks

    length = blocks // segments
    first, last = 0, blocks
    if SPLIT:
        first = segment * length
        last = first + length
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    left = length
    for block in range(first, last):
        if EVEN:
            w = tl.load(weight_ptrs + block * 128)
        else:
            w = tl.load(weight_ptrs + block * 128, mask=(block * 128 + k < K)[None, :], other=0.0)
        x = tl.load(x_ptrs + block * 128)
        # Both scales are powers of two: the block's sum times their product is exact.
        x_scale = tl.load(x_scale_ptrs + block * M16, mask=known, other=0.0)
        scale = x_scale * decode_e8m0(tl.load(scale_ptr + block))
        product = dot(w, x, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
        acc += product * scale[None, :]
        if not SPLIT:
            left -= 1
            if left == 0:
                out += acc
                acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                left = length
    if SPLIT:
        out = acc
    at = m.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(y_ptr + at, out, mask=(n < rows)[:, None] & (m < M)[None, :])


@gpu.jit
def value_products(
    x_ptr, deep_ptr,
    w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr,
    s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr,
    N0, N1, N2, N3, N4, N5, S0, S1, S2, S3, S4, S5, M, K, G,
    KIND: tl.constexpr, PARTS: tl.constexpr, IN_ORDER: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """y [S if SPLIT, M, G N] of bfloat16 x [PARTS, M, G, P] and weights [G N, K] that bfloat16 holds exactly.

    KIND of weights: "bf16", "fp8", "fp4".  Under SKIPS, deep [M, G] tells where the second and third part are zeros:
    a tile of tokens that has no others does without, and has the same bits, as their sum is kept apart.
    IN_ORDER: a tile's outputs lie in one block of scales.  EVEN: as `_even`.
    """
    weight_ptr, scale_ptr, y_ptr, rows, segments, segment, tile, column = _place(
        tl.program_id(0), M, (w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr),
        (s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, s5_ptr), (y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr),
        (N0, N1, N2, N3, N4, N5), (S0, S1, S2, S3, S4, S5), G, SPLIT, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    rows, K, blocks = _even(rows, K, EVEN)
    tiles = (rows + BLOCK_N - 1) // BLOCK_N
    group = tile // tiles
    in_group = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n = group * rows + tl.minimum(in_group, rows - 1)
    y_ptr += segment.to(tl.int64) * M * (G * rows) + group * rows
    block = (group * rows + tile % tiles * BLOCK_N) // 128
    m = column * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = tl.minimum(m, M - 1).to(tl.int64) * G + group
    x_ptrs = x_ptr + x_row[None, :] * (blocks * 128)
    plane = M.to(tl.int64) * G * (blocks * 128)

    length = blocks // segments
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first, last = 0, segments
    if SPLIT:
        first = segment
        last = segment + 1
    deep = 1
    if SKIPS and PARTS == 3:
        deep = tl.max(tl.load(deep_ptr + x_row))
    for s in range(first, last):
        begin, end = s * length * 128, (s + 1) * length * 128
        if deep != 0:
            out += _segment(weight_ptr, scale_ptr, n, block, x_ptrs, plane, begin, end, K, EVEN, IN_ORDER, KIND, PARTS,
                            UPCAST, BLOCK_N, BLOCK_M)  # fmt: skip
        else:
            out += _segment(weight_ptr, scale_ptr, n, block, x_ptrs, plane, begin, end, K, EVEN, IN_ORDER, KIND, 1,
                            UPCAST, BLOCK_N, BLOCK_M)  # fmt: skip
    at = m.to(tl.int64)[None, :] * (G * rows) + in_group[:, None]
    tl.store(y_ptr + at, out, mask=(in_group < rows)[:, None] & (m < M)[None, :])


@triton.jit
def _segment(
    weight_ptr, scale_ptr, n, block, x_ptrs, plane, begin, end, K, EVEN: tl.constexpr, IN_ORDER: tl.constexpr,
    KIND: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] summed over inputs [begin, end)."""
    high = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lower = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    k = tl.arange(0, 64)
    for at in range(begin, end, 64):
        w = _values(weight_ptr, scale_ptr, n, block, at, K, EVEN, IN_ORDER, KIND, UPCAST, BLOCK_N)
        x = x_ptrs + (at + k)[:, None]
        high = dot(w, tl.load(x), high, UPCAST)
        if PARTS == 3:
            lower = dot(w, tl.load(x + plane), lower, UPCAST)
            lower = dot(w, tl.load(x + 2 * plane), lower, UPCAST)
    if PARTS == 3:
        high += lower
    return high


@triton.jit
def _values(
    weight_ptr, scale_ptr, n, block, at, K, EVEN: tl.constexpr, IN_ORDER: tl.constexpr, KIND: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, 64] of rows n and inputs from `at`, exactly as bfloat16; zeros past K."""
    row = n.to(tl.int64)[:, None]
    k = at + tl.arange(0, 64)[None, :]
    if KIND == "fp4":
        groups = (K + 31) // 32
        byte = at // 2 + tl.arange(0, 32)[None, :]
        group = at // 32 + tl.arange(0, 2)[None, :]
        packed = tl.load(weight_ptr + row * (K // 2) + byte, mask=byte < K // 2, other=0)
        scale = decode_e8m0(tl.load(scale_ptr + row * groups + group, mask=group < groups, other=127))
        value = tl.reshape(tl.join(decode_e2m1(packed), decode_e2m1(packed >> 4)), [BLOCK_N, 2, 32])
        found = narrow(tl.reshape(value * scale[:, :, None], [BLOCK_N, 64]), UPCAST)
    else:
        w = tl.load(weight_ptr + row * K + k) if EVEN else tl.load(weight_ptr + row * K + k, mask=k < K, other=0.0)
        if KIND == "fp8":
            blocks = (K + 127) // 128
            # Bytes where there are no instructions for codes.
            value = decode_e4m3(w) if weight_ptr.dtype.element_ty == tl.uint8 else w.to(tl.float32)
            if IN_ORDER:
                scale = decode_e8m0(tl.load(scale_ptr + block.to(tl.int64) * blocks + at // 128))
            else:
                scale = decode_e8m0(tl.load(scale_ptr + row // 128 * blocks + at // 128))
            found = narrow(value * scale, UPCAST)
        else:
            found = w
    return found


@gpu.jit
def float_products(
    x_ptr,
    w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr,
    N0, N1, N2, N3, N4, N5, S0, S1, S2, S3, S4, S5, M, K, G,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y [S if SPLIT, M, G N] of x [M, G, P], bfloat16 or float32, and float32 weights [G N, K].  EVEN: as `_even`."""
    weight_ptr, _, y_ptr, rows, segments, segment, tile, column = _place(
        tl.program_id(0), M, (w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr), (None,),
        (y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr),
        (N0, N1, N2, N3, N4, N5), (S0, S1, S2, S3, S4, S5), G, SPLIT, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    rows, K, blocks = _even(rows, K, EVEN)
    tiles = (rows + BLOCK_N - 1) // BLOCK_N
    group = tile // tiles
    in_group = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n = group * rows + tl.minimum(in_group, rows - 1)
    y_ptr += segment.to(tl.int64) * M * (G * rows) + group * rows
    m = column * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 32)
    weight_ptrs = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + (tl.minimum(m, M - 1).to(tl.int64) * G + group)[None, :] * (blocks * 128) + k[:, None]

    length = blocks // segments
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first, last = 0, segments
    if SPLIT:
        first = segment
        last = segment + 1
    for s in range(first, last):
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for at in range(s * length * 128, (s + 1) * length * 128, 32):
            w = tl.load(weight_ptrs + at) if EVEN else tl.load(weight_ptrs + at, mask=(at + k < K)[None, :], other=0.0)
            acc = tl.dot(w, tl.load(x_ptrs + at).to(tl.float32), acc, input_precision="ieee")
        out += acc
    at = m.to(tl.int64)[None, :] * (G * rows) + in_group[:, None]
    tl.store(y_ptr + at, out, mask=(in_group < rows)[:, None] & (m < M)[None, :])


@gpu.jit
def sums(
    p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, p6_ptr, p7_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr,
    N0, N1, N2, N3, N4, N5, N6, N7, S0, S1, S2, S3, S4, S5, S6, S7, M, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, N] of several products: its parts [S, M, N] added in order.  EVEN: as `_even`."""
    parts = (p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, p6_ptr, p7_ptr)
    ys = (y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr)
    N, S = (N0, N1, N2, N3, N4, N5, N6, N7), (S0, S1, S2, S3, S4, S5, S6, S7)
    item, first = tl.program_id(0), M * 0
    part_ptr, y_ptr, rows, segments, left = parts[0], ys[0], N[0], S[0], item
    for i in tl.static_range(1, 8):
        first += (M * N[i - 1] + BLOCK - 1) // BLOCK
        part_ptr = tl.where(item >= first, parts[i], part_ptr)
        y_ptr = tl.where(item >= first, ys[i], y_ptr)
        rows = tl.where(item >= first, N[i], rows)
        segments = tl.where(item >= first, S[i], segments)
        left = tl.where(item >= first, item - first, left)
    rows, _, _ = _even(rows, M, EVEN)
    size = M.to(tl.int64) * rows
    at = left.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = tl.zeros([BLOCK], tl.float32)
    # All parts are asked for before the first is there.  What is not one is a zero, which changes no sum.
    for s in tl.static_range(_SEGMENTS):
        out += tl.load(part_ptr + s * size + at, mask=(at < size) & (s < segments), other=0.0)
    tl.store(y_ptr + at, out, mask=at < size)


@triton.jit
def _even(rows, K, EVEN: tl.constexpr):
    """(rows, K, blocks of K): where all N are whole sixteens and K is whole blocks, in terms that say so.

    The compiler makes accesses of 16 bytes of what it can see to be aligned.
    """
    if EVEN:
        blocks = K // 128
        rows, K = rows // 16 * 16, blocks * 128
    else:
        blocks = (K + 127) // 128
    return rows, K, blocks


@triton.jit
def _place(
    item, M, weights, scales, ys, N, S, G, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(weight, scale, y, N, S, segment, tile of outputs, tile of tokens) of a program; N is that of a group.

    Where there are fewer weights, the others are the first again with N = 0, and have no programs.
    """
    total = 0
    for i in tl.static_range(6):
        total += (N[i] + BLOCK_N - 1) // BLOCK_N * G * (S[i] if SPLIT else 1)
    # Programs side by side share eight tiles of tokens: these and the weights that pass by them stay in the cache.
    columns = (M + BLOCK_M - 1) // BLOCK_M
    band = item // (8 * total)
    wide = tl.minimum(columns - 8 * band, 8)
    within = item - 8 * total * band
    column = 8 * band + within % wide
    item = within // wide
    if scales[0] is None:  # then nobody asks for them
        scales = weights
    weight, scale, y, rows, segments, left = weights[0], scales[0], ys[0], N[0], S[0], item
    first = 0
    for i in tl.static_range(1, 6):
        first += (N[i - 1] + BLOCK_N - 1) // BLOCK_N * G * (S[i - 1] if SPLIT else 1)
        weight = tl.where(item >= first, weights[i], weight)
        scale = tl.where(item >= first, scales[i], scale)
        y = tl.where(item >= first, ys[i], y)
        rows = tl.where(item >= first, N[i], rows)
        segments = tl.where(item >= first, S[i], segments)
        left = tl.where(item >= first, item - first, left)
    tiles = (rows + BLOCK_N - 1) // BLOCK_N * G
    return weight, scale, y, rows, segments, left // tiles, left % tiles, column
