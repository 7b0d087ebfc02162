"""Products by the native library; the same bits for a row whatever else is in the call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrosome.ops import linear as ops
from pyrosome.ops import native, workspace
from pyrosome.ops.linear import Prepare
from pyrosome.quant import QuantTensor, round_activation, unchanged


class Product(ctypes.Structure):
    """One of several products that read the same rows: `Product` of linear/cpu.cpp."""

    _fields_ = [("weight", ctypes.c_void_p), ("y", ctypes.c_void_p), ("ldy", ctypes.c_int64)]


def linear(x: Tensor, weight_NK: Tensor | QuantTensor, prepare: Prepare = unchanged) -> Tensor:
    """As the definition, for float32 x."""
    if prepare is not unchanged and not (prepare is round_activation and _is_stored(weight_NK)):
        x, prepare = prepare(x), unchanged
    (out,) = linears(x, ((weight_NK, prepare),))
    return out


def linears(
    x: Tensor, weights: Sequence[tuple[Tensor | QuantTensor, Prepare]], norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """As the definition, for float32 x: one call for all, inputs normalised and rounded once."""
    rounds = [prepare is round_activation for _, prepare in weights]
    # The library rounds in front of stored weights alone; unpacked ones keep what their format asked for.
    is_told = [prepare is unchanged or (prepare is round_activation and _is_stored(w)) for w, prepare in weights]
    if not all(is_told):
        return ops.linears.definition(x, weights, norm, eps)  # type: ignore[no-any-return]
    K, lead = x.shape[-1], x.shape[:-1]
    rows = x.reshape(-1, K)
    if rows.stride(0) != K:
        rows = rows.contiguous()
    M, outs, products, held = rows.shape[0], [], (Product * len(weights))(), []
    for i, (value, _) in enumerate(weights):
        if value.shape[-1] != K:  # memory past a row must never be read
            raise RuntimeError(f"rows of {K} were given to a product of {value.shape[-1]} inputs")
        if _is_stored(value) and rounds[i] != any(rounds):
            return ops.linears.definition(x, weights, norm, eps)  # type: ignore[no-any-return]
        out, (_, kept) = workspace.empty(*lead, value.shape[0], like=x), native.weight(value)
        products[i] = Product(ctypes.addressof(kept.spec), out.data_ptr(), value.shape[0])
        outs.append(out)
        held.append(kept)
    native.library().linear(
        rows.data_ptr(), K, M, products, len(outs), any(rounds), native.address(norm), eps, native.threads()
    )
    return outs


def _is_stored(weight: Tensor | QuantTensor) -> bool:
    return isinstance(weight, QuantTensor)


def grouped_linear(x_TGK: Tensor, weight_NK: Tensor | QuantTensor) -> Tensor:
    """As the definition, for float32 x."""
    T, G, K = x_TGK.shape
    if weight_NK.shape[-1] != K:
        raise RuntimeError(f"rows of {K} were given to products of {weight_NK.shape[-1]} inputs")
    x_TGK = x_TGK.contiguous()
    y = workspace.empty(T, G, weight_NK.shape[0] // G, like=x_TGK)
    at, held = native.weight(weight_NK, G)
    native.library().grouped_linear(x_TGK.data_ptr(), G * K, T, at, G, y.data_ptr(), native.threads())
    del held
    return y


def scaled(x: Tensor, factor: float) -> Tensor:
    """As the definition, for float32 x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    native.library().scale(x.data_ptr(), out.data_ptr(), x.numel(), factor)
    return out
