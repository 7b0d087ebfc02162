"""The lightning indexer: score every visible compressed row, keep the best.

Shape letters: T tokens, H index heads, C index head dim, N rows scored at once, K rows kept, B spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.rows import RowSource
from pyrosome.ops.seam import Op

# Rows whose scores are held at once, and elements of one product: streaming bounds memory at any context.
TILE_ROWS = 8192
TILE_ELEMENTS = 1 << 20
_INDEX_BITS = 31
_LAST = (1 << _INDEX_BITS) - 1


@Op
def index_topk(
    q_THC: Tensor,
    keys: RowSource,
    weight_TH: Tensor,
    visible_T: Tensor,
    layout: Sequence[tuple[int, int]],
    topk: int,
) -> tuple[Tensor, Tensor]:
    """The `topk` best of rows 0..visible-1 for each token: (score [T, K], index [T, K]), K = min(topk, bound).

    score = sum_h weight_h relu(q_h . k), in promote(q, float32).  Indices ascend; -1 (score -inf) fills up
    where fewer rows are visible.  Equal scores go to the lowest index, which torch.topk does not promise.
    `layout` gives each span's token range, so that a span's keys are read once for all its queries.
    With gradients on, scores are differentiable (for the indexer's own loss); indices never are.
    """
    T, N = q_THC.shape[0], keys.num_rows
    wide = torch.promote_types(q_THC.dtype, torch.float32)
    K = min(topk, N)
    if K == 0 or T == 0:
        return q_THC.new_zeros(T, K, dtype=wide), visible_T.new_full((T, K), -1)
    q_THC, weight_TH = q_THC.to(wide), weight_TH.to(wide)
    best_TK = visible_T.new_empty(T, 0)
    for low in range(0, N, TILE_ROWS):
        row_N = torch.arange(low, min(low + TILE_ROWS, N), device=q_THC.device)
        keys_BNC = keys.span_rows(low, low + len(row_N)).to(wide)
        with torch.no_grad():
            parts = []
            for rows, score_TN in _score_tiles(q_THC, keys_BNC, weight_TH, layout):
                rank_TN = rank_key(score_TN, row_N).masked_fill_(row_N >= visible_T[rows, None], -1)
                rank_TN = torch.cat([best_TK[rows], rank_TN], dim=1) if low else rank_TN
                parts.append(rank_TN.topk(K, dim=1, sorted=False).values if rank_TN.shape[1] > K else rank_TN)
            best_TK = torch.cat(parts)
    # Ascending order does not depend on how many rows were scored, so neither do sums over the rows chosen.
    index_TK, order_TK = rank_index(best_TK).masked_fill(best_TK < 0, _LAST).sort(dim=1)
    index_TK = index_TK.masked_fill(index_TK == _LAST, -1)
    if torch.is_grad_enabled():
        return _scores_at(q_THC, keys, weight_TH, index_TK), index_TK
    score_TK = rank_score(best_TK.gather(1, order_TK)).to(wide)
    return score_TK.masked_fill(index_TK < 0, float("-inf")), index_TK


def rank_key(score: Tensor, index: Tensor) -> Tensor:
    """Non-negative int64 that orders by score, then by lowest index: all distinct, so any top-k agrees.

    float32 scores only keep their order exactly; float64 ones are rounded to float32 first.
    """
    bits = (score.float() + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)
    return (ordered << _INDEX_BITS) | (_LAST - index)


def rank_index(rank: Tensor) -> Tensor:
    """The index inside a `rank_key`."""
    return _LAST - (rank & _LAST)


def rank_score(rank: Tensor) -> Tensor:
    """The float32 score inside a `rank_key`."""
    ordered = (rank >> _INDEX_BITS) - (1 << 31)
    bits = torch.where(ordered < 0, (-1 - ordered) - (1 << 31), ordered)
    return bits.to(torch.int32).view(torch.float32)


@Op
def index_scores(q_THC: Tensor, keys_NC: Tensor, weight_TH: Tensor) -> Tensor:
    """Scores [T, N] of every key for every query: sum_h weight_h relu(q_h . k)."""
    product_MN = (q_THC.flatten(0, 1) @ keys_NC.t()).relu_()
    return torch.bmm(weight_TH[:, None], product_MN.unflatten(0, q_THC.shape[:2]))[:, 0]


def _score_tiles(
    q_THC: Tensor, keys_BNC: Tensor, weight_TH: Tensor, layout: Sequence[tuple[int, int]]
) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their scores [T, N]) of one span after the other, few tokens at a time: what follows stays in cache."""
    H, N = q_THC.shape[1], keys_BNC.shape[1]
    tile = max(1, TILE_ELEMENTS // (H * N))
    for b, (first, last) in enumerate(layout):
        for t in range(first, last, tile):
            rows = slice(t, min(t + tile, last))
            yield rows, index_scores(q_THC[rows], keys_BNC[b], weight_TH[rows])


def _scores_at(q_THC: Tensor, keys: RowSource, weight_TH: Tensor, index_TK: Tensor) -> Tensor:
    """Scores of the chosen rows alone; differentiable where the inputs are."""
    T, K = index_TK.shape
    rows_NC, flat_TK = keys.read(index_TK)
    tile = max(1, TILE_ELEMENTS // (K * (q_THC.shape[1] + q_THC.shape[2])))
    parts = []
    for t in range(0, T, tile):
        rows = slice(t, t + tile)
        keys_TKC = rows_NC.to(q_THC.dtype)[flat_TK[rows]]
        product_THK = torch.bmm(q_THC[rows], keys_TKC.transpose(1, 2)).relu()
        parts.append(torch.bmm(weight_TH[rows, None], product_THK)[:, 0])
    return torch.cat(parts).masked_fill(index_TK < 0, float("-inf"))


native.kernel(index_scores)
gpu.kernel(index_scores)
native.kernel(index_topk, any_format=True)
gpu.kernel(index_topk, any_format=True)
native.training_kernel(index_topk)
