"""Feed-forward experts: one for all tokens (shared), many for the tokens routed to each.

A token's experts are added as a tree over 8 virtual shards: expert e of E is of shard e 8 // E, a shard's experts are
added in ascending order, and shards by `dist.tree_sum`.  So a rank that holds whole shards has a subtree of the sum.
Shape letters: T tokens, K experts per token, N = T K routed pairs, G tiles, M rows per tile,
E experts, S virtual shards, D model dim, I intermediate dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.dist import VIRTUAL_SHARDS, tree_sum
from pyrosome.ops import gpu, native
from pyrosome.ops.linear import Prepare, dense, linear
from pyrosome.ops.seam import Op
from pyrosome.quant import QuantTensor

# Expert weights copied out of the bank at once, in elements, while gradients are off.
TILE_ELEMENTS = 1 << 21
MAX_TILE_ROWS = 256


class ExpertWeights(NamedTuple):
    """Experts of a layer, all or a run of them: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I], as stored."""

    w1: Tensor | QuantTensor
    w3: Tensor | QuantTensor
    w2: Tensor | QuantTensor
    prepare: Prepare
    first: int = 0  # which of the layer's experts the stacks begin with
    num_in_layer: int = 0  # 0: the stacks hold them all

    @property
    def total(self) -> int:
        """Experts of the layer, held here or elsewhere."""
        return self.num_in_layer or self.w1.shape[0]


@Op
def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) x clamp(up, -limit, limit): the gate is clamped from above only (official code)."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


@Op
def routed_experts(x_TD: Tensor, bank: ExpertWeights, expert_TK: Tensor, weight_TK: Tensor, limit: float) -> Tensor:
    """Sum over each token's experts of W2 (weight x swiglu(W1 x, W3 x)), [T, D] in promote(x, float32).

    The weight multiplies before W2, and before its input is quantised (official inference code).
    Pairs are sorted by expert and laid out in tiles of one expert each, whose number has a static bound:
    nothing is read back to learn how many tokens an expert got.  `expert_TK` -1 is no expert, and an expert that
    the bank does not hold adds nothing.
    """
    (T, K), D, E = expert_TK.shape, x_TD.shape[1], bank.w1.shape[0]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    if E == 0:
        return x_TD.new_zeros(T, D, dtype=wide)
    shard_TK = expert_TK.clamp(min=0) * VIRTUAL_SHARDS // bank.total
    expert_TK, rank_TK = held(expert_TK, bank).sort(dim=1, stable=True)
    shard_TK, weight_TK = shard_TK.gather(1, rank_TK), weight_TK.gather(1, rank_TK)
    M = min(MAX_TILE_ROWS, 1 << max(0, (T * K // E).bit_length() - 1))
    plan = _tiles(expert_TK, E, M)
    prepared_TD = bank.prepare(x_TD).to(wide)
    weight_N = weight_TK.to(wide).flatten()
    G = plan.expert_G.shape[0]
    at_once = max(1, G) if torch.is_grad_enabled() else max(1, TILE_ELEMENTS // (3 * D * bank.w1.shape[1]))
    outs = []
    for g in range(0, G, at_once):
        tile = slice(g, g + at_once)
        pair_GM, expert_G = plan.pair_GM[tile], plan.expert_G[tile]
        real_GM1 = (pair_GM >= 0)[..., None]
        pair_GM = pair_GM.clamp(min=0)
        x_GMD = prepared_TD[pair_GM // K]
        gate = torch.bmm(x_GMD, _pick(bank.w1, expert_G, wide).transpose(1, 2))
        up = torch.bmm(x_GMD, _pick(bank.w3, expert_G, wide).transpose(1, 2))
        h = clamped_swiglu(gate, up, limit) * weight_N[pair_GM][..., None] * real_GM1
        outs.append(torch.bmm(bank.prepare(h), _pick(bank.w2, expert_G, wide).transpose(1, 2)).flatten(0, 1))
    out_RD = torch.cat([*outs, prepared_TD.new_zeros(1, D)])
    return _combine(out_RD, plan.place_TK, shard_TK)


@Op
def shared_expert(x_TD: Tensor, expert: ExpertWeights, limit: float, onto_TD: Tensor | None = None) -> Tensor:
    """W2 swiglu(W1 x, W3 x), [T, D]: the expert every token visits with weight 1; added to `onto_TD` where given."""
    gate = linear(x_TD, expert.w1, expert.prepare)
    up = linear(x_TD, expert.w3, expert.prepare)
    out_TD = linear(clamped_swiglu(gate, up, limit), expert.w2, expert.prepare)
    return out_TD if onto_TD is None else onto_TD + out_TD


def held(expert_TK: Tensor, bank: ExpertWeights) -> Tensor:
    """Where each expert stands in the bank's stacks; -1 for none and for one held elsewhere."""
    place_TK = expert_TK - bank.first
    return place_TK.masked_fill((expert_TK < 0) | (place_TK < 0) | (place_TK >= bank.w1.shape[0]), -1)


