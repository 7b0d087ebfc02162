"""One forward over ragged spans: what is computed together, and where each token belongs.

Shape letters: T tokens in step (padding included), B spans, M rows emitted, W window width, R ring rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrosome.cache.views import place_of
from pyrosome.ops.compress import Emit


class Span(NamedTuple):
    """Consecutive positions of one sequence: prompt part, single token or draft verification, all alike."""

    slot: int  # cache slot of the sequence; 0 is the slot that nobody owns (padding, or no cache)
    start: int  # absolute position of the first id
    ids: Sequence[int]
    floor: int = 0  # no state row of an earlier position is there: such rows are not read


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Everything the network needs to know about a step.  Tensors are int64 on the model's device.

    Shapes are static bounds and -1 stands where there is nothing, so that a captured graph can replay any
    step of the same layout; no value is ever read back to the host.
    """

    ids_T: Tensor  # 0 for padding
    position_T: Tensor  # absolute; -1 for padding
    span_T: Tensor  # which span a token belongs to
    slot_B: Tensor
    start_B: Tensor  # absolute position of each span's first token
    stop_B: Tensor  # one past its last
    layout: tuple[tuple[int, int], ...]  # each span's token range, padding included
    context: int  # static bound on stop_B
    mirror: tuple[tuple[int, int], ...] | None  # the host's copy of (start, stop), where it is exact
    floor_B: Tensor  # positions below have no state rows
    is_replay: bool = False  # rebuilds state from rows of history that are there: it writes none
    adapter_T: Tensor | None = None  # which named adapter a token uses; None for none
    packed: Tensor | None = dataclasses.field(default=None, repr=False)  # what the first seven are views of
    derived: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        device: torch.device | str = "cpu",
        *,
        pad_spans_to: int = 0,
        pad_lengths_to: int = 0,
        context: int = 0,
        is_replay: bool = False,
    ) -> Step:
        """Build a step from spans; optionally padded to static bounds.

        Args:
            pad_spans_to: at least this many spans; the added ones are empty.
            pad_lengths_to: every span occupies at least this many tokens of the step.
            context: bound on positions, in tokens; raised to what the spans need.
            is_replay: the step rebuilds state and writes no history.
        """
        rooms = [max(len(s.ids), pad_lengths_to) for s in spans]
        rooms += [max(pad_lengths_to, 1)] * (pad_spans_to - len(spans))
        ids: list[int] = []
        position: list[int] = []
        span: list[int] = []
        layout: list[tuple[int, int]] = []
        for b, room in enumerate(rooms):
            s = spans[b] if b < len(spans) else Span(0, 0, ())
            padding = room - len(s.ids)
            layout.append((len(ids), len(ids) + room))
            ids += [*s.ids, *([0] * padding)]
            position += [*range(s.start, s.start + len(s.ids)), *([-1] * padding)]
            span += [b] * room
        extents = [(s.start, s.start + len(s.ids)) for s in spans] + [(0, 0)] * (len(rooms) - len(spans))
        slots = [s.slot for s in spans] + [0] * (len(rooms) - len(spans))

        fields = [ids, position, span, slots, [start for start, _ in extents], [stop for _, stop in extents]]
        fields.append([s.floor for s in spans] + [0] * (len(rooms) - len(spans)))
        # On a GPU each begins at 16 bytes: kernels are compiled for such addresses, and for others all over again.
        spare = [[0] * (len(field) % 2 if torch.device(device).type != "cpu" else 0) for field in fields]
        numbers = [x for pair in zip(fields, spare, strict=True) for field in pair for x in field]
        packed = torch.tensor(numbers, dtype=torch.int64, device=device)  # one transfer
        parts = packed.split([len(field) + len(more) for field, more in zip(fields, spare, strict=True)])
        ids_T, position_T, span_T, slot_B, start_B, stop_B, floor_B = (
            part[: len(field)] for part, field in zip(parts, fields, strict=True)
        )
        return cls(
            ids_T, position_T, span_T, slot_B, start_B, stop_B,
            layout=tuple(layout),
            context=max([context] + [stop for _, stop in extents]),
            mirror=tuple(extents) if rooms == [len(s.ids) for s in spans] else None,
            floor_B=floor_B,
            is_replay=is_replay,
            packed=packed,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.ids_T.device

    def last_token_B(self) -> Tensor:
        """Index into T of each span's last real token (of its first row, for an empty span)."""
        first_B = torch.tensor([first for first, _ in self.layout], device=self.device)
        return first_B + (self.stop_B - self.start_B - 1).clamp(min=0)

    def emit(self, ratio: int) -> Emit:
        """The compressed rows whose last token lies in this step, in token order, padded to a static bound."""
        return self._once(Step._emit, ratio)

    def _emit(self, ratio: int) -> Emit:
        bound = self.num_emits(ratio)
        if bound == 0:
            nothing = self.ids_T.new_empty(0)
            return Emit(nothing, nothing, nothing, nothing)
        done_T = (self.position_T >= 0) & ((self.position_T + 1) % ratio == 0)
        place_T = torch.where(done_T, done_T.cumsum(0) - 1, bound)
        token_M = self.ids_T.new_zeros(bound + 1).scatter(0, place_T, torch.arange(len(place_T), device=self.device))
        end_M = self.ids_T.new_full((bound + 1,), -1).scatter(0, place_T, self.position_T)
        token_M, end_M = token_M[:-1], end_M[:-1]
        span_M = self.span_T[token_M]
        return Emit(token_M, end_M, self.start_B[span_M], self.slot_B[span_M])

    def num_emits(self, ratio: int) -> int:
        """Static bound on the compressed rows that end in this step."""
        if self.is_replay:
            return 0
        if self.mirror is not None:
            return sum(stop // ratio - start // ratio for start, stop in self.mirror)
        return sum((last - first + ratio - 1) // ratio for first, last in self.layout)

    def num_rows(self, ratio: int) -> int:
        """Static bound on a sequence's finished rows after this step."""
        return self.context // ratio

    def visible_T(self, ratio: int) -> Tensor:
        """How many compressed rows each token sees: those whose last token is not after it; 0 for padding."""
        return self._once(Step._visible, ratio)

    def all_rows(self, ratio: int) -> Tensor:
        """Every visible row of each token's sequence, oldest first, [T, K]; -1 past the last."""
        return self._once(Step._all_rows, ratio)

    def _all_rows(self, ratio: int) -> Tensor:
        row_K = torch.arange(self.num_rows(ratio), device=self.device)
        return torch.where(row_K < self.visible_T(ratio)[:, None], row_K, -1)

    def window_index(self, width: int, ring_rows: int) -> Tensor:
        """Rows of `UnitedRows` for each token's last `width` positions, oldest first, int64 [T, W]; -1 for none."""
        return self._once(Step._window_index, width, ring_rows)

    def _window_index(self, width: int, ring_rows: int) -> Tensor:
        back_W = torch.arange(width - 1, -1, -1, device=self.device)
        position_TW = self.position_T[:, None] - back_W
        token_TW = torch.arange(len(self.position_T), device=self.device)[:, None] - back_W
        fresh_TW = 1 + len(self.layout) * ring_rows + token_TW
        ring_TW = 1 + self.span_T[:, None] * ring_rows + position_TW.clamp(min=0) % max(ring_rows, 1)
        index_TW = torch.where(position_TW >= self.start_B[self.span_T][:, None], fresh_TW, ring_TW)
        return index_TW.masked_fill(position_TW < self.floor_B[self.span_T][:, None], -1)

    def ring_place(self, ring_rows: int) -> tuple[Tensor, Tensor]:
        """(slot [T], row [T]) where each token's state row is written; slot 0 takes what is not to be kept.

        Only the last `ring_rows` tokens of a span are kept: an older one would land on the same row.
        """
        return self._once(Step._ring_place, ring_rows)

    def _ring_place(self, ring_rows: int) -> tuple[Tensor, Tensor]:
        keep_T = (self.position_T >= 0) & (self.position_T >= self.stop_B[self.span_T] - ring_rows)
        return torch.where(keep_T, self.slot_B[self.span_T], 0), self.position_T.clamp(min=0) % ring_rows

    def flat_place(self, ring_rows: int) -> Tensor:
        """`ring_place` as one number, slot x ring_rows + row, int64 [T]."""
        return self._once(Step._flat_place, ring_rows)

    def _flat_place(self, ring_rows: int) -> Tensor:
        slot_T, row_T = self.ring_place(ring_rows)
        return slot_T * ring_rows + row_T

    def picked(self, table: Tensor, by: str) -> Tensor:
        """Rows of a table (one that lasts) by the ids of tokens ("ids_T") or the slots of spans ("slot_B")."""
        return self._once(Step._picked, table, by)

    def _picked(self, table: Tensor, by: str) -> Tensor:
        return table[getattr(self, by)]

    def page_place(self, table_SP: Tensor, ratio: int) -> Tensor:
        """Where in a pool's pages each emitted row is written, int64 [M] (`cache.views.place_of`)."""
        return self._once(Step._page_place, table_SP, ratio)

    def _page_place(self, table_SP: Tensor, ratio: int) -> Tensor:
        return place_of(self.emit(ratio), table_SP, ratio)

    def _visible(self, ratio: int) -> Tensor:
        return (self.position_T + 1) // ratio

    def derive_like(self, other: Step) -> None:
        """Derive from this step all that was derived from another."""
        for (make, *_), (_, about) in other.derived.items():
            self._once(make, *about)

    def _once(self, make, *about):  # type: ignore[no-untyped-def]
        """Layers share what depends on the step alone.  `derived` has it all, by what made it and about what."""
        key = (make, *(id(x) if isinstance(x, Tensor) else x for x in about))
        if key not in self.derived:
            self.derived[key] = make(self, *about), about
        return self.derived[key][0]
