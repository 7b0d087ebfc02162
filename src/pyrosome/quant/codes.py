"""What 8-bit (e4m3) and 4-bit (e2m1) codes stand for, and the code nearest to a value.

Rounding is to nearest, ties to the even mantissa.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign

# Adding 1.5 x 2^(e + 22) to a float32 leaves it rounded to a multiple of 2^(e - 1): one mantissa bit at exponent e.
_ROUNDER = (22 << 23) | (1 << 22)
_EXPONENT, _EXPONENT_OF_ONE = 0x7F800000, 127 << 23


def e4m3_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of e4m3 codes (uint8 or float8_e4m3fn) in `dtype`, exact; codes 127 and 255 are NaN."""
    # Looking a byte up is several times faster on a CPU than converting it.
    index = codes.view(torch.uint8).flatten().int()
    return _e4m3_table(dtype, str(codes.device)).index_select(0, index).view(codes.shape)


def e2m1_values(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [..., K] of packed codes [..., K / 2] (uint8 or int8) in `dtype`, exact."""
    index = packed.view(torch.uint8).flatten().int()
    pairs = _e2m1_pair_table(str(packed.device)).index_select(0, index)
    return pairs.view(torch.bfloat16).view(*packed.shape[:-1], 2 * packed.shape[-1]).to(dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """float32 x of magnitudes up to 6, rounded to e2m1 values; a zero keeps its sign."""
    rounder = _e2m1_rounder(x)
    return (x + rounder).sub_(rounder).copysign_(x)


def pack_e2m1(x: Tensor) -> Tensor:
    """uint8 [..., K / 2]: codes of the e2m1 values nearest to float32 x [..., K], the even channel in the low nibble.

    Magnitudes must not exceed 6.
    """
    size = x.abs()
    bits = size.add_(_e2m1_rounder(x)).view(torch.int32)
    # The low bits now count half-units of the exponent e; the field above them reads 299 + 2 e, and a code is
    # that count + 2 e: one code per step, each binade starting where the last one ended.
    code = (bits & 7).add_((bits >> 22) - 299).bitwise_or_((x.view(torch.int32) >> 28) & 8)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)


def _e2m1_rounder(x: Tensor) -> Tensor:
    # Below 1 the spacing stays that of exponent 0: 0.5 is e2m1's one subnormal.
    exponent = (x.view(torch.int32) & _EXPONENT).clamp_(min=_EXPONENT_OF_ONE)
    return exponent.add_(_ROUNDER).view(torch.float32)


@functools.cache
def _e4m3_table(dtype: torch.dtype, device: str) -> Tensor:
    """`dtype` [256]: the value of every byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)


@functools.cache
def _e2m1_pair_table(device: str) -> Tensor:
    """int32 [256]: the two bfloat16 values of every byte, low nibble first."""
    signed = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack([signed[byte & 15], signed[byte >> 4]], dim=-1)
    return pairs.view(torch.int32).flatten().to(device)
