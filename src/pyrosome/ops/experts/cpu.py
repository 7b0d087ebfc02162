"""Experts by the native library: pairs sorted by expert there, so that each expert's weights are read once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import experts as ops
from pyrosome.ops import native, workspace
from pyrosome.ops.experts import ExpertWeights
from pyrosome.quant import QuantTensor, round_activation, unchanged


def routed_experts(x_TD: Tensor, bank: ExpertWeights, expert_TK: Tensor, weight_TK: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 x.

    Raises:
        IndexError: a token was routed to an expert there is not.
    """
    if not _is_told(bank):
        return ops.routed_experts.definition(x_TD, bank, expert_TK, weight_TK, limit)  # type: ignore[no-any-return]
    lib, (T, K), (E, D) = native.library(), expert_TK.shape, (bank.w1.shape[0], bank.w1.shape[-1])
    _check_width(x_TD, D)
    expert_TK, weight_TK, x_TD = expert_TK.contiguous(), weight_TK.float().contiguous(), x_TD.contiguous()
    (w1, kept1), (w3, kept3), (w2, kept2) = native.weight(bank.w1), native.weight(bank.w3), native.weight(bank.w2)
    y_TD = workspace.empty(T, D, like=x_TD)
    bad = lib.routed_experts(
        x_TD.data_ptr(), T, K, expert_TK.data_ptr(), bank.first, E, bank.total, weight_TK.data_ptr(), w1, w3, w2,
        y_TD.data_ptr(), limit, bank.prepare is round_activation, native.threads(),
    )  # fmt: skip
    del kept1, kept3, kept2
    if bad:
        raise IndexError(f"a token was routed to expert {expert_TK.flatten()[-1 - bad]} of {bank.total}")
    return y_TD


def shared_expert(x_TD: Tensor, expert: ExpertWeights, limit: float, onto_TD: Tensor | None = None) -> Tensor:
    """As the definition, for float32 x."""
    if not _is_told(expert):
        return ops.shared_expert.definition(x_TD, expert, limit, onto_TD)  # type: ignore[no-any-return]
    _check_width(x_TD, expert.w1.shape[-1])
    x_TD = x_TD.contiguous()
    y_TD, onto_TD = workspace.empty_like(x_TD), None if onto_TD is None else onto_TD.contiguous()
    (w1, kept1), (w3, kept3), (w2, kept2) = native.weight(expert.w1), native.weight(expert.w3), native.weight(expert.w2)
    native.library().shared_expert(
        x_TD.data_ptr(), x_TD.shape[0], w1, w3, w2, native.address(onto_TD), y_TD.data_ptr(), limit,
        expert.prepare is round_activation, native.threads(),
    )  # fmt: skip
    del kept1, kept3, kept2
    return y_TD


def _is_told(weights: ExpertWeights) -> bool:
    """Whether the library rounds as these ask: in front of stored weights alone, and unpacked ones keep asking."""
    stored = all(isinstance(w, QuantTensor) for w in (weights.w1, weights.w3, weights.w2))
    return weights.prepare is unchanged or (weights.prepare is round_activation and stored)


def _check_width(x_TD: Tensor, D: int) -> None:
    if x_TD.shape[1] != D:  # memory past a row must never be read
        raise RuntimeError(f"rows of {x_TD.shape[1]} were given to experts of {D} inputs")


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 inputs."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.library().swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(), limit)
    return out
