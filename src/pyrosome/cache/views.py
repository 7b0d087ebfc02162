"""What the network sees of the cache during one step: rings and histories, with or without a pool behind them.

Shape letters: T tokens in step, B spans, S slots, R ring rows, M rows emitted, N rows per span (bound),
K rows read per token, P pages per sequence, C row width, E projected channels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.ops.compress import Emit
from pyrosome.ops.rows import Pages, Ring, RowSource, UnitedRows
from pyrosome.ops.store import as_stored, store_rows
from pyrosome.quant.rows import FloatRows, RowFormat


class StepLike(Protocol):
    """The part of a step that addressing needs."""

    @property
    def span_T(self) -> Tensor: ...
    @property
    def slot_B(self) -> Tensor: ...
    @property
    def stop_B(self) -> Tensor: ...
    @property
    def context(self) -> int: ...
    @property
    def layout(self) -> tuple[tuple[int, int], ...]: ...
    def ring_place(self, ring_rows: int) -> tuple[Tensor, Tensor]: ...
    def flat_place(self, ring_rows: int) -> Tensor: ...
    def emit(self, ratio: int) -> Emit: ...
    def picked(self, table: Tensor, by: str) -> Tensor: ...
    def page_place(self, table_SP: Tensor, ratio: int) -> Tensor: ...


class LayerCache(Protocol):
    """One layer's streams during one step.  Rings are read before they are written; history is written, then read."""

    ring_rows: int

    def window(self, fresh_TC: Tensor) -> UnitedRows: ...
    def stored(self, rows: Tensor) -> Tensor: ...
    def keep_window(self, rows_TC: Tensor) -> None: ...
    def tail(self, name: str, like_TE: Tensor) -> tuple[Tensor, Tensor]: ...
    def keep_tail(self, name: str, kv_TE: Tensor, gate_TE: Tensor) -> None: ...
    def history(self, name: str, rows_MC: Tensor, emit: Emit, ratio: int) -> RowSource: ...


TAIL_ROWS = FloatRows("f32", torch.float32)


