"""History shared out between ranks: each keeps the rows of its own pages, and reads are put together.

Page i of a sequence's stream belongs to rank i % size: a function of the position alone, so a fork or a reused prefix
finds its pages where they are.  Windows and tails are small, and every rank keeps its own.
Shape letters: M rows emitted, N rows read, C row width, P pages per sequence, B spans, T tokens, E projected channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.cache.views import LayerCache, PagedRows, PooledLayer, WindowRows
from pyrosome.dist import Mesh
from pyrosome.ops.compress import Emit
from pyrosome.ops.rows import RowSource


def shard_layers(layers: Sequence[LayerCache], mesh: Mesh) -> list[LayerCache]:
    """The layers of a pool (`CachePool.layers`) with their history shared out between the ranks of `mesh`."""
    return [
        layer if mesh.size == 1 or not isinstance(layer, PooledLayer) else SharedLayer(layer, mesh) for layer in layers
    ]


def page_owner(page: Tensor, mesh: Mesh) -> Tensor:
    """Which rank keeps a page, by the page's place in its sequence."""
    return page % mesh.size


class SharedLayer:
    """One layer's streams, of which this rank keeps its state whole and its own pages of history."""

    def __init__(self, layer: PooledLayer, mesh: Mesh) -> None:
        self.layer, self.mesh, self.ring_rows = layer, mesh, layer.ring_rows

    def window(self, fresh_TC: Tensor) -> WindowRows:
        return self.layer.window(fresh_TC)

    def stored(self, rows: Tensor) -> Tensor:
        return self.layer.stored(rows)

    def keep_window(self, rows_TC: Tensor) -> None:
        self.layer.keep_window(rows_TC)

    def tail(self, name: str, like_TE: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.tail(name, like_TE)

    def keep_tail(self, name: str, kv_TE: Tensor, gate_TE: Tensor) -> None:
        self.layer.keep_tail(name, kv_TE, gate_TE)

    def history(self, name: str, rows_MC: Tensor, emit: Emit, ratio: int) -> RowSource:
        """Rows of other ranks' pages are written where rows go that nobody keeps."""
        page_M = emit.end // ratio // PAGE_ROWS
        mine = emit._replace(end=torch.where(page_owner(page_M, self.mesh) == self.mesh.rank, emit.end, -1))
        rows = self.layer.history(name, rows_MC, mine, ratio)
        assert isinstance(rows, PagedRows)
        return SharedRows(rows, self.mesh)


class SharedRows(PagedRows):
    """Rows of which each rank has some: every rank asks for the same ones, gives what it has, and gets them all.

    Stored bytes are exchanged, not partial attentions: they are what one rank would have read, so everything after
    them is computed as on one rank, in the order of positions.
    """

    def __init__(self, rows: PagedRows, mesh: Mesh) -> None:
        vars(self).update(vars(rows))  # the same rows, of the same pool
        self.mesh = mesh
        page_P = torch.arange(rows.table_BP.shape[1], device=rows.table_BP.device)
        # Page 0 is nobody's: what stands there is not to be given.
        self.table_BP = rows.table_BP.masked_fill(page_owner(page_P, mesh) != mesh.rank, 0)

    @property
    def stored(self) -> None:
        """Never in place: the bytes are other ranks' as well."""
        return None

    def decode_places(self, place_N: Tensor) -> Tensor:
        missing_N1 = (place_N < PAGE_ROWS)[:, None]
        mine = [plane.index_select(0, place_N).masked_fill_(missing_N1, 0) for plane in self.planes]
        return self.row_format.decode(self.mesh.all_reduce_exact(mine))
