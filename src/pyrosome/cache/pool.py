"""The pool: rings by slot, pages by table, who holds which, and who may write where.

Slots and pages are shared by reference and copied when somebody is about to write what somebody else may read.
Slot 0 and page 0 belong to nobody: padding reads and writes them, so that a step needs no branch.
Shape letters: S slots, R ring rows, P pages per sequence.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from pyrosome.cache.streams import PAGE_ROWS, StreamSpec, all_streams, pages_for, plan_cache
from pyrosome.cache.views import LayerCache, PooledLayer, StepLike
from pyrosome.config import ModelConfig
from pyrosome.errors import CacheInvariantBroken, ContextTooLong, DoesNotFit
from pyrosome.quant.rows import RowFormat, index_rows, kv_rows

_serial = itertools.count(1)


@dataclasses.dataclass(eq=False)
class Holding:
    """What one sequence holds of a pool.  Made and changed by the pool alone."""

    pages: dict[int, list[int]]  # ratio -> pages, in order of position
    slot: int = 0  # 0: its state is not in the pool (it is new, parked or released)
    serial: int = dataclasses.field(default_factory=lambda: next(_serial))
    is_open: bool = True


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What a pool lacks for a step: a value, since making room is the caller's choice."""

    slots: int
    pages: dict[int, int]  # ratio -> pages missing

    def __bool__(self) -> bool:
        return self.slots > 0 or any(n > 0 for n in self.pages.values())


class _Pages:
    """Pages of one ratio: free ones, and for each taken one how many hold it, who may append, and what is settled.

    A page is written in place by its only holder; or by its writer, above the rows that others may read (`sealed`).
    """

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, 0, -1))
        self.refs = np.zeros(num_pages, dtype=np.int32)
        self.writer = np.zeros(num_pages, dtype=np.int64)
        self.sealed = np.zeros(num_pages, dtype=np.int16)

    def take(self, writer: int) -> int:
        page = self.free.pop()
        self.refs[page], self.writer[page], self.sealed[page] = 1, writer, 0
        return page

    def drop(self, pages: list[int], writer: int = 0) -> int:
        """Let go of pages; returns how many became free."""
        if not pages:
            return 0
        at = np.array(pages)
        if (self.refs[at] < 1).any():
            raise CacheInvariantBroken(f"pages {pages[:8]} were given back and are not all held")
        self.refs[at] -= 1
        self.writer[at[self.writer[at] == writer]] = 0
        freed = at[self.refs[at] == 0]
        self.free += freed[::-1].tolist()
        return len(freed)

    def writable(self, page: int, writer: int, row: int) -> bool:
        return bool(self.refs[page] == 1 or (self.writer[page] == writer and row >= self.sealed[page]))


