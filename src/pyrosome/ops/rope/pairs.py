"""A row on the device as pairs of neighbours: divided by its RMS, turned, its other channels rounded.

What ends `norm_rope` and `compressed_rows`.  A row of C channels, an even number, is two tiles [G, 32]: its even
channels and its odd ones.  A turn then stays inside a thread, and 64 channels that share a scale are a line of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device


@triton.jit
def split_pairs(x, G: tl.constexpr):
    """(even, odd) [G, 32] of channels x [64 G]."""
    return tl.split(tl.reshape(x, (G, 32, 2)))


@triton.jit
def join_pairs(even, odd, G: tl.constexpr):
    """Channels [64 G] of (even, odd) [G, 32]."""
    return tl.reshape(tl.join(even, odd), (G * 64,))


@triton.jit
def divide_by_rms(even, odd, weight_ptr, eps, C: tl.constexpr, G: tl.constexpr):
    """The row divided by its RMS, times its weight where there is one; zeros outside of the row."""
    inverse = tl.rsqrt(tl.sum(even * even + odd * odd) * (1.0 / C) + eps)
    even, odd = even * inverse, odd * inverse
    if weight_ptr is not None:
        channel = tl.arange(0, G * 64)
        weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        even_weight, odd_weight = split_pairs(weight, G)
        even, odd = even * even_weight, odd * odd_weight
    return even, odd


@triton.jit
def turn(even, odd, turn_ptr, INVERSE: tl.constexpr, C: tl.constexpr, F: tl.constexpr, G: tl.constexpr):
    """The last F pairs times their unit complex numbers (cos, sin) [F, 2], or their conjugates; others untouched."""
    pair = tl.arange(0, G)[:, None] * 32 + tl.arange(0, 32)[None, :]
    turned = (pair >= C // 2 - F) & (pair < C // 2)
    at = tl.arange(0, G * 64) - (C - 2 * F)  # read as the row is, cos and sin lie in the threads that want them
    cos, sin = split_pairs(tl.load(turn_ptr + at, mask=(at >= 0) & (at < 2 * F), other=0.0), G)
    if INVERSE:
        sin = -sin
    return tl.where(turned, even * cos - odd * sin, even), tl.where(turned, even * sin + odd * cos, odd)


@triton.jit
def round_nope(even, odd, C: tl.constexpr, F: tl.constexpr, G: tl.constexpr):
    """The channels before the last F pairs rounded to e4m3, with a power-of-two scale for each 64 of them."""
    pair = tl.arange(0, G)[:, None] * 32 + tl.arange(0, 32)[None, :]
    rounded = pair < C // 2 - F
    size = tl.where(rounded, tl.maximum(device.size_bits(even), device.size_bits(odd)), 0)
    scale, inverse, _ = device.fp8_scale(tl.max(size, axis=1)[:, None])
    near_even = device.decode_e4m3(device.encode_e4m3(even * inverse)) * scale
    near_odd = device.decode_e4m3(device.encode_e4m3(odd * inverse)) * scale
    return tl.where(rounded, near_even, even), tl.where(rounded, near_odd, odd)
