"""The parts with weights that the network is made of: they hold a weight as stored and call one op each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrosome.model.numerics import Numerics, unchanged
from pyrosome.ops.linear import dense, linear
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.quant import QuantTensor


class Weight(nn.Module):
    """A matrix as it is stored: a parameter, or a QuantTensor that no gradient reaches."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.prepare: Callable[[Tensor], Tensor] = unchanged
        self.value: Tensor | QuantTensor = nn.Parameter(torch.empty(shape, device="meta"))

    def assign(self, value: Tensor | QuantTensor, numerics: Numerics, *, unpack: bool) -> None:
        """Take `value`; with `unpack`, its exact float32 values (the quantisation points stay those of the format)."""
        self.prepare = numerics.activation if isinstance(value, QuantTensor) else unchanged
        if isinstance(value, QuantTensor) and not unpack:
            del self.value  # a registered parameter cannot be replaced by anything else
            self.value = value
        else:
            values = dense(value, torch.float32) if unpack or isinstance(value, QuantTensor) else value
            self.value = nn.Parameter(values, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.value.device


class Linear(Weight):
    """y = x W^T, x quantised first where the weight's format asks for it."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.prepare(x), self.value)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Normalisation with a learned weight, kept in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]
