"""Calls of `choose_tokens`: one row, and a batch of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops.sample.batch import choose_tokens
from pyrosome.testing.calls import Call

V = 129_280
FILTERS = {
    "greedy": (), "draw": (), "min-p": ("min_p",), "top-p": ("top_p",), "all filters": ("top_k", "top_p", "min_p"),
}  # fmt: skip


def calls() -> list[Call]:
    """The best token, a draw of all, and draws of what filters leave."""
    return [
        Call(choose_tokens, name, N, 0, functools.partial(_arguments, name, N), 4 * N * V, tolerance=0.0)
        for name in FILTERS
        for N in (1, 16, 64)
    ]


def _arguments(name: str, N: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    logits_NV = 3 * torch.randn(N, V, device=device)
    if name == "greedy":
        return (logits_NV,), {}

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((N,), value, dtype=dtype, device=device)

    asked = {
        "top_k": column(64, torch.int64),
        "top_p": column(0.95, torch.float64),
        "min_p": column(0.01, torch.float64),
    }
    filters = [asked[f] if f in FILTERS[name] else None for f in asked]
    number = torch.arange(N, device=device)
    return (logits_NV, column(1.0, torch.float64), *filters, number, number + 1000), {}