def _flat(planes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Planes [S, R, ..] as [S x R, ..]."""
    return tuple(plane.view(-1, plane.shape[-1]) for plane in planes)


class FreshLayer:
    """No pool: the step holds whole sequences from position 0.  Nothing is written in place, so gradients flow."""

    ring_rows = 0

    def __init__(self, step: StepLike) -> None:
        self.step = step

    def window(self, fresh_TC: Tensor) -> UnitedRows:
        return UnitedRows(fresh_TC.new_zeros(len(self.step.layout), 0, fresh_TC.shape[1]), fresh_TC)

    def stored(self, rows: Tensor) -> Tensor:
        return rows

    def keep_window(self, rows_TC: Tensor) -> None:
        pass

    def tail(self, name: str, like_TE: Tensor) -> tuple[Tensor, Tensor]:
        empty_SRE = like_TE.new_zeros(1, 1, like_TE.shape[1])
        return empty_SRE, empty_SRE

    def keep_tail(self, name: str, kv_TE: Tensor, gate_TE: Tensor) -> None:
        pass

    def history(self, name: str, rows_MC: Tensor, emit: Emit, ratio: int) -> RowSource:
        return FreshRows(rows_MC, self.step, ratio)


class FreshRows:
    """Rows this step emitted, span after span: row r of span b is at base_b + r."""

    format = ""

    def __init__(self, rows_MC: Tensor, step: StepLike, ratio: int) -> None:
        self.rows_MC, self.span_T = rows_MC, step.span_T
        self.num_rows = step.context // ratio if rows_MC.shape[0] else 0
        count_B = step.stop_B // ratio
        self.base_B = count_B.cumsum(0) - count_B

    def read(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        rows_NC = torch.cat([self.rows_MC.new_zeros(1, self.rows_MC.shape[1]), self.rows_MC])
        return rows_NC, torch.where(index_TK < 0, 0, 1 + self.base_B[self.span_T][:, None] + index_TK)

    def span_rows(self, low: int, high: int) -> Tensor:
        row_BN = self.base_B[:, None] + torch.arange(low, high, device=self.base_B.device)
        return self.rows_MC[row_BN.clamp(max=self.rows_MC.shape[0] - 1)]


class PooledLayer:
    """One layer's streams in a pool, seen through one step."""

    def __init__(
        self,
        step: StepLike,
        window: tuple[Tensor, ...],
        window_format: RowFormat,
        tails: dict[str, Tensor],
        histories: dict[str, tuple[tuple[Tensor, ...], RowFormat, Tensor]],
    ) -> None:
        self.step, self._window, self._format = step, window, window_format
        self._tails, self._histories = tails, histories
        self.ring_rows = window[0].shape[1]

    def window(self, fresh_TC: Tensor) -> WindowRows:
        return WindowRows(self._window, self._format, self.step.slot_B, fresh_TC)

    def stored(self, rows: Tensor) -> Tensor:
        """The rows as they will be read back: a span must see its own rows as later spans will."""
        return as_stored(rows, self._format)  # type: ignore[no-any-return]

    def keep_window(self, rows_TC: Tensor) -> None:
        store_rows(rows_TC, _flat(self._window), self._format, self.step.flat_place(self.ring_rows))

    def tail(self, name: str, like_TE: Tensor) -> tuple[Tensor, Tensor]:
        kv_SRE, gate_SRE = self._tails[name]
        return kv_SRE, gate_SRE

    def keep_tail(self, name: str, kv_TE: Tensor, gate_TE: Tensor) -> None:
        kv_SRE, gate_SRE = self._tails[name]
        place_T = self.step.flat_place(kv_SRE.shape[1])
        store_rows(kv_TE, _flat((kv_SRE,)), TAIL_ROWS, place_T)
        store_rows(gate_TE, _flat((gate_SRE,)), TAIL_ROWS, place_T)

    def history(self, name: str, rows_MC: Tensor, emit: Emit, ratio: int) -> RowSource:
        planes, row_format, table_SP = self._histories[name]
        if rows_MC.shape[0]:
            is_own = emit is self.step.emit(ratio)  # as nearly always: then layers share the answer
            place_M = self.step.page_place(table_SP, ratio) if is_own else place_of(emit, table_SP, ratio)
            store_rows(rows_MC, planes, row_format, place_M)
        return PagedRows(planes, row_format, self.step.picked(table_SP, "slot_B"), self.step, ratio)


class WindowRows(UnitedRows):
    """The rings of a pool united with this step's own rows; decoded only where somebody asks for floats."""

    def __init__(self, planes: tuple[Tensor, ...], row_format: RowFormat, slot_B: Tensor, fresh_TC: Tensor) -> None:
        self.planes, self.row_format, self.slot_B, self.fresh_TC = planes, row_format, slot_B, fresh_TC
        self.format, self.ring_rows = row_format.name, planes[0].shape[1]
        self.num_rows = 1 + slot_B.shape[0] * self.ring_rows + fresh_TC.shape[0]

    @property
    def stored(self) -> Ring:
        """For kernels that read rows in place."""
        return Ring(self.planes, self.row_format, self.slot_B, self.fresh_TC)

    @functools.cached_property
    def rows_NC(self) -> Tensor:  # type: ignore[override]
        """Rows as `UnitedRows` numbers them, float [N, C]."""
        ring_BRC = self.row_format.decode(tuple(plane[self.slot_B] for plane in self.planes))
        return UnitedRows(ring_BRC, self.fresh_TC).rows_NC


def place_of(emit: Emit, table_SP: Tensor, ratio: int) -> Tensor:
    """Where emitted rows are written in a pool's pages, int64 [M]: page x rows of a page + row.

    The spare page's last row takes what is not to be kept; its first stays zero and stands for "nothing".
    """
    row_M = emit.end // ratio
    page_M = table_SP[emit.slot, (row_M // PAGE_ROWS).clamp(min=0)]
    return torch.where(emit.end >= 0, page_M * PAGE_ROWS + row_M % PAGE_ROWS, PAGE_ROWS - 1)


class PagedRows:
    """A history stream of the step's sequences, read through their page tables."""

    def __init__(
        self, planes: tuple[Tensor, ...], row_format: RowFormat, table_BP: Tensor, step: StepLike, ratio: int
    ) -> None:
        self.planes, self.row_format, self.table_BP = planes, row_format, table_BP
        self.format, self.span_T = row_format.name, step.span_T
        self.num_rows = min(step.context // ratio, table_BP.shape[1] * PAGE_ROWS)

    @property
    def stored(self) -> Pages | None:
        """For kernels that read rows in place."""
        return Pages(self.planes, self.row_format, self.table_BP, self.span_T)

    def read(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        (T, K), B = index_TK.shape, self.table_BP.shape[0]
        span_T1 = self.span_T[:, None]
        if B * self.num_rows <= T * K:  # fewer rows than reads: decode each once
            rows_NC = self.span_rows(0, self.num_rows).flatten(0, 1)
            rows_NC = torch.cat([rows_NC.new_zeros(1, rows_NC.shape[1]), rows_NC])
            return rows_NC, torch.where(index_TK < 0, 0, 1 + span_T1 * self.num_rows + index_TK)
        safe_TK = index_TK.clamp(min=0)
        place_TK = self.table_BP[span_T1, safe_TK // PAGE_ROWS] * PAGE_ROWS + safe_TK % PAGE_ROWS
        rows_NC = self.decode_places(torch.where(index_TK < 0, 0, place_TK).flatten())
        return rows_NC, torch.arange(T * K, device=index_TK.device).view(T, K)

    def span_rows(self, low: int, high: int) -> Tensor:
        row_N = torch.arange(low, high, device=self.table_BP.device)
        place_BN = self.table_BP[:, row_N // PAGE_ROWS] * PAGE_ROWS + row_N % PAGE_ROWS
        rows_NC = self.decode_places(place_BN.flatten())
        return rows_NC.view(*place_BN.shape, rows_NC.shape[-1])

    def decode_places(self, place_N: Tensor) -> Tensor:
        """Rows [N, C] at places of the pool: page x rows of a page + row."""
        return self.row_format.decode(tuple(plane.index_select(0, place_N) for plane in self.planes))


def fresh_layers(step: StepLike, num_layers: int) -> Sequence[LayerCache]:
    """The views of a step without a pool: whole sequences, as training runs them."""
    return [FreshLayer(step)] * num_layers
