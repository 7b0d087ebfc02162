"""A sequence's state at one length, as one run of bytes: what a boundary, a parked sequence or a file keeps.

At a multiple of 128 tokens that is the windows and the older half of the CSA tails.  Elsewhere it is also the HCA tails
and the history rows finished since the last multiple, which no block of 128 tokens holds yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS, StreamSpec
from pyrosome.errors import CacheInvariantBroken


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """State after `length` tokens."""

    length: int
    draft_from: int  # first position whose row the draft stage's window holds; `length` for none
    data: Tensor  # uint8, on the host

    @property
    def num_bytes(self) -> int:
        return self.data.numel()


def take_snapshot(pool: CachePool, holding: Holding, length: int, draft_from: int = 0) -> Snapshot:
    """Copy the state of a sequence of `length` tokens out of the pool."""
    if not holding.slot:
        raise CacheInvariantBroken(f"a sequence of {length} tokens has no state in the pool to copy")
    parts = []
    for spec, low, plane, index, width in _places(pool, holding, length):
        rows = plane[index, :width].contiguous().view(torch.uint8)
        if spec.name == "draft_kv":  # what the stage did not write is of whoever had the slot before
            rows[: max(0, draft_from - low)] = 0
        parts.append(rows.flatten())
    return Snapshot(length, draft_from, torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.uint8))


def put_snapshot(pool: CachePool, holding: Holding, snapshot: Snapshot) -> None:
    """Copy a state into the slot and pages of a holding prepared for positions up to its length."""
    if (expected := snapshot_bytes(pool, snapshot.length)) != snapshot.num_bytes:
        raise CacheInvariantBroken(
            f"a state of {snapshot.length} tokens has {snapshot.num_bytes} bytes and this cache keeps {expected}"
        )
    data, at = snapshot.data.to(pool.device), 0
    for _, _, plane, index, width in _places(pool, holding, snapshot.length):
        size = len(index) * width * plane.element_size()
        rows = data[at : at + size].view(len(index), -1)
        target = plane.view(torch.uint8)  # [rows, bytes]
        target[index, : rows.shape[1]] = rows
        at += size


def snapshot_bytes(pool: CachePool, length: int) -> int:
    """Bytes of a state after `length` tokens."""
    return sum(
        num_rows * sum(width * plane.element_size() for plane, width in planes)
        for planes, num_rows in _extents(pool, length)
    )


def _extents(pool: CachePool, length: int) -> Iterator[tuple[list[tuple[Tensor, int]], int]]:
    for (layer, name), planes in pool.planes.items():
        low, high, narrow = _kept(pool, layer, pool.streams[layer][name], length)
        yield [(p, p.shape[-1] // 2 if narrow else p.shape[-1]) for p in planes], high - low


def _places(pool: CachePool, holding: Holding, length: int) -> Iterator[tuple[StreamSpec, int, Tensor, Tensor, int]]:
    """(stream, first row, plane as rows [N, C], places of the rows kept, channels kept), in a fixed order."""
    for (layer, name), planes in pool.planes.items():
        spec = pool.streams[layer][name]
        low, high, narrow = _kept(pool, layer, spec, length)
        if low == high:
            continue
        row = torch.arange(low, high, device=pool.device)
        if spec.is_history:
            pages = torch.tensor(holding.pages[spec.per_tokens], dtype=torch.int64, device=pool.device)
            place = pages[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS
        else:
            place = row % planes[0].shape[1]
        for plane in planes:
            rows = plane if spec.is_history else plane[holding.slot]
            yield spec, low, rows, place, rows.shape[-1] // 2 if narrow else rows.shape[-1]


def _kept(pool: CachePool, layer: int, spec: StreamSpec, length: int) -> tuple[int, int, bool]:
    """(first, one past the last) row that positions from `length` on may read; whether half its channels will do."""
    if spec.is_history:
        return length // BLOCK_TOKENS * (BLOCK_TOKENS // spec.per_tokens), length // spec.per_tokens, False
    assert spec.keep is not None
    if not spec.name.endswith("tail"):
        # A draft stage trails by one position, whose row it has yet to write.
        trail = 1 if spec.name == "draft_kv" else 0
        kept = spec.keep - 1 if spec.reads_own else spec.keep
        return max(0, length - trail - kept), max(0, length - trail), False
    ratio = pool.config.layer_ratios[layer]
    end = length // ratio * ratio + ratio - 1  # where the next row is finished
    low = max(0, end - spec.keep + 1)
    # With overlap the older half of a window contributes its first channels only.
    return min(low, length), length, spec.keep > ratio and length % ratio == 0
