"""The lightning indexer by the native library."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops.rows import Pages, RowSource, stored
from pyrosome.quant.rows import INDEX_GROUP, FP4IndexRows


def index_topk(
    q_THC: Tensor,
    keys: RowSource,
    weight_TH: Tensor,
    visible_T: Tensor,
    layout: Sequence[tuple[int, int]],
    topk: int,
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries; rows of a paged cache in FP4 are read where they lie."""
    (T, H, C), N = q_THC.shape, keys.num_rows
    K, pages = min(topk, N), _fp4_pages(keys, C)
    if pages is None or K == 0 or T == 0:
        from pyrosome.ops import index_topk as ops

        return ops.index_topk.definition(q_THC, keys, weight_TH, visible_T, layout, topk)  # type: ignore[no-any-return]
    codes, scales = pages.planes
    q_THC, weight_TH, visible_T = q_THC.contiguous(), weight_TH.float().contiguous(), visible_T.contiguous()
    table_BP = pages.table_BP.contiguous()
    layout_B2 = (ctypes.c_int64 * (2 * len(layout)))(*itertools.chain.from_iterable(layout))
    score_TK, index_TK = q_THC.new_empty(T, K), visible_T.new_empty(T, K)
    native.library().index_topk(
        q_THC.data_ptr(), codes.data_ptr(), scales.data_ptr(), codes.stride(0), scales.stride(0), table_BP.data_ptr(),
        table_BP.shape[1], weight_TH.data_ptr(), visible_T.data_ptr(), layout_B2, len(layout), H, C, N, K,
        score_TK.data_ptr(), index_TK.data_ptr(), native.threads(),
    )  # fmt: skip
    return score_TK, index_TK


def _fp4_pages(keys: RowSource, width: int) -> Pages | None:
    """How the keys are stored, if in pages of FP4 rows."""
    pages = stored(keys)
    if not isinstance(pages, Pages) or not isinstance(pages.row_format, FP4IndexRows):
        return None
    return pages if pages.row_format.width == width and width % INDEX_GROUP == 0 else None


def index_scores(q_THC: Tensor, keys_NC: Tensor, weight_TH: Tensor) -> Tensor:
    """As the definition, for float32 queries."""
    (T, H, C), N = q_THC.shape, keys_NC.shape[0]
    q_THC, keys_NC, weight_TH = q_THC.contiguous(), keys_NC.float().contiguous(), weight_TH.contiguous()
    score_TN = q_THC.new_empty(T, N)
    native.library().index_scores(
        q_THC.data_ptr(), keys_NC.data_ptr(), weight_TH.data_ptr(), score_TN.data_ptr(), T, H, C, N, native.threads()
    )
    return score_TN
