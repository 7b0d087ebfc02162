"""`linear` and `grouped_linear` by the native library; the same bits for a row whatever else is in the call."""

from __future__ import annotations

from torch import Tensor

from pyrosome.ops import native
from pyrosome.quant import QuantTensor


def linear(x: Tensor, weight_NK: Tensor | QuantTensor) -> Tensor:
    """As the definition, for float32 x."""
    (N, K), rows = weight_NK.shape, x.reshape(-1, x.shape[-1])
    return _product(rows, 1, N, K, weight_NK).view(*x.shape[:-1], N)


def grouped_linear(x_TGK: Tensor, weight_NK: Tensor | QuantTensor) -> Tensor:
    """As the definition, for float32 x."""
    T, G, K = x_TGK.shape
    return _product(x_TGK.reshape(T, G * K), G, weight_NK.shape[0] // G, K, weight_NK).view(T, G, -1)


def _product(x_ME: Tensor, G: int, N: int, K: int, weight: Tensor | QuantTensor) -> Tensor:
    x_ME, (kind, data, scale) = x_ME.contiguous(), native.stored(weight)
    M = x_ME.shape[0]
    if x_ME.shape[1] != G * K:  # memory past a row must never be read
        raise RuntimeError(f"rows of {x_ME.shape[1]} were given to {G} products of {K} inputs each")
    y = x_ME.new_empty(M, G * N)
    native.library().pyrosome_linear(
        x_ME.data_ptr(), G * K, kind, data.data_ptr(), native.address(scale), y.data_ptr(),
        M, G, N, K, native.threads(),
    )  # fmt: skip
    return y
