"""Calls of `rotation`, `rope`, `norm_rope` and `index_rows`: 64 heads of 512 channels, 64 index heads of 128."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops.rope import frequencies, index_rows, norm_rope, rope, rotation
from pyrosome.quant import round_index, round_kv, unchanged
from pyrosome.testing.calls import Call

HEADS, WIDTH, TURNED = 64, 512, 64
INDEX_HEADS, INDEX_WIDTH = 64, 128
TOKENS = (1, 4, 16, 64, 512, 4096)


def calls() -> list[Call]:
    """Queries and rows of decode steps and of prompts."""
    found = []
    for M in TOKENS:
        found += [
            Call(rotation, "turns of tokens", M, 0, functools.partial(_angles, M), M * (8 + 4 * TURNED)),
            Call(norm_rope, "queries", M, 0, functools.partial(_queries, M), 8 * M * HEADS * WIDTH),
            Call(norm_rope, "rows", M, 0, functools.partial(_rows, M, True), 8 * M * WIDTH),
            Call(index_rows, "queries", M, 0, functools.partial(_index, M, True), 8 * M * INDEX_HEADS * INDEX_WIDTH),
            Call(index_rows, "keys", M, 0, functools.partial(_index, M, False), 8 * M * INDEX_WIDTH),
        ]
    found += [
        Call(norm_rope, "rows, exact", 16, 0, functools.partial(_rows, 16, False), 8 * 16 * WIDTH),
        Call(rope, "outputs turned back", 16, 0, functools.partial(_outputs, 16), 8 * 16 * HEADS * WIDTH),
    ]
    return found


def turns(M: int, device: torch.device) -> Tensor:
    """Unit complex numbers [M, 32]."""
    angle = torch.randn(M, TURNED // 2, device=device)
    return torch.polar(torch.ones_like(angle), angle)


def _angles(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position = torch.arange(M, device=device) + 1_000_000
    return (frequencies(160000.0, TURNED, None).to(device), position), {}


def _queries(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, HEADS, WIDTH, device=device), None, turns(M, device), 1e-6), {}


def _rows(M: int, rounds: bool, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = torch.randn(WIDTH, device=device)
    x = torch.randn(M, WIDTH, device=device)
    return (x, weight, turns(M, device), 1e-6, round_kv if rounds else unchanged), {}


def _index(M: int, is_query: bool, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if is_query:
        return (torch.randn(M, INDEX_HEADS, INDEX_WIDTH, device=device), turns(M, device), round_index), {}
    return (torch.randn(M, INDEX_WIDTH, device=device), None, round_index), {}


def _outputs(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, HEADS, WIDTH, device=device), turns(M, device), True), {}
