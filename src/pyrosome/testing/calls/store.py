"""Calls of `store_rows` and `as_stored`: window rows, compressed rows, index keys, and the compressors' tails."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrosome.ops.store import as_stored, store_rows
from pyrosome.quant.rows import FloatRows, FP4IndexRows, FP8KVRows, RowFormat
from pyrosome.testing.calls import Call

TOKENS = (1, 4, 16, 64, 512, 4096)
KV, INDEX = FP8KVRows(448, 64), FP4IndexRows(128)
F32, BF16 = FloatRows("f32", torch.float32), FloatRows("bf16", torch.bfloat16)
# name, format, channels
STORED: tuple[tuple[str, RowFormat, int], ...] = (
    ("KV rows", KV, 512), ("index keys", INDEX, 128), ("CSA tail", F32, 1024), ("HCA tail", F32, 512),
    ("index tail", F32, 256),
)  # fmt: skip


def calls() -> list[Call]:
    """Rows of decode steps and of prompts, each to a place of its own."""
    found = [_store(name, row_format, C, M) for name, row_format, C in STORED for M in TOKENS]
    found += [_as_stored("KV rows", KV, 512, M) for M in TOKENS]
    return [
        *found,
        _store("KV rows, bf16", BF16, 512, 16),
        _as_stored("KV rows, bf16", BF16, 512, 16),
        _as_stored("index keys", INDEX, 128, 16),
    ]


def _store(name: str, row_format: RowFormat, C: int, M: int) -> Call:
    stored = sum(n * dtype.itemsize for dtype, n in row_format.planes(C))
    make = functools.partial(_arguments, row_format, C, M)
    return Call(store_rows, name, M, 0, make, M * (4 * C + 8 + stored), tolerance=0.0)


def _as_stored(name: str, row_format: RowFormat, C: int, M: int) -> Call:
    def make(device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(M, C, device=device), row_format), {}

    return Call(as_stored, name, M, 0, make, 8 * M * C, tolerance=0.0)


def _arguments(row_format: RowFormat, C: int, M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    places = M + 1  # the first is nobody's
    planes = tuple(torch.zeros(places, n, dtype=dtype, device=device) for dtype, n in row_format.planes(C))
    return (torch.randn(M, C, device=device), planes, row_format, torch.arange(M, device=device).flip(0) + 1), {}
