"""How sums over a token's keys join and become an attention.  Maxima are logarithms to base 2.

Shape letters: C head dim, F frequencies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device

FINISHED, PART = tl.constexpr(0), tl.constexpr(1)  # what is written at last
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
    return 1.0 / (mass + tl.exp2(tl.fma(sink, LOG2_E, -top)))


@triton.jit
def log_mass(top, mass):
    """The log mass that a part is told by; -inf without a key."""
    return tl.where(mass == 0, float("-inf"), tl.fma(top, LN_2, tl.log(mass)))


@triton.jit
def turned_back(x, turn_ptr, low, C: tl.constexpr, F: tl.constexpr):
    """x [rows, channels from `low`], its rotary channels turned back by the angles [F] (cos, sin) of one token."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    pair = tl.arange(0, WIDTH // 2) + (low // 2 + F - C // 2)
    turns = (pair >= 0) & (pair < F)
    cos = tl.load(turn_ptr + 2 * pair, mask=turns, other=1.0)[None, :]
    sin = tl.load(turn_ptr + 2 * pair + 1, mask=turns, other=0.0)[None, :]
    straight = tl.where(turns[None, :], tl.fma(even, cos, odd * sin), even)
    across = tl.where(turns[None, :], tl.fma(odd, cos, -(even * sin)), odd)
    return tl.reshape(tl.join(straight, across), (ROWS, WIDTH))
