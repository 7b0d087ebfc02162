"""`routed_experts` by the native library: pairs sorted by expert there, so that each expert's weights are read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrosome.ops import native

if TYPE_CHECKING:
    from pyrosome.ops.experts import ExpertWeights


def routed_experts(x_TD: Tensor, bank: ExpertWeights, expert_TK: Tensor, weight_TK: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 x.

    Raises:
        IndexError: a token was routed to an expert there is not.
    """
    lib, threads = native.library(), native.threads()
    (T, K), (E, inner, D) = expert_TK.shape, bank.w1.shape
    expert_TK, weight_TK = expert_TK.contiguous(), weight_TK.float().contiguous()
    order, first = expert_TK.new_empty(T * K), expert_TK.new_empty(E + 1)
    num_pairs = lib.pyrosome_experts_plan(
        expert_TK.data_ptr(), T * K, bank.first, E, bank.total, order.data_ptr(), first.data_ptr()
    )
    if num_pairs < 0:
        raise IndexError(f"a token was routed to expert {expert_TK.flatten()[-1 - num_pairs]} of {bank.total}")
    if num_pairs == 0:
        return x_TD.new_zeros(T, D)
    (kind1, w1, s1), (kind3, w3, s3), (kind2, w2, s2) = map(native.stored, (bank.w1, bank.w3, bank.w2))
    x_TD = bank.prepare(x_TD).contiguous()
    h_RI = x_TD.new_empty(num_pairs, inner)
    lib.pyrosome_experts_up(
        x_TD.data_ptr(), K, order.data_ptr(), first.data_ptr(), E, weight_TK.data_ptr(), kind1, w1.data_ptr(),
        native.address(s1), kind3, w3.data_ptr(), native.address(s3), h_RI.data_ptr(), D, inner, limit, threads,
    )  # fmt: skip
    h_RI = bank.prepare(h_RI).contiguous()
    y_TD = x_TD.new_empty(T, D)
    lib.pyrosome_experts_down(
        h_RI.data_ptr(), T, K, order.data_ptr(), first.data_ptr(), bank.first, E, bank.total, kind2, w2.data_ptr(),
        native.address(s2), y_TD.data_ptr(), D, inner, threads,
    )  # fmt: skip
    return y_TD


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 inputs."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.library().pyrosome_swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(), limit)
    return out
