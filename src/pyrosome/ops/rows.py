"""Where attention and the indexer read their rows from.

Shape letters: T tokens in step, K rows read per token, N rows at hand, B spans, R ring rows, C row width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyrosome.quant.rows import RowFormat


class RowSource(Protocol):
    """Remembered rows of one stream, as seen by one step.  A kernel may know a source's storage; a definition asks."""

    format: str
    num_rows: int  # static bound on rows per span

    def read(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [N, C] in float, flat [T, K]) with rows[flat] the rows asked for; finite where the index is -1."""
        ...

    def span_rows(self, low: int, high: int) -> Tensor:
        """Rows low..high of every span, float [B, high - low, C]; rows not yet written hold anything."""
        ...


# Formats whose rows bfloat16 holds exactly.  Over such rows attention takes its queries and weights as bfloat16 too, as
# the official kernel does; over others nothing is rounded.
NARROW = ("bf16", "fp8")


PAGE_ROWS = 64  # places of a page (`cache.streams`, which stands above)


class Pages(NamedTuple):
    """Rows in pages of `PAGE_ROWS` places each, as a kernel that knows how they are stored reads them."""

    planes: tuple[Tensor, ...]  # [places, bytes or elements]
    row_format: RowFormat
    table_BP: Tensor  # page of the pool for each page of a span
    span_T: Tensor  # of each token


class Ring(NamedTuple):
    """The ring of each span, and this step's own rows, numbered as `UnitedRows` does."""

    planes: tuple[Tensor, ...]  # [slots, R, bytes or elements]
    row_format: RowFormat
    slot_B: Tensor
    fresh_TC: Tensor


def stored(source: RowSource) -> Pages | Ring | None:
    """How a source's rows are stored, where a kernel may read them in place; None: it is asked for floats."""
    return getattr(source, "stored", None)


class UnitedRows:
    """The ring of each span united with this step's own rows, already decoded.

    A long span may overwrite, when it is written, what its own first queries need: so reads go to the
    union and writes come after.  Row 0 is zero, and stands for "nothing".
    """

    format = ""

    def __init__(self, ring_BRC: Tensor, fresh_TC: Tensor) -> None:
        zero = fresh_TC.new_zeros(1, fresh_TC.shape[1])
        self.rows_NC = torch.cat([zero, ring_BRC.flatten(0, 1).to(fresh_TC.dtype), fresh_TC])
        self.num_rows = self.rows_NC.shape[0]

    def read(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows_NC, index_TK.clamp(min=0)

    def span_rows(self, low: int, high: int) -> Tensor:
        return self.rows_NC[None, low:high]