class CachePool:
    """Rows of up to `max_sequences` sequences, of up to `max_context` tokens each.

    Args:
        cache_tokens: tokens of history in all; None: `max_sequences` times `max_context`.

    Raises:
        CheckpointError: the shape cannot be stored in `kv_format`.
        DoesNotFit: no slot or page is free.
        ContextTooLong: a sequence grows beyond `max_context` tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        kv_format: str,
        max_sequences: int,
        max_context: int,
        *,
        num_drafts: int = 0,
        drafts: bool = False,
        cache_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.kv_format, self.max_context = config, kv_format, max_context
        self.plan = plan_cache(config, kv_format, max_sequences, max_context, num_drafts, drafts, cache_tokens)
        self.has_drafts = drafts
        self._num_drafts, self.device = num_drafts, torch.device(device)
        self.streams: dict[int, dict[str, StreamSpec]] = {}  # layer -> name -> stream
        self.planes: dict[tuple[int, str], tuple[Tensor, ...]] = {}
        self._formats = {
            "kv": kv_rows(kv_format, config.head_dim, config.qk_rope_head_dim),
            "index": index_rows(kv_format, config.index_head_dim) if 4 in config.layer_ratios else None,
        }
        for layer, spec in all_streams(config, kv_format, drafts):
            self.streams.setdefault(layer, {})[spec.name] = spec
            self.planes[layer, spec.name] = self._allocate(spec)
        self._tables = {
            ratio: torch.zeros(self.plan.num_slots, pages_for(max_context, ratio), dtype=torch.int64, device=device)
            for ratio in self.plan.num_pages
        }
        self._free_slots = list(range(self.plan.num_slots - 1, 0, -1))
        self._slot_refs = [0] * self.plan.num_slots
        self._pages = {ratio: _Pages(n) for ratio, n in self.plan.num_pages.items()}

    def _allocate(self, spec: StreamSpec) -> tuple[Tensor, ...]:
        if spec.is_history:
            rows = self.plan.num_pages[spec.per_tokens] * PAGE_ROWS
            shape: tuple[int, ...] = (rows,)
        else:
            shape = (self.plan.num_slots, spec.ring_rows(self._num_drafts))
        if spec.name.endswith("tail"):  # kv and gate: what pooling starts from
            return tuple(torch.zeros(2, *shape, spec.width // 2, device=self.device))
        if spec.name == "draft_hidden":
            return (torch.zeros(*shape, spec.width, device=self.device),)
        planes = self._row_format(spec).planes(spec.width)
        return tuple(torch.zeros(*shape, n, dtype=dtype, device=self.device) for dtype, n in planes)

    def _row_format(self, spec: StreamSpec) -> RowFormat:
        row_format = self._formats["index" if spec.name == "index_k" else "kv"]
        if row_format is None:
            raise CacheInvariantBroken(f"{spec.name} has no row format: the configuration names no CSA layer")
        return row_format

    # Who holds what

    @property
    def ratios(self) -> list[int]:
        """Tokens per row of the history streams there are."""
        return list(self._pages)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def num_free_pages(self, ratio: int) -> int:
        return len(self._pages[ratio].free)

    def num_holders(self, ratio: int, page: int) -> int:
        return int(self._pages[ratio].refs[page])

    def open(self) -> Holding:
        """A new sequence's holding: nothing yet.  Slot and pages come with `prepare`."""
        return Holding({ratio: [] for ratio in self._pages})

    def shortage(self, holding: Holding, start: int, stop: int, *, with_slot: bool = True) -> Shortage:
        """What is missing before positions start..stop of a sequence can be written."""
        slots = 1 if with_slot and not self._owns_slot(holding) else 0
        pages = {r: len(self._copies(holding, r, start, stop)) + self._growth(holding, r, stop) for r in self._pages}
        return Shortage(
            max(0, slots - self.num_free_slots), {r: max(0, n - self.num_free_pages(r)) for r, n in pages.items()}
        )

    def prepare(self, holding: Holding, start: int, stop: int, *, with_slot: bool = True) -> None:
        """Make positions start..stop of a sequence writable: a slot and pages of its own, all or nothing.

        Args:
            with_slot: a slot too, if it has none of its own; else history alone is to be written, of a sequence that
                shares its slot with nobody.
        """
        self._check(holding)
        if holding.slot and not with_slot and not self._owns_slot(holding):
            raise CacheInvariantBroken("history was to be brought in beside a state that others share; leave its slot")
        if stop > self.max_context:
            raise ContextTooLong(stop, self.max_context, "shorten the prompt or open the pool with a larger context")
        if missing := self.shortage(holding, start, stop, with_slot=with_slot):
            self._refuse(missing)
        if with_slot and not self._owns_slot(holding):
            self._take_slot(holding)
        for ratio, book in self._pages.items():
            held = holding.pages[ratio]
            for at in self._copies(holding, ratio, start, stop):
                new = book.take(holding.serial)
                self._copy_page(ratio, held[at], new)
                book.drop([held[at]], holding.serial)
                held[at] = new
                if holding.slot:
                    self._tables[ratio][holding.slot, at] = new
            if count := self._growth(holding, ratio, stop):
                new_pages = [book.take(holding.serial) for _ in range(count)]
                at = len(held)
                if holding.slot:
                    self._tables[ratio][holding.slot, at : at + count] = torch.tensor(new_pages, device=self.device)
                held += new_pages

    def fork(self, holding: Holding, length: int) -> Holding:
        """A second holding of the first `length` tokens: everything by reference, nothing copied before a write."""
        self._check(holding)
        self.seal(holding, length)
        child = self.adopt({r: pages[: pages_for(length, r)] for r, pages in holding.pages.items()})
        child.slot = holding.slot
        if child.slot:
            self._slot_refs[child.slot] += 1
        return child

    def adopt(self, pages: dict[int, list[int]]) -> Holding:
        """A holding that shares `pages`, and may append to none of them in place while others hold them."""
        for ratio, shared in pages.items():
            self._pages[ratio].refs[shared] += 1
        return Holding({ratio: list(shared) for ratio, shared in pages.items()})

    def retain(self, ratio: int, page: int) -> None:
        """Hold a page beside those who hold it already."""
        if self._pages[ratio].refs[page] < 1:
            raise CacheInvariantBroken(f"page {page} of ratio {ratio} was to be shared and nobody holds it")
        self._pages[ratio].refs[page] += 1

    def drop(self, ratio: int, page: int) -> bool:
        """Let go of a page held by `retain`; whether it is free now."""
        return self._pages[ratio].drop([page]) == 1

    def take(self, ratio: int) -> int:
        """A page of the caller's own, to be given back by `drop`.

        Raises:
            DoesNotFit: none is free.
        """
        if not self._pages[ratio].free:
            self._refuse(Shortage(0, {ratio: 1}))
        return self._pages[ratio].take(0)

    def seal(self, holding: Holding, length: int) -> None:
        """From now on others may read the rows of the first `length` tokens: they are not written in place again."""
        for ratio, held in holding.pages.items():
            book, rows = self._pages[ratio], length // ratio
            full = rows // PAGE_ROWS
            book.sealed[held[:full]] = PAGE_ROWS
            if rows % PAGE_ROWS:
                book.sealed[held[full]] = max(book.sealed[held[full]], rows % PAGE_ROWS)

    def truncate(self, holding: Holding, length: int) -> None:
        """Let go of the pages beyond the first `length` tokens."""
        self._check(holding)
        for ratio, held in holding.pages.items():
            count = pages_for(length, ratio)
            self._pages[ratio].drop(held[count:], holding.serial)
            del held[count:]

    def leave_slot(self, holding: Holding) -> None:
        """Give the slot back: the state was copied elsewhere, or is not needed."""
        if holding.slot:
            self._slot_refs[holding.slot] -= 1
            if self._slot_refs[holding.slot] == 0:
                for table in self._tables.values():
                    table[holding.slot] = 0
                self._free_slots.append(holding.slot)
            holding.slot = 0

    def release(self, holding: Holding) -> None:
        """Give everything back.  Rows are left as they are: every read is justified by a write."""
        self._check(holding)
        self.truncate(holding, 0)
        self.leave_slot(holding)
        holding.is_open = False

    def _check(self, holding: Holding) -> None:
        if not holding.is_open:
            raise CacheInvariantBroken("a sequence that was released is used again; open another")

    def _owns_slot(self, holding: Holding) -> bool:
        return holding.slot != 0 and self._slot_refs[holding.slot] == 1

    def _take_slot(self, holding: Holding) -> None:
        new = self._free_slots.pop()
        self._slot_refs[new] = 1
        if holding.slot:
            for (layer, name), planes in self.planes.items():
                if not self.streams[layer][name].is_history:
                    for plane in planes:
                        plane[new] = plane[holding.slot]
            self._slot_refs[holding.slot] -= 1
        holding.slot = new
        for ratio, held in holding.pages.items():
            self._tables[ratio][new, : len(held)] = torch.tensor(held, dtype=torch.int64, device=self.device)

    def _growth(self, holding: Holding, ratio: int, stop: int) -> int:
        return max(0, pages_for(stop, ratio) - len(holding.pages[ratio]))

    def _copies(self, holding: Holding, ratio: int, start: int, stop: int) -> list[int]:
        """Which of the pages held must be copied before rows of positions start..stop are written."""
        held, book = holding.pages[ratio], self._pages[ratio]
        first, last = start // ratio, stop // ratio - 1  # rows
        if last < first:
            return []
        pages = range(first // PAGE_ROWS, min(last // PAGE_ROWS + 1, len(held)))
        return [at for at in pages if not book.writable(held[at], holding.serial, max(0, first - at * PAGE_ROWS))]

    def _copy_page(self, ratio: int, old: int, new: int) -> None:
        for (layer, name), planes in self.planes.items():
            spec = self.streams[layer][name]
            if spec.is_history and spec.per_tokens == ratio:
                for plane in planes:
                    plane[new * PAGE_ROWS : (new + 1) * PAGE_ROWS] = plane[old * PAGE_ROWS : (old + 1) * PAGE_ROWS]

    def _refuse(self, missing: Shortage) -> None:
        if missing.slots:
            raise DoesNotFit(
                "one more sequence", self.plan.state_bytes, 0, "the cache pool",
                f"all {self.plan.num_slots - 1} slots are taken: close a sequence or open the pool with more",
            )  # fmt: skip
        ratio = max(missing.pages, key=lambda r: missing.pages[r] * self.plan.page_bytes[r])
        page, free = self.plan.page_bytes[ratio], self.num_free_pages(ratio)
        raise DoesNotFit(
            "a longer history", page * (free + missing.pages[ratio]), page * free, "the cache pool",
            "close a sequence first",
        )  # fmt: skip

    # What a step sees

    def layers(self, step: StepLike) -> list[LayerCache]:
        """The trunk's layers as `step` sees them."""
        return [self.layer(i, step) for i in range(self.config.num_hidden_layers)]

    def layer(self, layer: int, step: StepLike) -> LayerCache:
        """One layer as `step` sees it; the draft stage is the one after the last."""
        tails: dict[str, Tensor] = {}
        histories: dict[str, tuple[tuple[Tensor, ...], RowFormat, Tensor]] = {}
        for name, spec in self.streams[layer].items():
            planes = self.planes[layer, name]
            if spec.is_history:
                histories[name] = planes, self._row_format(spec), self._tables[spec.per_tokens]
            elif name.endswith("tail"):
                tails[name] = planes  # type: ignore[assignment]
        window = "window_kv" if "window_kv" in self.streams[layer] else "draft_kv"
        spec = self.streams[layer][window]
        return PooledLayer(step, self.planes[layer, window], self._row_format(spec), tails, histories)

    def draft_layer(self, step: StepLike) -> LayerCache:
        """The MTP stage's window as `step` sees it."""
        return self.layer(self.config.num_hidden_layers, step)

    @property
    def draft_hidden(self) -> Tensor:
        """The trunk's last residual streams by slot, [S, R, J D]: what the MTP stage starts from."""
        return self.planes[self.config.num_hidden_layers, "draft_hidden"][0]

    def stream_bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes in use, and that there are, by kind of stream in all layers; what is nobody's and tables not counted.

        Tails are one kind, and so are the streams of the draft stage.
        """
        slots = self.plan.num_slots - 1
        found: dict[str, tuple[int, int]] = {}
        for spec in (s for by_name in self.streams.values() for s in by_name.values()):
            if spec.is_history:
                each, total = spec.row_bytes * PAGE_ROWS, self.plan.num_pages[spec.per_tokens] - 1
                free = self.num_free_pages(spec.per_tokens)
            else:
                each, total, free = spec.row_bytes * spec.ring_rows(self._num_drafts), slots, self.num_free_slots
            kind = "tail" if spec.name.endswith("tail") else "draft" if spec.name.startswith("draft") else spec.name
            used_bytes, total_bytes = found.get(kind, (0, 0))
            found[kind] = used_bytes + each * (total - free), total_bytes + each * total
        return found

    @property
    def allocated_bytes(self) -> int:
        """Bytes of every tensor of the pool, read from the tensors themselves."""
        planes = [p for planes in self.planes.values() for p in planes]
        return sum(t.numel() * t.element_size() for t in [*planes, *self._tables.values()])

    def poison(self, value: float = float("nan")) -> None:
        """Fill every row with `value` (tests): a read that no write justifies then shows.  Spare rows stay zero."""
        for planes in self.planes.values():
            for plane in planes:
                if plane.dtype.is_floating_point:
                    plane.fill_(value)
                else:
                    plane.fill_(255)
                plane[:1] = 0
