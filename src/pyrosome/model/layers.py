"""The parts with weights that the network is made of: they hold a weight as stored and call one op each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrosome.model.numerics import Numerics, unchanged
from pyrosome.ops import native
from pyrosome.ops.linear import dense, linear
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.quant import QuantTensor


def held(value: QuantTensor, device: torch.device | str, parts: int = 1) -> QuantTensor:
    """A copy of a quantised weight as `device` keeps it: in tiles where native CPU kernels read it, else as stored."""
    if torch.device(device).type == "cpu":
        kept = native.at_rest(value, parts)
        assert isinstance(kept, QuantTensor)
        return kept
    return QuantTensor(value.format, value.data.to(device, copy=True), value.scale.to(device, copy=True))


class Weight(nn.Module):
    """A matrix as it is stored: a parameter, or a QuantTensor that no gradient reaches.

    Args:
        parts: it is read as so many groups of rows, each by inputs of its own.
    """

    def __init__(self, *shape: int, parts: int = 1) -> None:
        super().__init__()
        self.shape, self.parts = shape, parts
        self.prepare: Callable[[Tensor], Tensor] = unchanged
        self.value: Tensor | QuantTensor = nn.Parameter(torch.empty(shape, device="meta"))

    def assign(
        self, value: Tensor | QuantTensor, numerics: Numerics, *, unpack: bool, device: torch.device | str = "cpu"
    ) -> None:
        """Take a copy of `value`; with `unpack`, its exact float32 values (quantisation points stay the format's)."""
        self.prepare = numerics.activation if isinstance(value, QuantTensor) else unchanged
        if isinstance(value, QuantTensor) and not unpack:
            del self.value  # a registered parameter cannot be replaced by anything else
            self.value = held(value, device, self.parts)
        else:
            values = dense(value, torch.float32) if unpack or isinstance(value, QuantTensor) else value
            on_cpu = torch.device(device).type == "cpu"
            kept = native.at_rest(values.detach()) if on_cpu else values.to(device, copy=True)
            assert isinstance(kept, Tensor)
            self.value = nn.Parameter(kept, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.value.device


class Linear(Weight):
    """y = x W^T, x quantised first where the weight's format asks for it."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.value, self.prepare)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Normalisation with a learned weight, kept in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]
