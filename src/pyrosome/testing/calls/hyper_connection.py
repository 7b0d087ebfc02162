"""Calls of the hyper-connections' ops."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_in,
    hyper_connection_out,
    hyper_connection_turn,
)
from pyrosome.ops.seam import Op
from pyrosome.testing.calls import Call

J, D, N = 4, 4096, 24
EPS, ITERS = 1e-6, 20


def calls() -> list[Call]:
    """A layer's beginning, its turn from attention to experts, its end, and the collapse before the head."""
    made = []
    for M in (1, 16, 64, 512, 4096):
        row = 4 * M * D
        made += [
            _call(hyper_connection_in, "in", M, (1 + J) * row, N),
            _call(hyper_connection_turn, "turn", M, (2 + 2 * J) * row, N),
            _call(hyper_connection_out, "out", M, (1 + 2 * J) * row, 0),
        ]
    return [*made, *(_call(hyper_connection_head, "head", M, (1 + J) * 4 * M * D, J) for M in (1, 16))]


def _call(op: Op, name: str, M: int, row_bytes: int, num_rows: int) -> Call:
    make = functools.partial(_arguments, name, M)
    mixes = 4 * num_rows * J * D
    return Call(op, name, M, 0, make, row_bytes + mixes, 2 * M * num_rows * J * D, "f32", tolerance=1e-5)


def _arguments(name: str, M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    num_rows = J if name == "head" else N
    weights = draw(num_rows, J * D) / (J * D) ** 0.5, draw(num_rows), draw(1 if name == "head" else 3)
    out = draw(M, D), draw(M, J), draw(M, J, J).softmax(1)
    arguments: dict[str, tuple[Any, ...]] = {
        "head": (*weights, EPS, EPS),
        "in": (*weights, EPS, EPS, ITERS, draw(D)),
        "turn": (*out, *weights, EPS, EPS, ITERS, draw(D)),
        "out": out,
    }
    return (draw(M, J, D), *arguments[name]), {}