def _combine(out_RD: Tensor, place_TK: Tensor, shard_TK: Tensor) -> Tensor:
    """Sum [T, D] of each token's rows of `out_RD`: each added to its shard in the order given, then the shards."""
    (T, K), D = place_TK.shape, out_RD.shape[1]
    tile = max(1, T) if torch.is_grad_enabled() else max(1, TILE_ELEMENTS // (VIRTUAL_SHARDS * D))
    parts = []
    for t in range(0, max(1, T), tile):
        place_K, shard_K = place_TK[t : t + tile].unbind(1), shard_TK[t : t + tile].unbind(1)
        token_T = torch.arange(len(place_K[0]), device=out_RD.device)
        sum_ND = out_RD.new_zeros(VIRTUAL_SHARDS * len(token_T), D)
        for k in range(K):  # one row of each token at a time: no order is left open
            sum_ND.index_add_(0, shard_K[k] * len(token_T) + token_T, out_RD[place_K[k]])
        parts.append(tree_sum(sum_ND.unflatten(0, (VIRTUAL_SHARDS, len(token_T)))))
    return torch.cat(parts)


class _Tiles(NamedTuple):
    pair_GM: Tensor  # which routed pair (t K + k) each tile row computes, -1 for none
    expert_G: Tensor  # which expert each tile uses
    place_TK: Tensor  # tile row that holds each pair; one past the last for a pair without an expert


def _tiles(expert_TK: Tensor, num_experts: int, rows: int) -> _Tiles:
    N, E, M = expert_TK.numel(), num_experts, rows
    expert_N = expert_TK.flatten()
    pair_N = torch.arange(N, device=expert_N.device)
    if M == 1:  # a tile for each pair, in the pairs' own order
        real_N = expert_N >= 0
        place_TK = torch.where(real_N, pair_N, N).view(expert_TK.shape)
        return _Tiles(torch.where(real_N, pair_N, -1)[:, None], expert_N.clamp(min=0), place_TK)
    G = N // M + E
    expert_N = torch.where(expert_N < 0, E, expert_N)
    order_N = torch.argsort(expert_N, stable=True)
    sorted_N = expert_N[order_N]
    count_E = torch.zeros(E + 1, dtype=torch.int64, device=expert_N.device).scatter_add(
        0, expert_N, torch.ones_like(expert_N)
    )
    tiles_E = (count_E + M - 1) // M
    first_row_E = (tiles_E.cumsum(0) - tiles_E) * M
    rank_N = pair_N - (count_E.cumsum(0) - count_E)[sorted_N]
    place_N = torch.where(sorted_N < E, first_row_E[sorted_N] + rank_N, G * M)
    pair_R = torch.full((G * M + 1,), -1, dtype=torch.int64, device=expert_N.device).scatter(0, place_N, order_N)
    expert_G = torch.searchsorted(tiles_E[:E].cumsum(0), torch.arange(G, device=expert_N.device), right=True)
    place_TK = torch.empty_like(place_N).scatter(0, order_N, place_N).view(expert_TK.shape)
    return _Tiles(pair_R[:-1].view(G, M), expert_G.clamp(max=E - 1), place_TK)


def _pick(weight: Tensor | QuantTensor, expert_G: Tensor, dtype: torch.dtype) -> Tensor:
    picked = weight.index_select(expert_G) if isinstance(weight, QuantTensor) else weight.index_select(0, expert_G)
    return dense(picked, dtype)


native.kernel(routed_experts)
gpu.kernel(routed_experts)
native.training_kernel(routed_experts)
native.kernel(shared_expert)
gpu.kernel(shared_expert)
native.training_kernel(shared_expert)
native.kernel(clamped_swiglu)
gpu.kernel(clamped_swiglu)
