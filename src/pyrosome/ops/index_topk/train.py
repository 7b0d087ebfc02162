"""The lightning indexer with gradients by the native library.

Shape letters: T tokens, H index heads, C index head dim, K rows kept, N rows at hand, S strips of tokens.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import index_topk as ops
from pyrosome.ops import native
from pyrosome.ops.rows import RowSource

LANES = 16


def index_topk(
    q_THC: Tensor,
    keys: RowSource,
    weight_TH: Tensor,
    visible_T: Tensor,
    layout: Sequence[tuple[int, int]],
    topk: int,
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries and weights."""
    (T, _, C), N = q_THC.shape, keys.num_rows
    K = min(topk, N)
    if T == 0 or K == 0 or C % LANES or weight_TH.dtype != torch.float32:
        return ops.index_topk.definition(q_THC, keys, weight_TH, visible_T, layout, topk)  # type: ignore[no-any-return]
    q_THC, weight_TH = q_THC.contiguous(), weight_TH.contiguous()
    score_TK, index_TK = _choose(q_THC, keys, weight_TH, visible_T, layout, K)
    rows_NC, flat_TK = keys.read(index_TK)
    score_TK = _Scores.apply(q_THC, rows_NC.float().contiguous(), weight_TH, flat_TK.contiguous(), index_TK, score_TK)  # type: ignore[no-untyped-call]
    return score_TK, index_TK


@torch.no_grad()
def _choose(
    q_THC: Tensor, keys: RowSource, weight_TH: Tensor, visible_T: Tensor, layout: Sequence[tuple[int, int]], K: int
) -> tuple[Tensor, Tensor]:
    (T, H, C), N = q_THC.shape, keys.num_rows
    keys_BCN = keys.span_rows(0, N).float().transpose(1, 2).contiguous()  # a lane is a row
    layout_B2 = (ctypes.c_int64 * (2 * len(layout)))(*itertools.chain.from_iterable(layout))
    score_TK, index_TK, visible_T = q_THC.new_empty(T, K), visible_T.new_empty(T, K), visible_T.contiguous()
    native.library().index_choose(
        q_THC.data_ptr(), keys_BCN.data_ptr(), weight_TH.data_ptr(), visible_T.data_ptr(), layout_B2,
        score_TK.data_ptr(), index_TK.data_ptr(), len(layout), T, H, C, N, K, native.threads(),
    )  # fmt: skip
    return score_TK, index_TK


class _Scores(torch.autograd.Function):
    """`score_TK` as it is, of rows flat [T, K] where the index is not negative.  All tensors are contiguous."""

    @staticmethod
    def forward(
        ctx: Any, q_THC: Tensor, rows_NC: Tensor, weight_TH: Tensor, flat_TK: Tensor, index_TK: Tensor, score_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q_THC, rows_NC, weight_TH, flat_TK, index_TK)
        return score_TK.view_as(score_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q_THC, rows_NC, weight_TH, flat_TK, index_TK = ctx.saved_tensors
        (T, H, C), (N, _), K, S = q_THC.shape, rows_NC.shape, index_TK.shape[1], native.threads()
        gradient_TK = gradients[0].contiguous()
        dq_THC, dweight_TH = torch.empty_like(q_THC), torch.empty_like(weight_TH)
        drows_SNC = rows_NC.new_zeros(S, N, C) if ctx.needs_input_grad[1] else None
        native.library().index_choose_back(
            gradient_TK.data_ptr(), q_THC.data_ptr(), rows_NC.data_ptr(), flat_TK.data_ptr(), index_TK.data_ptr(),
            weight_TH.data_ptr(), dq_THC.data_ptr(), native.address(drows_SNC), dweight_TH.data_ptr(), T, H, C, K, N, S,
        )  # fmt: skip
        drows_NC = None if drows_SNC is None else drows_SNC[0] if S == 1 else drows_SNC.sum(0)
        return dq_THC, drows_NC, dweight_TH, None, None, None
