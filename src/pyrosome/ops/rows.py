"""Where attention and the indexer read their rows from.

Shape letters: T tokens in step, K rows read per token, N rows at hand, B spans, R ring rows, C row width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
