"""Attention of each token over the rows chosen for it, in mergeable parts.

Shape letters: T tokens, H heads, C head dim, K rows per token, N rows at hand.
One row serves as key and value of every head (multi-query).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.rope import rope
from pyrosome.ops.rows import NARROW, RowSource
from pyrosome.ops.seam import Op
from pyrosome.quant.activation import straight_through

# Keys are summed in splits of this many, in order.  A split of a shape that never changes keeps the
# order of additions a function of the position alone, whatever else is in the step.
SPLIT_ROWS = 128
# Gathered elements held at once, small enough to stay in a CPU's last cache.
TILE_ELEMENTS = 1 << 20


@Op
def sparse_attention(q_THC: Tensor, source: RowSource, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [T, H, C] over rows `index_TK` of `source`; -1 is no row.

    Returns (o [T, H, C], lse [T, H]) in promote(q, float32), without the sink: parts merge in
    `finish_attention`.  A token with no rows gives o = 0 and lse = -inf.  Scale is 1 / sqrt(C)
    (official inference code: one scale for all keys).  Over narrow rows q and the softmax's weights are rounded to
    bfloat16 (`ops.rows.NARROW`).
    """
    T, H, C = q_THC.shape
    wide = torch.promote_types(q_THC.dtype, torch.float32)
    K = index_TK.shape[1]
    if K == 0 or T == 0:
        return q_THC.new_zeros(T, H, C, dtype=wide), q_THC.new_full((T, H), float("-inf"), dtype=wide)
    rows_NC, flat_TK = source.read(index_TK)
    narrow = source.format in NARROW
    rows_NC, q_THC = rows_NC.to(wide), _rounded(q_THC, narrow).to(wide) * C**-0.5
    tile = max(1, TILE_ELEMENTS // (min(K, SPLIT_ROWS) * C))
    parts = [
        _attend(q_THC[t : t + tile], rows_NC, flat_TK[t : t + tile], index_TK[t : t + tile] >= 0, narrow)
        for t in range(0, T, tile)
    ]
    return (parts[0]) if len(parts) == 1 else (torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts]))


def _rounded(x: Tensor, narrow: bool) -> Tensor:
    return straight_through(x, lambda x: x.to(torch.bfloat16).to(x.dtype)) if narrow else x


def _attend(q_THC: Tensor, rows_NC: Tensor, flat_TK: Tensor, real_TK: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """One tile of tokens: splits of keys one after the other, with a running maximum."""
    o_THC, lse_TH = _split(q_THC, rows_NC, flat_TK[:, :SPLIT_ROWS], real_TK[:, :SPLIT_ROWS], narrow)
    for k in range(SPLIT_ROWS, flat_TK.shape[1], SPLIT_ROWS):
        o, lse = _split(q_THC, rows_NC, flat_TK[:, k : k + SPLIT_ROWS], real_TK[:, k : k + SPLIT_ROWS], narrow)
        o_THC, lse_TH = merge(o_THC, lse_TH, o, lse)
    return o_THC, lse_TH


def _split(q_THC: Tensor, rows_NC: Tensor, flat_TK: Tensor, real_TK: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    T, K = flat_TK.shape
    rows_TKC = rows_NC.index_select(0, flat_TK.flatten()).unflatten(0, (T, K))
    score_THK = torch.bmm(q_THC, rows_TKC.transpose(1, 2)).masked_fill(~real_TK[:, None], float("-inf"))
    # A row of -inf alone would make the softmax NaN: shift by a finite maximum instead.
    top_TH1 = score_THK.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q_THC.dtype).min)
    p_THK = (score_THK - top_TH1).exp()
    mass_TH1 = p_THK.sum(-1, keepdim=True)
    o_THC = torch.bmm(_rounded(p_THK, narrow), rows_TKC) / mass_TH1.clamp(min=torch.finfo(q_THC.dtype).tiny)
    return o_THC, _log_mass(mass_TH1[..., 0], top_TH1[..., 0])


