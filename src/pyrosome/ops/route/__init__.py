"""Which experts get a token, and with what weight.

Shape letters: T tokens, E routed experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.index_topk import rank_index, rank_key
from pyrosome.ops.linear import linear
from pyrosome.ops.seam import Op


@Op
def route_scores(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Affinities s = sqrt(softplus(W_g x)), [T, E] in promote(x, float32) (DeepSeek-V4 report, MoE)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):  # who is chosen must not hang on a rounded product
        return affinity(linear(x_TD.to(wide), gate_ED))  # type: ignore[no-any-return]


@Op
def affinity(logit_TE: Tensor) -> Tensor:
    """sqrt(softplus(x)), elementwise."""
    return F.softplus(logit_TE).sqrt()


def choose_experts(score_TE: Tensor, bias_E: Tensor, num_chosen: int) -> Tensor:
    """The `num_chosen` experts of highest score + bias, int64 [T, K] in ascending order; ties to the lowest id.

    The bias balances load and is used for selection only.
    """
    rank_TE = rank_key(score_TE.detach() + bias_E, torch.arange(score_TE.shape[1], device=score_TE.device))
    return rank_index(rank_TE.topk(num_chosen, dim=1, sorted=False).values).sort(dim=1).values


def expert_weights(score_TE: Tensor, expert_TK: Tensor, scale: float) -> Tensor:
    """Weights [T, K]: the chosen experts' unbiased scores, normalised to sum to `scale`."""
    chosen_TK = score_TE.gather(1, expert_TK)
    return chosen_TK / chosen_TK.sum(1, keepdim=True) * scale


@Op
def route(
    x_TD: Tensor, gate_ED: Tensor, choice: Tensor, num_chosen: int, scale: float, position_T: Tensor
) -> tuple[Tensor, Tensor]:
    """(expert [T, K], weight [T, K]) of every token; a token of negative position (padding) visits nobody: -1.

    Args:
        choice: float [E], the balancing bias of a choice by score; or int64 [T, K], the experts themselves.
    """
    score_TE = route_scores(x_TD, gate_ED)
    expert_TK = choose_experts(score_TE, choice, num_chosen) if choice.is_floating_point() else choice
    weight_TK = expert_weights(score_TE, expert_TK, scale)
    return torch.where(position_T[:, None] >= 0, expert_TK, -1), weight_TK


native.kernel(affinity)
gpu.kernel(affinity)
native.kernel(route)
gpu.kernel(route)
