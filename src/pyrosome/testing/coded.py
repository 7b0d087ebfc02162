"""Weights made of codes, where they are to be: nothing is quantised, and on the meta device nothing is there at all."""

from __future__ import annotations

import torch

from pyrosome.quant import FORMATS, QuantTensor

_DTYPES = {"fp8": torch.float8_e4m3fn, "fp4": torch.int8}


def coded(
    kind: str,
    shape: tuple[int, ...],
    device: torch.device | str,
    scale: tuple[int, int] = (119, 119),
    generator: torch.Generator | None = None,
) -> QuantTensor:
    """A weight [..., N, K] in "fp8" or "fp4": codes at random, of either sign, none of them NaN.

    FP8 magnitudes are up to 1.75, FP4 ones up to 6.

    Args:
        scale: the least and the greatest E8M0 byte of its blocks.
    """
    *lead, N, K = shape
    low, high = scale

    def drawn(least: int, greatest: int, *size: int) -> torch.Tensor:
        return torch.randint(least, greatest + 1, size, generator=generator, device=device, dtype=torch.uint8)

    data = drawn(0, 255, *lead, N, K // (2 if kind == "fp4" else 1))
    if kind == "fp8":
        data &= 0xBF
    byte = drawn(low, high, *FORMATS[kind].scale_shape(shape))
    return QuantTensor(kind, data.view(_DTYPES[kind]), byte.view(torch.float8_e8m0fnu))
