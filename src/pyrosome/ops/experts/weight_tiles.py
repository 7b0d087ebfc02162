"""A tile of a stored weight in registers, as values that a matrix instruction takes.

Codes become bfloat16 by their bits: put where bfloat16 has its lowest exponents, a code is its value times a power of
two, subnormal codes included, and two multiplications by powers of two give value times scale.  bfloat16 products keep
subnormal numbers (PTX has no form of them that does not).  Codes are moved two at a time, and lie as `word_order` says.
Every step is exact; the interpreter has no bfloat16 arithmetic and multiplies in float32 instead.
Shape letters: N output rows and K inputs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops.device import decode_e8m0, float_of


@triton.jit
def weight_tile(
    data, scale, row, block, ROWS: tl.constexpr, INPUTS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK_N, BLOCK_K] of a matrix [ROWS, INPUTS]: rows from `row` on, a block of inputs, zeros past it.

    Codes are in word order, and those of FP8 still want `block_scale`.  bfloat16 for a `device.dot`, but float32 for
    FORMAT "f32" and "f16" (and under UPCAST).
    """
    if FORMAT == "fp4":
        words = data.to(tl.pointer_type(tl.int32))
        word = _tile(words, row, block * (BLOCK_K // 8), ROWS, INPUTS // 8, BLOCK_N, BLOCK_K // 8)
        # Where a block is 256 inputs, a thread has four of these bytes: enough to be copied ahead of their use.
        exponent = _tile(scale, row, block * (BLOCK_K // 32), ROWS, (INPUTS + 31) // 32, BLOCK_N, BLOCK_K // 32)
        return fp4_values(word, exponent, BLOCK_N, BLOCK_K, UPCAST)
    elif FORMAT == "fp8":  # noqa: RET505  (what is not compiled has other types)
        tl.static_assert(BLOCK_N <= 128 and BLOCK_K <= 128, "a tile lies in one block of 128 x 128")
        words = data.to(tl.pointer_type(tl.int32))
        word = _tile(words, row, block * (BLOCK_K // 4), ROWS, INPUTS // 4, BLOCK_N, BLOCK_K // 4)
        return fp8_values(word, BLOCK_N, BLOCK_K, UPCAST)
    elif FORMAT == "bf16" and not UPCAST:
        return _tile(data, row, block * BLOCK_K, ROWS, INPUTS, BLOCK_N, BLOCK_K)
    else:
        return _tile(data, row, block * BLOCK_K, ROWS, INPUTS, BLOCK_N, BLOCK_K).to(tl.float32)


@triton.jit
def block_scale(scale, row, block, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scale of the tile of FP8 codes, for the sums of its products."""
    return decode_e8m0(tl.load(scale + (row // 128) * ((INPUTS + 127) // 128) + block * BLOCK_K // 128))


@triton.jit
def fp4_values(word, exponent, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """Values [N, K], in word order, of e2m1 int32 [N, K / 8] under E8M0 uint8 [N, K / 32]."""
    exponent = tl.reshape(exponent, [BLOCK_N, BLOCK_K // 32, 1])
    word = tl.reshape(word, [BLOCK_N, BLOCK_K // 32, 4])
    # Of either half of a pair, bits 6 to 8 take a magnitude and bit 15 its sign: e2m1 times 2^-126, as bfloat16.
    p0 = ((word << 6) & 0x01C001C0) | ((word << 12) & -0x7FFF8000)
    p1 = ((word << 2) & 0x01C001C0) | ((word << 8) & -0x7FFF8000)
    p2 = ((word >> 2) & 0x01C001C0) | ((word << 4) & -0x7FFF8000)
    p3 = ((word >> 6) & 0x01C001C0) | (word & -0x7FFF8000)
    v0 = _pair(p0, exponent, UPCAST)
    v1 = _pair(p1, exponent, UPCAST)
    v2 = _pair(p2, exponent, UPCAST)
    v3 = _pair(p3, exponent, UPCAST)
    value = tl.join(tl.join(v0, v2), tl.join(v1, v3))  # [N, groups, word, half, 2, 2]
    return tl.reshape(tl.permute(value, [0, 1, 4, 5, 2, 3]), [BLOCK_N, BLOCK_K])


@triton.jit
def _pair(bits, exponent, UPCAST: tl.constexpr):
    return tl.join(_scaled(bits, exponent, UPCAST), _scaled(bits >> 16, exponent, UPCAST))


@triton.jit
def _scaled(bits, exponent, UPCAST: tl.constexpr):
    """The bfloat16 of the lower half of `bits` (int32) times 2^126, times the scale of an E8M0 byte."""
    raised = _raised(bits, 126, UPCAST)
    if UPCAST:
        return raised * decode_e8m0(exponent)
    else:  # noqa: RET505
        e = exponent.to(tl.int32)
        return raised * _bf16_of(tl.where(e == 0, 0x40, tl.where(e == 255, 0x7FC0, e << 7)))


@triton.jit
def fp8_values(word, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """Values [N, K], in word order, of e4m3 int32 [N, K / 4]."""
    word = tl.reshape(word, [BLOCK_N, BLOCK_K // 16, 4])
    even = _e4m3_pair((word << 4) & 0x07F007F0, (word << 8) & -0x7FFF8000)
    odd = _e4m3_pair((word >> 4) & 0x07F007F0, word & -0x7FFF8000)
    v0 = tl.join(_raised(even, 120, UPCAST), _raised(even >> 16, 120, UPCAST))
    v1 = tl.join(_raised(odd, 120, UPCAST), _raised(odd >> 16, 120, UPCAST))
    value = tl.join(v0, v1)  # [N, groups, word, half, 2]
    return tl.reshape(tl.permute(value, [0, 1, 4, 2, 3]), [BLOCK_N, BLOCK_K])


@triton.jit
def _e4m3_pair(size, sign):
    """Two bfloat16: bits 4 to 10 are e4m3 times 2^-120; what e4m3 calls NaN, seven ones, gets every exponent bit."""
    return (size + ((size + 0x00100010) & 0x08000800) * 15) | sign


@triton.jit
def _raised(bits, RAISE: tl.constexpr, UPCAST: tl.constexpr):
    """The bfloat16 of the lower half of `bits` (int32) times 2^RAISE."""
    if UPCAST:
        return float_of(bits << 16) * float_of(tl.full([], (RAISE + 127) << 23, tl.int32))
    else:  # noqa: RET505
        return _bf16_of(bits) * _bf16_of(tl.full([], (RAISE + 127) << 7, tl.int32))


@triton.jit
def _bf16_of(bits):
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _tile(
    data, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Elements [BLOCK_N, BLOCK_K] of a matrix [ROWS, COLUMNS] from `row` and `column` on, zeros past it."""
    n = row + tl.arange(0, BLOCK_N)
    k = column + tl.arange(0, BLOCK_K)
    at = data + n[:, None] * COLUMNS + k[None, :]
    if ROWS % BLOCK_N == 0 and COLUMNS % BLOCK_K == 0:
        return tl.load(at)
    else:  # noqa: RET505
        return tl.load(at, mask=(n[:, None] < ROWS) & (k[None, :] < COLUMNS), other=0)


@triton.jit
def matrix_at(table_ptr, matrix, expert, FORMAT: tl.constexpr, NUM: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to data and scale of an expert's matrix (0, 1, 2: w1, w3, w2) in a table int64 [6, NUM]."""
    at = table_ptr + 2 * matrix * NUM + expert
    scale = tl.multiple_of(tl.load(at + NUM).to(tl.pointer_type(tl.uint8)), ALIGN)
    data = tl.load(at)
    if FORMAT == "f32":
        return tl.multiple_of(data.to(tl.pointer_type(tl.float32)), ALIGN), scale
    elif FORMAT == "f16":  # noqa: RET505
        return tl.multiple_of(data.to(tl.pointer_type(tl.float16)), ALIGN), scale
    elif FORMAT == "bf16":
        return tl.multiple_of(data.to(tl.pointer_type(tl.bfloat16)), ALIGN), scale
    else:
        return tl.multiple_of(data.to(tl.pointer_type(tl.uint8)), ALIGN), scale
