"""Calls of `route` and `affinity`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrosome.ops.route import affinity, route
from pyrosome.testing.calls import Call

D, E, K = 4096, 256, 6


def calls() -> list[Call]:
    """A layer's routing by score and by token id, and the affinities alone."""
    made = []
    for M in (1, 16, 64, 512, 4096):
        num_bytes, flops = 4 * M * D + 4 * E * D + 12 * M * K, 2 * M * E * D
        made += [
            Call(route, name, M, 0, functools.partial(_arguments, name, M), num_bytes, flops, "f32", tolerance=1e-5)
            for name in ("by score", "by id")
        ]
    return [*made, *(Call(affinity, "affinity", M, 0, functools.partial(_logits, M), 8 * M * E) for M in (1, 4096))]


def _arguments(name: str, M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gate = torch.randn(E, D, device=device) / D**0.5  # the network holds it in float32
    choice = torch.randn(E, device=device) / 10
    if name == "by id":
        choice = torch.arange(M * K, device=device).view(M, K) * 7 % E
    return (torch.randn(M, D, device=device), gate, choice, K, 1.5, torch.arange(M, device=device)), {}


def _logits(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, E, device=device),), {}
