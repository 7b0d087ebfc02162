"""Quantisation points between ops: what the weights were trained to expect.

A simulated rounding quantises and comes straight back; its gradient passes straight through.
Shape letters: K channels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import RequestError
from pyrosome.quant.e8m0 import ceil_pow2
from pyrosome.quant.formats import FP4_MAX, FP8_MAX, FP4_VALUES, e2m1_codes

FP8_FLOOR = 1e-4  # smallest largest-magnitude a group is scaled by (official inference code)
FP4_FLOOR = FP4_MAX * 2.0**-126


def quantize_activation(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., K], E8M0 scales [..., ceil(K / group)]) of x [..., K], one power-of-two scale per group."""
    codes, _, byte = _fp8(x.float(), group)
    return codes, byte.view(torch.float8_e8m0fnu)


def _fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 codes [..., K], float32 scales [..., G, 1], E8M0 bytes [..., G])."""
    grouped = _groups(x, group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=FP8_FLOOR)
    scale, byte = ceil_pow2(amax / FP8_MAX)
    codes = (grouped / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., : x.shape[-1]], scale, byte[..., 0]


def _groups(x: Tensor, group: int) -> Tensor:
    short = -x.shape[-1] % group
    return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, group))


class _StraightThrough(torch.autograd.Function):
    """Forward: `round_trip` of x.  Backward: the gradient as it came."""

    @staticmethod
    def forward(ctx, x, round_trip):  # type: ignore[no-untyped-def]
        return round_trip(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def simulate_fp8(x: Tensor, group: int) -> Tensor:
    """x [..., K] rounded to e4m3 with a power-of-two scale per `group` channels, in x's dtype."""
    return _StraightThrough.apply(x, functools.partial(_fp8_round_trip, group=group))  # type: ignore[no-any-return,no-untyped-call]


def _fp8_round_trip(x: Tensor, group: int) -> Tensor:
    codes, scale, _ = _fp8(x.float(), group)
    values = _groups(codes.float(), group) * scale
    return values.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def fp4_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale [..., G, group], float32 scales [..., G, 1], E8M0 bytes [..., G]) for e2m1 codes."""
    grouped = _groups(x.float(), group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=FP4_FLOOR)
    scale, byte = ceil_pow2(amax / FP4_MAX)
    return grouped / scale, scale, byte[..., 0]


def simulate_fp4(x: Tensor, group: int = 32) -> Tensor:
    """x [..., K] rounded to e2m1 with a power-of-two scale per `group` channels, in x's dtype."""
    return _StraightThrough.apply(x, functools.partial(_fp4_round_trip, group=group))  # type: ignore[no-any-return,no-untyped-call]


def _fp4_round_trip(x: Tensor, group: int) -> Tensor:
    scaled, scale, _ = fp4_groups(x, group)
    table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=x.device)
    values = table[e2m1_codes(scaled).int()] * scale
    return values.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


@functools.cache
def _hadamard_matrix(dim: int, dtype: torch.dtype, device: str) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * dim**-0.5).to(dtype).to(device)


def hadamard(x: Tensor) -> Tensor:
    """x [..., K] times the normalised Walsh-Hadamard matrix in Sylvester order; K must be a power of two.

    Raises:
        RequestError: K is not a power of two.
    """
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise RequestError(f"a Hadamard rotation of {dim} channels was asked for; it needs a power of two")
    return x @ _hadamard_matrix(dim, x.dtype, str(x.device))
