"""Calls of attention: the window alone, joined by rows that an indexer chose (CSA), or by all rows of a ratio (HCA).

Shape letters: M tokens, H heads, C head dim, K rows per token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.cache.views import PagedRows, WindowRows
from pyrosome.model.step import Span, Step
from pyrosome.ops.rope import rotation
from pyrosome.ops.rows import RowSource
from pyrosome.ops.sparse_attention import attention, finish_attention, sparse_attention
from pyrosome.quant.rows import kv_rows
from pyrosome.testing.calls import Call

H, C, ROPE, WINDOW, CHOSEN = 64, 512, 64, 128, 512
RATIOS = {"window": 0, "window + CSA": 4, "window + HCA": 128}
ROW_BYTES = {"fp8": 584, "f32": 4 * C}
POOL_ROWS = 1 << 18  # those of one sequence of a million tokens at ratio 4; more sequences share them

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def calls() -> list[Call]:
    """Decode steps and parts of prompts that end at each context."""
    made = []
    for M in (1, 4, 16, 64, 512, 4096):
        for context in (4096, 1 << 17, 1 << 20):
            for name in RATIOS if context > 4096 or M == 1 else ("window", "window + CSA"):
                if name != "window" or context == 4096:
                    made.append(_call(name, M, context, "fp8"))
    return [*made, _call("window + CSA", 1, 4096, "f32"), *_mergeable()]


def _call(name: str, M: int, context: int, kv_format: str) -> Call:
    keys = WINDOW + {"window": 0, "window + CSA": min(CHOSEN, context // 4), "window + HCA": context // 128}[name]
    rows = min(M * keys, WINDOW + M + (POOL_ROWS if M > 64 else M * keys))
    num_bytes = 2 * 4 * M * H * C + rows * ROW_BYTES[kv_format]
    title = name if kv_format == "fp8" else f"{name}, {kv_format}"
    make = functools.partial(_arguments, name, M, context, kv_format)
    kind = "bf16" if kv_format == "fp8" else "f32"
    return Call(attention, title, M, context, make, num_bytes, 4 * M * H * C * keys, kind)


def _mergeable() -> list[Call]:
    """Parts that are computed apart, as where sequences are sharded."""
    M, keys = 16, CHOSEN
    return [
        Call(sparse_attention, "CSA alone", M, 1 << 17, functools.partial(_one_part, M), 8 * M * H * C + M * keys * 584,
             4 * M * H * C * keys, "bf16"),
        Call(finish_attention, "two parts", M, 0, functools.partial(_two_parts, M), 12 * M * H * C, 0, ""),
    ]  # fmt: skip


def _arguments(name: str, M: int, context: int, kv_format: str, device: torch.device) -> _Arguments:
    """Up to 64 tokens are of as many sequences, more are the last ones of a prompt."""
    row_format = kv_rows(kv_format, C, ROPE)
    spans = [Span(s + 1, context - 1, [1]) for s in range(M)] if M <= 64 else [Span(1, context - M, [1] * M)]
    step = Step.of(spans, device=device, context=context)
    ring = tuple(
        plane.unflatten(0, (len(spans) + 1, WINDOW)) for plane in _rows(row_format, (len(spans) + 1) * WINDOW, device)
    )
    fresh = row_format.round_trip(torch.randn(M, C, device=device))
    window = WindowRows(ring, row_format, step.slot_B, fresh)
    parts: list[tuple[RowSource, torch.Tensor]] = [(window, step.window_index(WINDOW, WINDOW))]
    if ratio := RATIOS[name]:
        num_pages = -(-step.num_rows(ratio) // PAGE_ROWS)
        planes = _rows(row_format, min(POOL_ROWS, (num_pages * len(spans) + 1) * PAGE_ROWS), device)
        table = torch.randint(1, planes[0].shape[0] // PAGE_ROWS, (len(spans), num_pages), device=device)
        pages = PagedRows(planes, row_format, table, step, ratio)
        parts.append((pages, _chosen(step, ratio) if ratio == 4 else step.all_rows(ratio)))
    turn = rotation.definition(torch.rand(ROPE // 2, device=device), step.position_T)
    return (torch.randn(M, H, C, device=device), parts, torch.randn(H, device=device), turn), {}


def _rows(row_format: Any, count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    if device.type == "meta":
        return tuple(torch.empty(count, size, dtype=dtype, device=device) for dtype, size in row_format.planes(C))
    return tuple(row_format.encode(torch.randn(count, C, device=device)))


def _chosen(step: Step, ratio: int) -> torch.Tensor:
    """Any of the rows that each token sees, ascending."""
    visible_T1 = step.visible_T(ratio)[:, None]
    drawn = torch.rand(len(step.ids_T), min(CHOSEN, step.num_rows(ratio)), device=step.device)
    return torch.where(visible_T1 > 0, (drawn * visible_T1).long(), -1).sort(-1).values


def _one_part(M: int, device: torch.device) -> _Arguments:
    (q, parts, _, _), _ = _arguments("window + CSA", M, 1 << 17, "fp8", device)
    return (q, *parts[1]), {}


def _two_parts(M: int, device: torch.device) -> _Arguments:
    parts = [(torch.randn(M, H, C, device=device), torch.randn(M, H, device=device)) for _ in range(2)]
    turn = rotation.definition(torch.rand(ROPE // 2, device=device), torch.arange(M, device=device))
    return (torch.randn(H, device=device), turn, parts), {}
