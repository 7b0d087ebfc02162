"""Noise that depends on a seed, a position and a token's id alone, the same on every machine.

Counter-based: nothing is drawn in an order, so a choice is the same whatever was chosen before, beside or ahead of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number strictly between 0 and 1 for each id: an odd multiple of 2**-53.

    The splitmix64 generator (Steele, Lea, Flood 2014), entered at the id; where it begins is a hash of seed and
    position.  Integers and exact floats only: these bits are promised.
    """
    x = ids.astype(np.uint64)  # a copy, worked on in place
    x *= np.uint64(_GOLDEN)
    x += np.uint64(_mix(_mix(seed & _64) ^ (position * _GOLDEN & _64)))
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        np.right_shift(x, np.uint64(shift), out=shifted)
        x ^= shifted
        x *= np.uint64(factor)
    # The upper 52 bits as the fraction of a float from 1 to 2, which saves a slow conversion.
    x >>= np.uint64(12)
    x |= np.uint64(0x3FF << 52)
    u: NDArray[np.float64] = x.view(np.float64)
    u -= 1 - 2.0**-53
    return u


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's completion `index`; the first has the request's own."""
    return seed if index == 0 else _mix(_mix(seed & _64) ^ index)


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)
