"""Calls so small that Triton's interpreter makes them at once: to see that a benchmark works without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from pyrosome.ops.linear import linear
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.quant import FORMATS, QuantTensor, round_activation
from pyrosome.testing.calls import Call

ROWS, WIDTH, OUTPUTS = (1, 3), 128, 128


def all_calls() -> Iterator[Call]:
    """Of a norm and of a product with an FP8 weight, where those have kernels."""
    for M in ROWS:
        yield Call(rms_norm, "norm", M, 0, functools.partial(_norm, M), 8 * M * WIDTH, tolerance=1e-6)
    for M in ROWS if any(k.name == "triton" for k in linear.kernels) else ():
        size = OUTPUTS * WIDTH + 4 * M * (WIDTH + OUTPUTS)
        yield Call(linear, "fp8", M, 0, functools.partial(_product, M), size, 2 * M * OUTPUTS * WIDTH, "fp8", 1e-5)


def _norm(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, WIDTH, device=device), torch.randn(WIDTH, device=device), 1e-6), {}


def _product(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    data, scale = FORMATS["fp8"].quantize(torch.randn(OUTPUTS, WIDTH) * WIDTH**-0.5)
    weight = QuantTensor("fp8", data.to(device), scale.to(device))
    return (torch.randn(M, WIDTH, device=device), weight, round_activation), {}
