"""The lightning indexer by Triton: scores of a tile of tokens, then the best of them, tile after tile.

Scores of every row are kept for as many tokens as `WORKSPACE` holds, so memory does not grow with a prompt.  A program
scores a few hundred rows for up to 64 tokens (`scoring`); `choosing` keeps the best of each block of rows, and the best
of those.  One token over 16,384 rows takes two launches, over 262,144 rows three, and none is one program's work alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.index_topk import choosing, scoring
from pyrosome.ops.index_topk.scoring import Keys, Queries
from pyrosome.ops.rows import NARROW, Pages, RowSource, stored
from pyrosome.quant.rows import FloatRows, FP4IndexRows

WORKSPACE = 80 << 20  # bytes of scores and queries at once: 64 tokens over 262,144 rows
SOURCE_ROWS = 1 << 18  # asked of a source that gives floats, of all spans at once


def index_topk(
    q_THC: Tensor,
    keys: RowSource,
    weight_TH: Tensor,
    visible_T: Tensor,
    layout: Sequence[tuple[int, int]],
    topk: int,
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries."""
    _check(q_THC, weight_TH, visible_T, layout)
    (T, H, C), N = q_THC.shape, keys.num_rows
    K = min(topk, N)
    if K == 0 or T == 0 or (K > choosing.MOST_KEPT and N > choosing.MOST_ROWS):
        from pyrosome.ops import index_topk as ops

        return ops.index_topk.definition(q_THC, keys, weight_TH, visible_T, layout, topk)  # type: ignore[no-any-return]
    visible_T = visible_T.contiguous()
    queries = Queries(q_THC.contiguous(), weight_TH.float().contiguous(), visible_T)
    pages = stored(keys)
    paged = _paged(pages, T, N, C) if isinstance(pages, Pages) else None
    target = gpu.target(q_THC.device)
    is_exact = keys.format in NARROW if paged is None else paged.format != "f32"  # in bfloat16
    rounds = choosing.plan(N, K, target)
    width = gpu.cdiv(N, 16) * 16
    token_bytes = 4 * width + (6 * H * C if is_exact else 0) + choosing.kept_bytes(rounds, K)
    tile = max(16, WORKSPACE // token_bytes // 16 * 16)
    out = q_THC.new_empty(T, K), visible_T.new_empty(T, K, dtype=torch.int64)
    for first in range(0, T, tile):
        tokens = first, min(first + tile, T)
        score = q_THC.new_empty(tokens[1] - first, width)
        some = scoring.split(queries, *tokens, target) if is_exact else queries
        if paged is not None:
            scoring.score(some, paged, score, tokens, (0, N))
        else:
            step = max(1, SOURCE_ROWS // len(layout) // 16) * 16
            for low in range(0, N, step):
                rows = low, min(low + step, N)
                scoring.score(some, _given(keys, layout, T, C, *rows), score[:, low:], tokens, rows)
        choosing.choose(score, visible_T, rounds, tokens, out)
    return out


def index_scores(q_THC: Tensor, keys_NC: Tensor, weight_TH: Tensor) -> Tensor:
    """As the definition, for float32 queries."""
    (T, H, C), N = q_THC.shape, keys_NC.shape[0]
    if weight_TH.shape != (T, H) or keys_NC.shape != (N, C):
        raise RuntimeError(
            f"index_scores: queries {(T, H, C)} need keys [N, {C}] and weights {(T, H)}; they are "
            f"{tuple(keys_NC.shape)} and {tuple(weight_TH.shape)}"
        )
    rows = keys_NC.float().contiguous()
    score_TN = q_THC.new_empty(T, N)
    queries = Queries(q_THC.contiguous(), weight_TH.float().contiguous(), None)
    if T and N:
        scoring.score(queries, Keys("f32", rows, None, None, None, 0), score_TN, (0, T), (0, N))
    return score_TN


def _check(q_THC: Tensor, weight_TH: Tensor, visible_T: Tensor, layout: Sequence[tuple[int, int]]) -> None:
    tokens, last = q_THC.shape[:1], layout[-1][1] if layout else 0
    if q_THC.dim() != 3 or weight_TH.shape != q_THC.shape[:2] or visible_T.shape != tokens or last != len(q_THC):
        raise RuntimeError(
            f"index_topk: queries [T, H, C] need weights [T, H], visible [T] and spans of T tokens; they are "
            f"{tuple(q_THC.shape)}, {tuple(weight_TH.shape)}, {tuple(visible_T.shape)} and {last} tokens"
        )


def _paged(pages: Pages, T: int, N: int, C: int) -> Keys | None:
    """Pages as the kernel reads them; None for a format that it is given as floats."""
    if isinstance(pages.row_format, FP4IndexRows):
        row_format, width = "fp4", pages.row_format.width
    elif isinstance(pages.row_format, FloatRows) and pages.row_format.name in ("bf16", "f32"):
        row_format, width = pages.row_format.name, C
    else:
        return None
    planes = tuple(p if p.stride(-1) == 1 else p.contiguous() for p in pages.planes)
    wanted, given = pages.row_format.planes(width), tuple((p.dtype, p.shape[-1]) for p in planes)
    (B, P), room = pages.table_BP.shape, pages.table_BP.shape[1] * scoring.PAGE_ROWS
    if width != C or given != wanted or pages.span_T.shape != (T,) or room < N:
        raise RuntimeError(
            f"index_topk: {N} rows of {C} channels for {T} tokens need planes {wanted}, a table of as many rows and a "
            f"span of each token; they are {given}, {B} spans of {P} pages and {tuple(pages.span_T.shape)}"
        )
    scales = planes[1] if row_format == "fp4" else None
    return Keys(row_format, planes[0], scales, pages.table_BP.contiguous(), pages.span_T.contiguous(), P)


def _given(keys: RowSource, layout: Sequence[tuple[int, int]], T: int, C: int, low: int, high: int) -> Keys:
    """Rows low..high of every span as a source gives them; in bfloat16 where that is how they are stored."""
    rows_BNC = keys.span_rows(low, high)
    if rows_BNC.shape != (len(layout), high - low, C):
        raise RuntimeError(
            f"index_topk: rows {low}..{high} of {len(layout)} spans and {C} channels were asked of a source, and it "
            f"gave {tuple(rows_BNC.shape)}"
        )
    span_T = None
    if len(layout) > 1:
        span_T = torch.empty(T, dtype=torch.int32, device=rows_BNC.device)
        for b, (first, last) in enumerate(layout):
            span_T[first:last] = b
    row_format = "bf16" if keys.format in NARROW else "f32"
    rows = rows_BNC.to(torch.bfloat16 if row_format == "bf16" else torch.float32).contiguous()
    return Keys(row_format, rows.flatten(0, 1), None, None, span_T, high - low)
