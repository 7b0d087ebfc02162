"""Affinities by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops import route as ops


def affinity(logit_TE: Tensor) -> Tensor:
    """As the definition, for float32 logits."""
    logit_TE = logit_TE.contiguous()
    out = torch.empty_like(logit_TE)
    native.library().affinity(logit_TE.data_ptr(), out.data_ptr(), out.numel())
    return out


MAX_EXPERTS = 4096  # what the kernel keeps on its stack


def route(
    x_TD: Tensor, gate_ED: Tensor, choice: Tensor, num_chosen: int, scale: float, position_T: Tensor
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 x."""
    (T, D), (E, width) = x_TD.shape, gate_ED.shape
    if E > MAX_EXPERTS or num_chosen > E:
        return ops.route.definition(x_TD, gate_ED, choice, num_chosen, scale, position_T)  # type: ignore[no-any-return]
    if width != D:  # memory past a row must never be read
        raise RuntimeError(f"rows of {D} were given to a gate of {width} inputs")
    x_TD, choice, position_T = x_TD.contiguous(), choice.contiguous(), position_T.contiguous()
    expert_TK, weight_TK = position_T.new_empty(T, num_chosen), x_TD.new_empty(T, num_chosen)
    gate, held = native.weight(gate_ED)
    by_score = choice.is_floating_point()
    at = choice.data_ptr()
    native.library().route(
        x_TD.data_ptr(), T, gate, at if by_score else 0, 0 if by_score else at, position_T.data_ptr(), num_chosen,
        scale, expert_TK.data_ptr(), weight_TK.data_ptr(), native.threads(),
    )  # fmt: skip
    del held
    return expert_TK, weight_TK
