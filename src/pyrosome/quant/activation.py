"""Quantisation points between ops: what the weights were trained to expect.

A simulated rounding quantises and comes straight back; its gradient passes straight through.
Everything is computed in float32 (a float64 input is rounded to it first): that is what a kernel sees.
Shape letters: K channels, G groups of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import UnsupportedFormat
from pyrosome.quant.codes import FP4_MAX, FP8_MAX, e4m3_values, round_e2m1
from pyrosome.quant.e8m0 import ceil_pow2

FP8_FLOOR = 1e-4  # a group is scaled as if its largest magnitude were at least this (official inference code)
FP4_FLOOR = FP4_MAX * 2.0**-126
ACTIVATION_GROUP, KV_GROUP, INDEX_GROUP = 128, 64, 32


def quantize_activation(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """(e4m3 codes [..., K], E8M0 scales [..., ceil(K / group)]) of x [..., K].

    A group's scale is 2^ceil(log2(amax / 448)) with amax at least 1e-4 (DeepSeek-V4 report; official inference code).
    A group with an infinity or a NaN has a NaN scale.
    """
    codes, _, byte = fp8_groups(x, group)
    return codes.flatten(-2)[..., : x.shape[-1]], byte.view(torch.float8_e8m0fnu)


def simulate_fp8(x: Tensor, group: int) -> Tensor:
    """x [..., K] rounded to e4m3 with a power-of-two scale per `group` channels, in x's dtype."""

    def round_trip(x: Tensor) -> Tensor:
        codes, scale, _ = fp8_groups(x, group)
        values = e4m3_values(codes, torch.float32).mul_(scale)
        return values.flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    return straight_through(x, round_trip)


def round_activation(x: Tensor) -> Tensor:
    """What goes into a quantised weight, as the weights were trained: rounded to FP8 in groups of 128 channels."""
    return simulate_fp8(x, ACTIVATION_GROUP)


def round_kv(x: Tensor) -> Tensor:
    """The unrotated channels of a KV row, as the weights were trained: rounded to FP8 in groups of 64 channels."""
    return simulate_fp8(x, KV_GROUP)


def round_index(x: Tensor) -> Tensor:
    """An indexer's query or key after its Hadamard rotation, as trained: rounded to FP4 in groups of 32 channels."""
    return simulate_fp4(x, INDEX_GROUP)


def unchanged(x: Tensor) -> Tensor:
    """The identity: what a quantisation point does where there is nothing to quantise."""
    return x


def simulate_fp4(x: Tensor, group: int = 32) -> Tensor:
    """x [..., K] rounded to e2m1 with a power-of-two scale per `group` channels, in x's dtype.

    A group's scale is 2^ceil(log2(amax / 6)) with amax at least 6 x 2^-126 (official inference code).
    """

    def round_trip(x: Tensor) -> Tensor:
        scaled, scale, _ = fp4_groups(x, group)
        return round_e2m1(scaled).mul_(scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    return straight_through(x, round_trip)


def hadamard(x: Tensor) -> Tensor:
    """x [..., K] times the normalised Walsh-Hadamard matrix in Sylvester order, in x's dtype.

    Raises:
        UnsupportedFormat: K is not a power of two.
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise UnsupportedFormat(
            f"a Hadamard rotation of {dim} channels was asked for; it exists here for powers of two only: "
            "check index_head_dim in config.json"
        )
    result: Tensor = _Hadamard.apply(x)  # type: ignore[no-untyped-call]
    return result


def straight_through(x: Tensor, round_trip: Callable[[Tensor], Tensor]) -> Tensor:
    """`round_trip` of x, with the gradient of x itself."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return round_trip(x)
    result: Tensor = _StraightThrough.apply(x, round_trip)  # type: ignore[no-untyped-call]
    return result


def fp8_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 codes [..., G, group], float32 scales [..., G, 1], E8M0 bytes [..., G]) of x [..., K], zeros past K."""
    grouped = _groups(x, group)
    scale, byte = ceil_pow2(grouped.abs().amax(-1, keepdim=True).clamp_(min=FP8_FLOOR).div_(FP8_MAX))
    # No clamp to 448: a scale is never below amax / 448, so no quotient is above.
    return (grouped / scale).to(torch.float8_e4m3fn), scale, byte[..., 0]


def fp4_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale [..., G, group], float32 scales [..., G, 1], E8M0 bytes [..., G]) of x [..., K], zeros past K.

    Magnitudes of the first are at most 6.
    """
    grouped = _groups(x, group)
    scale, byte = ceil_pow2(grouped.abs().amax(-1, keepdim=True).clamp_(min=FP4_FLOOR).div_(FP4_MAX))
    return grouped / scale, scale, byte[..., 0]


def _groups(x: Tensor, group: int) -> Tensor:
    short = -x.shape[-1] % group
    x = x.detach().float()
    x = F.pad(x, (0, short)) if short else x
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


class _StraightThrough(torch.autograd.Function):
    """Forward: `round_trip` of x.  Backward: the gradient as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, round_trip: Callable[[Tensor], Tensor]) -> Tensor:
        return round_trip(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Hadamard(torch.autograd.Function):
    """The transform is symmetric: its gradient is the transform of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Butterflies, not a matrix product: one fixed order of additions whatever the number of rows, which a
        # library's product does not promise.  Each pass adds and subtracts neighbours and parts the results.
        dim, half = x.shape[-1], x.shape[-1] // 2
        y_RK = x.reshape(x.numel() // dim, dim)
        spare = [torch.empty_like(y_RK), torch.empty_like(y_RK)]
        for i in range(dim.bit_length() - 1):
            out_RK = spare[i % 2]
            torch.add(y_RK[:, 0::2], y_RK[:, 1::2], out=out_RK[:, :half])
            torch.sub(y_RK[:, 0::2], y_RK[:, 1::2], out=out_RK[:, half:])
            y_RK = out_RK
        return y_RK.mul(dim**-0.5).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return hadamard(grads[0])
