"""The pool: rings by slot, pages by table, and who owns which.

Slot 0 and page 0 belong to nobody: padding reads and writes them, so that a step needs no branch.
Shape letters: S slots, R ring rows, P pages per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.cache.streams import PAGE_ROWS, StreamSpec, all_streams, pages_for, plan_cache
from pyrosome.cache.views import LayerCache, PooledLayer, StepLike
from pyrosome.config import ModelConfig
from pyrosome.errors import CacheInvariantBroken, ContextTooLong, DoesNotFit
from pyrosome.quant.rows import RowFormat, index_rows, kv_rows


class CachePool:
    """Rows of up to `max_sequences` sequences, of up to `max_context` tokens each.

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
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.kv_format, self.max_context = config, kv_format, max_context
        self.plan = plan_cache(config, kv_format, max_sequences, max_context, num_drafts, drafts)
        self._num_drafts, self._device = num_drafts, torch.device(device)
        self._streams: dict[int, dict[str, StreamSpec]] = {}
        self._planes: dict[tuple[int, str], tuple[Tensor, ...]] = {}
        self._formats = {
            "kv": kv_rows(kv_format, config.head_dim, config.qk_rope_head_dim),
            "index": index_rows(kv_format, config.index_head_dim) if 4 in config.layer_ratios else None,
        }
        for layer, spec in all_streams(config, kv_format, drafts):
            self._streams.setdefault(layer, {})[spec.name] = spec
            self._planes[layer, spec.name] = self._allocate(spec)
        self._tables = {
            ratio: torch.zeros(self.plan.num_slots, pages_for(max_context, ratio), dtype=torch.int64, device=device)
            for ratio in self.plan.num_pages
        }
        self._free_slots = list(range(self.plan.num_slots - 1, 0, -1))
        self._free_pages = {ratio: list(range(n - 1, 0, -1)) for ratio, n in self.plan.num_pages.items()}
        self._pages: dict[int, dict[int, list[int]]] = {}  # slot -> ratio -> pages, in order

    def _allocate(self, spec: StreamSpec) -> tuple[Tensor, ...]:
        if spec.is_history:
            rows = self.plan.num_pages[spec.per_tokens] * PAGE_ROWS
            shape: tuple[int, ...] = (rows,)
        else:
            shape = (self.plan.num_slots, spec.ring_rows(self._num_drafts))
        if spec.name.endswith("tail"):  # kv and gate: what pooling starts from
            return tuple(torch.zeros(2, *shape, spec.width // 2, device=self._device))
        if spec.name == "draft_hidden":
            return (torch.zeros(*shape, spec.width, device=self._device),)
        planes = self._row_format(spec).planes(spec.width)
        return tuple(torch.zeros(*shape, n, dtype=dtype, device=self._device) for dtype, n in planes)

    def _row_format(self, spec: StreamSpec) -> RowFormat:
        row_format = self._formats["index" if spec.name == "index_k" else "kv"]
        if row_format is None:
            raise CacheInvariantBroken(f"{spec.name} has no row format: the configuration names no CSA layer")
        return row_format

    @property
    def allocated_bytes(self) -> int:
        """Bytes of every tensor of the pool, read from the tensors themselves."""
        planes = [p for planes in self._planes.values() for p in planes]
        return sum(t.numel() * t.element_size() for t in [*planes, *self._tables.values()])

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def num_free_pages(self, ratio: int) -> int:
        return len(self._free_pages[ratio])

    def open(self) -> int:
        """Take a slot for a new sequence; its pages come as it grows."""
        if not self._free_slots:
            raise DoesNotFit(
                "one more sequence", self.plan.state_bytes, 0, "the cache pool",
                f"all {self.plan.num_slots - 1} slots are taken: close a sequence or open the pool with more",
            )  # fmt: skip
        slot = self._free_slots.pop()
        self._pages[slot] = {ratio: [] for ratio in self._free_pages}
        return slot

    def grow(self, slot: int, context: int) -> None:
        """Make room for `context` tokens of the sequence in `slot`."""
        if context > self.max_context:
            raise ContextTooLong(context, self.max_context, "shorten the prompt or open the pool with a larger context")
        held = self._pages[slot]
        missing = {ratio: max(0, pages_for(context, ratio) - len(pages)) for ratio, pages in held.items()}
        for ratio, count in missing.items():  # all or nothing: pages taken for one ratio alone would be of no use
            if count > (num_free := len(self._free_pages[ratio])):
                page = self.plan.page_bytes[ratio]
                raise DoesNotFit(
                    "a longer history", page * count, page * num_free, "the cache pool", "close a sequence first"
                )
        for ratio, count in missing.items():
            if count:
                new = [self._free_pages[ratio].pop() for _ in range(count)]
                first = len(held[ratio])
                self._tables[ratio][slot, first : first + count] = torch.tensor(new, device=self._device)
                held[ratio] += new

    def close(self, slot: int) -> None:
        """Give a sequence's slot and pages back.  Rows are left as they are: every read is justified by a write."""
        if slot not in self._pages:
            raise CacheInvariantBroken(f"slot {slot} was closed and is not open")
        for ratio, pages in self._pages.pop(slot).items():
            self._tables[ratio][slot] = 0
            self._free_pages[ratio] += reversed(pages)
        self._free_slots.append(slot)

    def layers(self, step: StepLike) -> list[LayerCache]:
        """The trunk's layers as `step` sees them."""
        return [self._layer(i, step) for i in range(self.config.num_hidden_layers)]

    def _layer(self, layer: int, step: StepLike) -> LayerCache:
        tails: dict[str, Tensor] = {}
        histories: dict[str, tuple[tuple[Tensor, ...], RowFormat, Tensor]] = {}
        for name, spec in self._streams[layer].items():
            planes = self._planes[layer, name]
            if spec.is_history:
                histories[name] = planes, self._row_format(spec), self._tables[spec.per_tokens]
            elif name.endswith("tail"):
                tails[name] = planes  # type: ignore[assignment]
        window = "window_kv" if "window_kv" in self._streams[layer] else "draft_kv"
        spec = self._streams[layer][window]
        return PooledLayer(step, self._planes[layer, window], self._row_format(spec), tails, histories)

    def draft_layer(self, step: StepLike) -> LayerCache:
        """The MTP stage as `step` sees it; the pool must have been opened with drafts."""
        return self._layer(self.config.num_hidden_layers, step)

    @property
    def draft_hidden(self) -> Tensor:
        """The trunk's last residual streams by slot, [S, R, J D]: what the MTP stage starts from."""
        return self._planes[self.config.num_hidden_layers, "draft_hidden"][0]

    def poison(self, value: float = float("nan")) -> None:
        """Fill every row with `value` (tests): a read that no write justifies then shows.  Spare rows stay zero."""
        for planes in self._planes.values():
            for plane in planes:
                if plane.dtype.is_floating_point:
                    plane.fill_(value)
                else:
                    plane.fill_(255)
                plane[:1] = 0
