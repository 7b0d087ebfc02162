"""What kernels share on the device: number formats, and products of their tiles.

The same values as `quant`, bit for bit.  Rounding is written in integers: Triton's interpreter truncates where it
should round to nearest when it narrows a float, and has no bfloat16 arithmetic.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from pyrosome.quant.activation import FP4_FLOOR, FP8_FLOOR
from pyrosome.quant.codes import FP4_MAX, FP8_MAX


def _bits(value: float) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<i", struct.pack("<f", value))[0])


_LEAST_FP8, _MOST_FP8, _LEAST_FP4, _MOST_FP4 = _bits(FP8_FLOOR), _bits(FP8_MAX), _bits(FP4_FLOOR), _bits(FP4_MAX)


@triton.jit
def bits_of(x):
    """The bits of a float32, as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_e8m0(byte):
    """float32 values of E8M0 bytes; 0 is 2^-127, 255 is NaN."""
    e = byte.to(tl.int32)
    bits = tl.where(e == 0, 1 << 22, e << 23)
    return float_of(tl.where(e == 255, 0x7FC00000, bits))


@triton.jit
def size_bits(x):
    """The bits of |x| as int32: they are ordered as magnitudes are, with NaN above infinity, so a maximum keeps it."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def fp8_scale(largest):
    """(float32 scale, its inverse, E8M0 byte as int32) of e4m3 groups, from the largest `size_bits` of each.

    The scale is 2^ceil(log2(amax / 448)) with amax at least 1e-4, and NaN for a group with an infinity or a NaN.
    """
    return _group_scale(largest, _LEAST_FP8, _MOST_FP8)


@triton.jit
def fp4_scale(largest):
    """As `fp8_scale`, of e2m1 groups: 2^ceil(log2(amax / 6)) with amax at least 6 x 2^-126."""
    return _group_scale(largest, _LEAST_FP4, _MOST_FP4)


@triton.jit
def _group_scale(largest, LEAST: tl.constexpr, MOST: tl.constexpr):
    # Bits of positive floats are their logarithms up to the mantissa's curve, which crosses no power of two: their
    # difference, rounded up to an exponent, is that of the quotient.
    byte = ((tl.maximum(largest, LEAST) - MOST + 0x7FFFFF) >> 23) + 127
    is_finite = largest < 0x7F800000
    # x times the inverse is x by the scale, to the bit: both only move the exponent.
    scale, inverse = tl.where(is_finite, byte << 23, 0x7FC00000), tl.where(is_finite, (254 - byte) << 23, 0x7FC00000)
    return float_of(scale), float_of(inverse), tl.where(is_finite, byte, 255)


@triton.jit
def decode_e4m3(byte):
    """float32 values of e4m3 codes (uint8); 127 and 255 are NaN."""
    b = byte.to(tl.int32)
    size = b & 0x7F
    normal = float_of((size << 20) + (120 << 23))
    subnormal = size.to(tl.float32) * 0.001953125  # 2^-9: below 8 a code counts them
    value = tl.where(size < 8, subnormal, normal)
    value = tl.where(size == 127, float_of(b * 0 + 0x7FC00000), value)
    return float_of(bits_of(value) | ((b & 0x80) << 24))


@triton.jit
def encode_e4m3(x):
    """e4m3 codes (int32) of float32 x of magnitudes up to 448, to nearest, ties to even; NaN is 127."""
    bits, size = bits_of(x), size_bits(x)
    # A normal number keeps 3 bits of its mantissa: half of the last one less 1, plus it, rounds ties to even.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count 2^-9: adding 1.5 x 2^14 leaves that count in the lowest bits.
    subnormal = bits_of(float_of(size) + 24576.0) - 0x46C00000
    code = tl.where(size < (121 << 23), subnormal, normal)
    code = tl.where(size > 0x7F800000, 127, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def decode_e2m1(code):
    """float32 values of e2m1 codes (integers whose lowest 4 bits count)."""
    c = code.to(tl.int32)
    # As a float32 the three bits of magnitude count from 2^-126, subnormal below it.
    return float_of(((c << 22) & (7 << 22)) | ((c << 28) & -2147483648)) * 8.507059173023462e37  # 2^126


@triton.jit
def encode_e2m1(x):
    """e2m1 codes (int32) of float32 x of magnitudes up to 6, to nearest, ties to even; a zero keeps its sign."""
    bits, size = bits_of(x), float_of(size_bits(x))
    # Adding 1.5 x 2^(e + 22) rounds to a multiple of 2^(e - 1) and leaves the count in the lowest bits.
    exponent = tl.maximum(bits & 0x7F800000, 127 << 23)
    rounded = bits_of(size + float_of(exponent + ((22 << 23) | (1 << 22))))
    return ((rounded & 7) + ((rounded >> 22) - 299)) | ((bits >> 28) & 8)


@triton.jit
def to_bf16_bits(x):
    """The bits (int32) of float32 x rounded to bfloat16, ties to even."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(size_bits(x) > 0x7F800000, bits | 0x400000, rounded)


