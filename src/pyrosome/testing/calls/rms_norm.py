"""Calls of `rms_norm`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrosome.ops.rms_norm import rms_norm
from pyrosome.testing.calls import Call

WIDTH = 4096


def calls() -> list[Call]:
    """The final norm, of one token and of many."""
    return [Call(rms_norm, "norm", M, 0, functools.partial(_arguments, M), 8 * M * WIDTH) for M in (1, 16, 4096)]


def _arguments(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, WIDTH, device=device), torch.randn(WIDTH, device=device), 1e-6), {}
