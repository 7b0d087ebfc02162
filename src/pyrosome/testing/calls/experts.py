"""Calls of `routed_experts`, `shared_expert` and `clamped_swiglu`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrosome.ops.experts import ExpertWeights, clamped_swiglu, routed_experts, shared_expert
from pyrosome.ops.linear import Prepare
from pyrosome.quant import QuantTensor, round_activation, unchanged
from pyrosome.testing.calls import Call
from pyrosome.testing.coded import coded

NUM_EXPERTS, PER_TOKEN, HIDDEN, INNER, LIMIT = 256, 6, 4096, 2048, 10.0
_VALUES = 3 * HIDDEN * INNER  # of an expert
_FP4_BYTES, _FP8_BYTES = _VALUES // 2 + _VALUES // 32, _VALUES + _VALUES // (128 * 128)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def calls() -> list[Call]:
    """As checkpoints store experts, and one call each of what `exact` numerics ask: nothing is rounded."""
    found = [_routed("routed", M, round_activation) for M in (1, 2, 4, 8, 16, 64, 512, 4096, 8192)]
    found += [_shared("shared", M, round_activation) for M in (1, 16, 64, 512, 4096)]
    found += [_routed("routed, unrounded", 512, unchanged), _shared("shared, unrounded", 16, unchanged)]
    swiglu = functools.partial(_halves, 4096)
    return [*found, Call(clamped_swiglu, "swiglu", 4096, 0, swiglu, 12 * 4096 * INNER, tolerance=1e-6)]


def _routed(name: str, M: int, prepare: Prepare) -> Call:
    # Experts are drawn alike: each is missed by a token with probability 1 - K / E, and read once if any asks for it.
    read = NUM_EXPERTS * (1 - (1 - PER_TOKEN / NUM_EXPERTS) ** M)
    num_bytes = round(read * _FP4_BYTES) + 8 * M * HIDDEN
    make = functools.partial(_routed_arguments, M, prepare)
    return Call(routed_experts, name, M, 0, make, num_bytes, 2 * M * PER_TOKEN * _VALUES, "bf16")


def _shared(name: str, M: int, prepare: Prepare) -> Call:
    make = functools.partial(_shared_arguments, M, prepare)
    return Call(shared_expert, name, M, 0, make, _FP8_BYTES + 12 * M * HIDDEN, 2 * M * _VALUES, "bf16")


def _routed_arguments(M: int, prepare: Prepare, device: torch.device) -> Arguments:
    bank = _experts("fp4", (NUM_EXPERTS,), prepare, device)
    expert_TK = torch.rand(M, NUM_EXPERTS, device=device).topk(PER_TOKEN).indices
    weight_TK = torch.rand(M, PER_TOKEN, device=device)
    return (torch.randn(M, HIDDEN, device=device), bank, expert_TK, weight_TK, LIMIT), {}


def _shared_arguments(M: int, prepare: Prepare, device: torch.device) -> Arguments:
    x_TD, onto_TD = torch.randn(M, HIDDEN, device=device), torch.randn(M, HIDDEN, device=device)
    return (x_TD, _experts("fp8", (), prepare, device), LIMIT, onto_TD), {}


def _halves(M: int, device: torch.device) -> Arguments:
    return (torch.randn(M, INNER, device=device) * 8, torch.randn(M, INNER, device=device) * 8, LIMIT), {}


def _experts(kind: str, lead: tuple[int, ...], prepare: Prepare, device: torch.device) -> ExpertWeights:
    """Codes at random under scales that bring values near 1 / 64."""

    def stored(*shape: int) -> QuantTensor:
        return coded(kind, (*lead, *shape), device)

    return ExpertWeights(stored(INNER, HIDDEN), stored(INNER, HIDDEN), stored(HIDDEN, INNER), prepare)
