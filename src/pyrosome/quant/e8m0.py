"""E8M0: a byte e that stands for the power of two 2^(e - 127); 255 is NaN.

Every scale of the model is one.  The ceiling power of two is found in the bits of the float, because
log2 and ceil in floating point mis-round exact powers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def e8m0_to_float(scale: Tensor) -> Tensor:
    """float32 values of E8M0 bytes (uint8 or float8_e8m0fnu), exact; byte 255 is NaN."""
    e = scale.view(torch.uint8).to(torch.int32)
    # 2^-127 (byte 0) is a float32 subnormal, which no exponent field alone can spell.
    bits = torch.where(e == 0, 1 << 22, e << 23)
    return torch.where(e == 255, float("nan"), bits.view(torch.float32))


def ceil_pow2(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, byte) with scale = 2^ceil(log2(x)) in float32, for positive finite x; an exact power stays."""
    bits = x.float().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    exponent = exponent.clamp(1, 254)
    return (exponent << 23).view(torch.float32), exponent.to(torch.uint8)