def _log_mass(mass: Tensor, top: Tensor) -> Tensor:
    """log(mass) + top, and -inf for no mass, with a gradient that is finite there too."""
    return torch.where(mass == 0, float("-inf"), mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + top)


def merge(o_THC: Tensor, lse_TH: Tensor, other_THC: Tensor, other_lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial attentions over disjoint rows, as one.  A part with lse = -inf changes no bit."""
    lowest = torch.finfo(lse_TH.dtype).min
    top_TH = torch.maximum(lse_TH, other_lse_TH).detach().clamp(min=lowest)
    both_TH = _log_mass((lse_TH - top_TH).exp() + (other_lse_TH - top_TH).exp(), top_TH)
    safe_TH = both_TH.clamp(min=lowest)
    share, other_share = (lse_TH - safe_TH).exp(), (other_lse_TH - safe_TH).exp()
    return o_THC * share[..., None] + other_THC * other_share[..., None], both_TH


@Op
def finish_attention(sink_H: Tensor, rotation_TF: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge parts (o [T, H, C], lse [T, H]), let each head's sink take its mass, turn the rotary channels back.

    The sink is a learned logit with value zero: it enters the denominator only.  The inverse rotation at
    the query's position makes the values' absolute rotation relative (official inference code).
    """
    o_THC, lse_TH = parts[0]
    for o, lse in parts[1:]:
        o_THC, lse_TH = merge(o_THC, lse_TH, o, lse)
    kept_TH = torch.sigmoid(lse_TH - sink_H)  # exp(lse) / (exp(lse) + exp(sink))
    return rope(o_THC * kept_TH[..., None], rotation_TF, inverse=True)


@Op
def attention(q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor) -> Tensor:
    """Attention of q [T, H, C] over all parts (source, index [T, K]), with the sink and the rotation back.

    Over narrow rows the result is rounded to bfloat16 too, as the official kernel's is.
    """
    held = [sparse_attention(q_THC, source, index_TK) for source, index_TK in parts]
    out_THC = finish_attention(sink_H, rotation_TF, held)
    return _rounded(out_THC, all(source.format in NARROW for source, _ in parts))


@Op
def watched_attention(
    q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor
) -> tuple[Tensor, Tensor]:
    """`attention`, and how much of it goes to each row of the last part: the sum over heads [T, K], without gradient.

    It is what an indexer learns to foresee (DeepSeek-V3.2 report, the indexer's target).
    """
    out_THC = attention(q_THC, parts, sink_H, rotation_TF)
    with torch.no_grad():
        wide = torch.promote_types(q_THC.dtype, torch.float32)
        all_TH = sink_H.to(wide).expand(q_THC.shape[:2])
        for source, index_TK in parts:
            all_TH = torch.logaddexp(all_TH, sparse_attention.definition(q_THC, source, index_TK)[1])
        source, index_TK = parts[-1]
        if index_TK.shape[1] == 0:
            return out_THC, all_TH.new_zeros(index_TK.shape)
        rows_NC, flat_TK = source.read(index_TK)
        narrow = source.format in NARROW
        q_THC = _rounded(q_THC, narrow).to(wide) * q_THC.shape[2] ** -0.5
        tile = max(1, TILE_ELEMENTS // (index_TK.shape[1] * q_THC.shape[2]))
        masses = []
        for t in range(0, q_THC.shape[0], tile):
            at = slice(t, t + tile)
            score_THK = torch.bmm(q_THC[at], rows_NC.to(wide)[flat_TK[at]].transpose(1, 2))
            masses.append((score_THK - all_TH[at, :, None]).exp().sum(1))
        return out_THC, torch.cat(masses).masked_fill(index_TK < 0, 0.0)


native.kernel(attention)
gpu.kernel(attention)
native.training_kernel(attention)
native.training_kernel(watched_attention)
native.kernel(sparse_attention, any_format=True)  # a source decodes its rows
gpu.kernel(sparse_attention, any_format=True)
native.kernel(finish_attention)
gpu.kernel(finish_attention)
