"""Matrix products with a weight as it is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import UnsupportedFormat
from pyrosome.ops import gpu, native
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.seam import Op
from pyrosome.quant import QuantTensor, unchanged

Prepare = Callable[[Tensor], Tensor]  # what a weight's stored format asks of its input: round it, or nothing


def dense(weight: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    """The weight's exact values in `dtype`; no copy where it is already that."""
    return weight.dequantize(dtype) if isinstance(weight, QuantTensor) else weight.to(dtype)


def dense_rows(weight: Tensor | QuantTensor, index_T: Tensor) -> Tensor:
    """Rows `index_T` of a weight; only a weight that is never stored quantised (an embedding) is read by rows."""
    if isinstance(weight, QuantTensor):
        raise UnsupportedFormat(f"rows were to be read from a weight in {weight.format}; tables are BF16, F16 or F32")
    return weight[index_T]


@Op
def linear(x: Tensor, weight_NK: Tensor | QuantTensor, prepare: Prepare = unchanged) -> Tensor:
    """x [..., K], prepared, times the transpose of `weight_NK`, in promote(x, float32), returned in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(prepare(x).to(wide), dense(weight_NK, wide)).to(x.dtype)


@Op
def linears(
    x: Tensor, weights: Sequence[tuple[Tensor | QuantTensor, Prepare]], norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """Several products of one x [..., K], each with its own weight [N, K] and what it asks of its input.

    With `norm` [K], x is divided by its RMS and multiplied by it first.
    """
    x = x if norm is None else rms_norm(x, norm, eps)
    return [linear(x, weight_NK, prepare) for weight_NK, prepare in weights]


@Op
def grouped_linear(x_TGK: Tensor, weight_NK: Tensor | QuantTensor) -> Tensor:
    """One product per group: row block g of `weight_NK` [G x O, K] times x_TGK[:, g] -> [T, G, O].

    The grouped output projection's first half; its activations are never quantised (official inference code).
    """
    wide = torch.promote_types(x_TGK.dtype, torch.float32)
    weight_GOK = dense(weight_NK, wide).unflatten(0, (x_TGK.shape[1], -1))
    out_GTO = torch.bmm(x_TGK.to(wide).transpose(0, 1), weight_GOK.transpose(1, 2))
    return out_GTO.transpose(0, 1).to(x_TGK.dtype)


@Op
def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a number."""
    return x * factor


native.kernel(scaled)
gpu.kernel(scaled)
native.kernel(linear)
gpu.kernel(linear)
native.kernel(linears)
gpu.kernel(linears)
native.kernel(grouped_linear)
gpu.kernel(grouped_linear)
