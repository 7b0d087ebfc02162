"""Rows on their way into the cache.

Shape letters: M rows, C row width.
"""

from __future__ import annotations

from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.seam import Op
from pyrosome.quant.rows import RowFormat


@Op
def store_rows(rows_MC: Tensor, planes: tuple[Tensor, ...], row_format: RowFormat, place_M: Tensor) -> None:
    """Write rows to places of the planes [places, bytes or elements].  Places of rows that somebody reads differ."""
    for plane, encoded in zip(planes, row_format.encode(rows_MC), strict=True):
        plane[place_M] = encoded


@Op
def as_stored(rows: Tensor, row_format: RowFormat) -> Tensor:
    """Rows [..., C] as they will be read back, in their own dtype; gradients pass straight through."""
    return row_format.round_trip(rows)


native.kernel(store_rows, any_format=True)
gpu.kernel(store_rows, any_format=True)
native.kernel(as_stored, any_format=True)
gpu.kernel(as_stored, any_format=True)
