"""Rows to stored bytes by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops import store as ops
from pyrosome.quant.rows import FloatRows, FP4IndexRows, FP8KVRows, RowFormat

FLOAT32, BFLOAT16, FP8, FP4 = range(4)


def store_rows(rows_MC: Tensor, planes: tuple[Tensor, ...], row_format: RowFormat, place_M: Tensor) -> None:
    """As the definition, for float32 rows."""
    kind, nope = _kind(row_format)
    if kind is None or not all(plane.is_contiguous() for plane in planes):
        ops.store_rows.definition(rows_MC, planes, row_format, place_M)
        return
    rows_MC, place_M, data, scale = rows_MC.contiguous(), place_M.contiguous(), planes[0], planes[-1]
    M, C = rows_MC.shape
    native.library().store_rows(
        rows_MC.data_ptr(), place_M.data_ptr(), M, C, kind, nope, data.data_ptr(), data.shape[-1] * data.element_size(),
        scale.data_ptr(), scale.shape[-1],
    )  # fmt: skip


def as_stored(rows: Tensor, row_format: RowFormat) -> Tensor:
    """As the definition, for float32 rows."""
    kind, nope = _kind(row_format)
    if kind == FLOAT32:
        return rows
    if kind is None:
        return ops.as_stored.definition(rows, row_format)  # type: ignore[no-any-return]
    rows, C = rows.contiguous(), rows.shape[-1]
    out = torch.empty_like(rows)
    native.library().round_trip(rows.data_ptr(), out.data_ptr(), out.numel() // C, C, kind, nope)
    return out


def _kind(row_format: RowFormat) -> tuple[int | None, int]:
    """(the kernels' number of a format, channels in codes); None for one they do not know."""
    if isinstance(row_format, FP8KVRows):
        return FP8, row_format.nope
    if isinstance(row_format, FP4IndexRows):
        return FP4, 0
    if isinstance(row_format, FloatRows) and row_format.dtype in (torch.float32, torch.bfloat16):
        return (FLOAT32 if row_format.dtype == torch.float32 else BFLOAT16), 0
    return None, 0
