"""Calls of the lightning indexer, over V4-Flash's compressed rows: 64 heads of 128 channels, 512 rows kept."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from pyrosome.cache.streams import PAGE_ROWS, pages_for
from pyrosome.cache.views import PagedRows
from pyrosome.ops.index_topk import index_scores, index_topk
from pyrosome.quant import simulate_fp4
from pyrosome.quant.rows import index_rows
from pyrosome.testing.calls import Call

H, C, TOPK = 64, 128, 512
RATIO = 4
CONTEXTS = 4 << 10, 128 << 10, 1 << 20
BETWEEN = 16 << 10, 32 << 10, 256 << 10  # where the best rows are found by blocks of other sizes
ROW_BYTES = {"fp8": C // 2 + C // 32, "bf16": 2 * C, "f32": 4 * C}  # by the format of a cache; FP4 keys in an "fp8" one


def calls() -> list[Call]:
    """Tokens of sequences of their own (up to 64), and prompts at the end of their context."""
    made = [_call(M, context, "fp8") for M in (1, 4, 16, 64, 512, 4096) for context in CONTEXTS]
    made += [_call(1, context, "fp8") for context in BETWEEN]
    made += [_call(M, 4 << 10, row_format) for row_format in ("bf16", "f32") for M in (1, 512)]
    rows = 8192
    flops, num_bytes = 2 * 16 * rows * H * C, 4 * (rows * C + 16 * (H * C + H + rows))
    return [*made, Call(index_scores, "scores", 16, 4 * rows, _plain, num_bytes, flops, "f32", tolerance=1e-5)]


def _call(M: int, context: int, row_format: str) -> Call:
    rows, spans = context // RATIO, _spans(M)
    seen = M * rows - (M * (M - 1) // (2 * RATIO) if spans == 1 else 0)
    num_bytes = spans * rows * ROW_BYTES[row_format] + 4 * M * (H * C + H) + 12 * M * min(TOPK, rows)
    name = "exact, " + row_format if row_format != "fp8" else "trained"
    make = functools.partial(_arguments, M, context, row_format)
    kind = "f32" if row_format == "f32" else "bf16"
    return Call(index_topk, name, M, context, make, num_bytes, 2 * seen * H * C, kind)


def _spans(M: int) -> int:
    return M if M <= 64 else 1


def _arguments(M: int, context: int, row_format: str, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rows of every sequence in shuffled pages.  Sequences share pages where a device would hardly hold as many."""
    spans, pages = _spans(M), pages_for(context, RATIO)
    pool_pages = min(spans * pages, 1 << 15)
    rows = index_rows(row_format, C)
    planes = tuple(
        _plane(torch.empty(pool_pages * PAGE_ROWS, elements, dtype=dtype, device=device), elements == C // 32)
        for dtype, elements in rows.planes(C)
    )
    table = (torch.randperm(spans * pages, device=device) % pool_pages).view(spans, pages)
    token_T = torch.arange(M, device=device)
    span_T = token_T if spans > 1 else torch.zeros_like(token_T)
    visible_T = (torch.full_like(token_T, context) if spans > 1 else context - M + 1 + token_T) // RATIO
    keys = PagedRows(planes, rows, table, SimpleNamespace(span_T=span_T, context=context), RATIO)  # type: ignore[arg-type]
    q_THC = torch.randn(M, H, C, device=device)
    q_THC = simulate_fp4(q_THC) if row_format == "fp8" else q_THC
    weight_TH = torch.randn(M, H, device=device) * (H * C) ** -0.5
    layout = [(t, t + 1) for t in range(M)] if spans > 1 else [(0, M)]
    return (q_THC, keys, weight_TH, visible_T, layout, TOPK), {}


def _plane(plane: torch.Tensor, is_scales: bool) -> torch.Tensor:
    if plane.dtype.is_floating_point:
        return plane.normal_()
    return plane.random_(118, 128) if is_scales else plane.random_(0, 256)


def _plain(device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        torch.randn(16, H, C, device=device),
        torch.randn(8192, C, device=device),
        torch.randn(16, H, device=device) * (H * C) ** -0.5,
    ), {}
