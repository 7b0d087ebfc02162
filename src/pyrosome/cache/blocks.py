"""History in blocks of 128 tokens: the unit that prefixes are named in, moved in, and stored in.

A block is one run of bytes: every history stream's rows of its 128 tokens, stream after stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.cache.streams import BLOCK_TOKENS, PAGE_ROWS


def block_bytes(pool: CachePool) -> int:
    """Bytes of one block."""
    return sum(size for _, size, _ in _planes(pool))


def read_blocks(
    pool: CachePool, pages: dict[int, list[int]], first: int, last: int, out: Tensor | None = None
) -> Tensor:
    """Blocks first..last of the sequence whose pages these are, uint8 [n, block_bytes], on the host.

    Args:
        out: at least so many rows on the host, to be used again: memory that is new costs more than what is copied.
    """
    n, size = last - first, block_bytes(pool)
    if out is None:
        out = torch.empty(n, size, dtype=torch.uint8)
    places = {ratio: _places(pool, held, ratio, first, last) for ratio, held in pages.items()}
    out, at = out[:n], 0
    # From a device it is one transfer, not one a plane.
    gathered = out if pool.device.type == "cpu" else torch.empty_like(out, device=pool.device)
    for rows, width, ratio in _planes(pool):
        gathered[:, at : at + width].copy_(rows.index_select(0, places[ratio]))
        at += width
    return out if gathered is out else out.copy_(gathered)


def read_block(pool: CachePool, pages: dict[int, int], block: int) -> Tensor:
    """One block, uint8 [block_bytes], on the host; `pages` are the ones that hold it."""
    parts = []
    for rows, _, ratio in _planes(pool):
        per_page = PAGE_ROWS * ratio // BLOCK_TOKENS
        parts.append(rows[pages[ratio] * per_page + block % per_page])
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.uint8)


def write_blocks(pool: CachePool, pages: dict[int, list[int]], first: int, data: Tensor) -> None:
    """Put blocks first.. into pages that nobody else reads yet."""
    data = data.to(pool.device)
    places = {ratio: _places(pool, held, ratio, first, first + len(data)) for ratio, held in pages.items()}
    at = 0
    for rows, size, ratio in _planes(pool):
        _put(rows, places[ratio], data[:, at : at + size])
        at += size


def _put(rows: Tensor, places: Tensor, data: Tensor) -> None:
    if rows.device.type == "cpu":  # torch takes four times as long to copy rows to places
        rows.numpy()[places.numpy()] = data.numpy()
    else:
        rows[places] = data


def _places(pool: CachePool, pages: list[int], ratio: int, first: int, last: int) -> Tensor:
    """Where each block's rows begin, counted in runs of one block."""
    per_page = PAGE_ROWS * ratio // BLOCK_TOKENS
    block = torch.arange(first, last, device=pool.device)
    return torch.tensor(pages, dtype=torch.int64, device=pool.device)[block // per_page] * per_page + block % per_page


def _planes(pool: CachePool) -> Iterator[tuple[Tensor, int, int]]:
    """(a plane as runs of one block's rows [N, bytes], bytes, ratio) for every history stream, in a fixed order."""
    for (layer, name), planes in pool.planes.items():
        spec = pool.streams[layer][name]
        if spec.is_history:
            for plane in planes:
                runs = plane.view(torch.uint8).view(plane.shape[0] * spec.per_tokens // BLOCK_TOKENS, -1)
                yield runs, runs.shape[1], spec.per_tokens