@triton.jit
def round_bf16(x):
    """float32 x rounded to values of bfloat16: a cast to bfloat16 behind it is exact."""
    return float_of(to_bf16_bits(x))


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b of bfloat16 or e4m3 tiles, products exact, summed in float32.

    UPCAST is for the interpreter, which gets bfloat16 products wrong.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def narrow(x, UPCAST: tl.constexpr):
    """float32 values that bfloat16 holds, as bfloat16 for a `dot`; under UPCAST they stay as they are."""
    if UPCAST:
        return x
    return x.to(tl.bfloat16)


@triton.jit
def exp(x):
    """e^x of float32 x, to its last bits and down to the smallest numbers.

    `tl.exp` rounds x log2 e to float32 before it raises: at -80 that is an error of forty last bits.
    """
    times = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -252.0), 254.0)
    # ln 2 as a number of nine bits, whose multiples are exact, and what is missing of it.
    rest = x - times * 0.693359375 + times * 2.12194440e-4
    half = tl.floor(times * 0.5)
    low = float_of((half.to(tl.int32) + 127) << 23)
    high = float_of(((times - half).to(tl.int32) + 127) << 23)
    return tl.where(x == float("inf"), x, tl.where(x < -160.0, 0.0, tl.exp(rest)) * low * high)


@triton.jit
def split3(x):
    """float32 x as a sum of three values of bfloat16 each, exact to its last bit but for the smallest numbers.

    Each part is what is left, cut off behind its first eight bits: so no part overflows, and of what is infinite or
    no number all is in the first.
    """
    high = tl.where(x == x, float_of(bits_of(x) & -65536), x)
    rest = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)
    middle = float_of(bits_of(rest) & -65536)
    return high, middle, rest - middle


@triton.jit
def narrow3(x, UPCAST: tl.constexpr):
    """The parts of `split3`, each for a `dot`."""
    high, middle, low = split3(x)
    return narrow(high, UPCAST), narrow(middle, UPCAST), narrow(low, UPCAST)


@triton.jit
def float_dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b of float32 tiles, by six bfloat16 products of their parts; what is left out is below 2^-21 of a term.

    Nothing is lost where bfloat16 holds a.  An infinity of b meets the first part of a alone: other parts may be zero.
    """
    a, a_middle, a_low = narrow3(a, UPCAST)
    high, middle, low = narrow3(b, UPCAST)
    finite = narrow(split3(tl.where(tl.abs(b) < float("inf"), b, 0.0))[0], UPCAST)
    acc = dot(a_low, finite, acc, UPCAST)
    acc = dot(a_middle, middle, acc, UPCAST)
    acc = dot(a_middle, finite, acc, UPCAST)
    acc = dot(a, low, acc, UPCAST)
    acc = dot(a, middle, acc, UPCAST)
    return dot(a, high, acc, UPCAST)
