"""The formats once more, from their definitions, in Python floats (which hold every value of them exactly)."""

from __future__ import annotations

import math


def e4m3_value(code: int) -> float:
    """The value of an e4m3 code 0..255: 4 exponent bits of bias 7, 3 mantissa bits, no infinity, one NaN per sign."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    size = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -size if code & 128 else size


def e2m1_value(code: int) -> float:
    """The value of an e2m1 code 0..15: 2 exponent bits of bias 1, 1 mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = math.ldexp(2 + mantissa, exponent - 2) if exponent else mantissa / 2
    return -size if code & 8 else size


E4M3 = [e4m3_value(code) for code in range(127)]  # ascending, finite
E2M1 = [e2m1_value(code) for code in range(8)]


def nearest(x: float, values: list[float]) -> int:
    """Index of the value nearest to |x|; between two neighbours, the even one."""
    return min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))


def rounded(x: float, values: list[float]) -> float:
    return math.copysign(values[nearest(x, values)], x)


def ceil_exponent(x: float) -> int:
    """ceil(log2(x)) of a positive float, exactly."""
    mantissa, exponent = math.frexp(x)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return exponent - 1 if mantissa == 0.5 else exponent


def scale_exponent(group: list[float], largest: float, floor: float) -> int:
    """Exponent of a group's scale: the least power of two that brings its largest magnitude to `largest` or below."""
    amax = max(floor, *map(abs, group))
    exponent = ceil_exponent(amax) - ceil_exponent(largest) - 1
    while largest * 2.0**exponent < amax:
        exponent += 1
    return exponent
