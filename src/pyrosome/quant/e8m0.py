"""E8M0: a byte e that stands for the power of two 2^(e - 127); 255 is NaN.

Every scale of the model is one.  The ceiling power of two is found in the bits of the float, because
log2 and ceil in floating point mis-round exact powers.
"""

from __future__ import annotations

import torch
from torch import Tensor

E8M0_NAN = 255


def e8m0_to_float(scale: Tensor) -> Tensor:
    """float32 values of E8M0 bytes (uint8 or float8_e8m0fnu) of any shape, exact; byte 255 is NaN."""
    e = scale.view(torch.uint8).to(torch.int32)
    # 2^-127 (byte 0) is a float32 subnormal, which no exponent field alone can spell.
    bits = torch.where(e == 0, 1 << 22, e << 23)
    return torch.where(e == E8M0_NAN, float("nan"), bits.view(torch.float32))


def ceil_pow2(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale float32, byte uint8) of x's shape, scale = 2^ceil(log2(x)) for positive x; an exact power stays.

    Scales are normal numbers: at least 2^-126 (byte 1).  Where no power of two will do (x above 2^127,
    infinite or NaN) the scale is NaN and the byte 255, so that a fault upstream shows in every value it scales.
    """
    bits = x.detach().float().view(torch.int32) & 0x7FFFFFFF  # some reductions return NaN with its sign bit set
    # Less 1, the bits of an exact power fall into the binade below; the bits of anything else stay in theirs.
    exponent = ((bits - 1 >> 23) + 1).clamp(1, E8M0_NAN)
    # Exponent 255 with an empty mantissa would be infinity; its top bit makes it NaN.
    scale = (exponent << 23) | ((exponent + 1) >> 8 << 22)
    return scale.view(torch.float32), exponent.to(torch.uint8)
