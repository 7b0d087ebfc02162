"""Pairs of a token and an expert, sorted by expert and cut into tiles of one expert each, on the device.

Nothing is read back: there are as many tiles as there could be, and those past the last are empty.  A program sorts a
chunk of the pairs: a pair's place is where its expert starts, plus the pairs of that expert before it, in earlier
chunks (whose counts a first launch made, where there is more than one) and in its own.  So the order is stable.
Shape letters: N pairs, G tiles, E experts, C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant

_FEW, _MANY = Variant("few", {"BLOCK": 128}, warps=4, stages=1), Variant("many", {"BLOCK": 512}, warps=8, stages=1)


class Tiles(NamedTuple):
    """Where each tile's pairs are."""

    order_N: Tensor  # int32: pairs (t K + k) by expert; those without one are left out, and the end holds anything
    tile_G3: Tensor  # int32: place of the expert in the bank, first and last (exclusive) pair in `order_N`


def sorted_pairs(expert_N: Tensor, first: int, num_experts: int, rows: int) -> Tiles:
    """Pairs of experts `first` to `first + num_experts`, in tiles of at most `rows`."""
    N, E = expert_N.numel(), num_experts
    G = min(N, N // rows + min(E, N))
    variant = _FEW if N <= 128 else _MANY
    C = gpu.cdiv(N, variant.constants["BLOCK"])
    bins = gpu.pow2(E + 1, 16)
    order_N = torch.empty(N, dtype=torch.int32, device=expert_N.device)
    tile_G3 = torch.empty(G, 3, dtype=torch.int32, device=expert_N.device)
    counts = None
    if C > 1:
        counts = torch.empty(C, bins, dtype=torch.int32, device=expert_N.device)
        gpu.launch(_count, (C,), expert_N, counts, N, first, E=E, BINS=bins, variant=variant)
    gpu.launch(_sort, (C,), expert_N, counts, order_N, tile_G3, N, first, G, rows, E=E, BINS=bins, variant=variant)
    return Tiles(order_N, tile_G3)


@triton.jit
def _places(expert_ptr, at, num_pairs, first, E: tl.constexpr):
    """Where the experts of pairs `at` stand in the bank; E for none, and for one held elsewhere."""
    place = tl.load(expert_ptr + at, mask=at < num_pairs, other=-1).to(tl.int32)
    held = (place >= 0) & (place >= first) & (place < first + E)
    return tl.where(held, place - first, E)


@gpu.jit
def _count(expert_ptr, counts_ptr, num_pairs, first, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    place = _places(expert_ptr, chunk * BLOCK + tl.arange(0, BLOCK), num_pairs, first, E)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(place, BINS))


@gpu.jit
def _sort(
    expert_ptr, counts_ptr, order_ptr, tile_ptr, num_pairs, first, num_tiles, rows,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    at = chunk * BLOCK + i
    place = _places(expert_ptr, at, num_pairs, first, E)
    expert = tl.arange(0, BINS)
    if counts_ptr is None:
        total = tl.histogram(place, BINS)
        before = tl.zeros([BINS], tl.int32)
    else:
        total = tl.zeros([BINS], tl.int32)
        before = tl.zeros([BINS], tl.int32)
        for c0 in range(0, tl.num_programs(0), 16):
            c = c0 + tl.arange(0, 16)
            inside = c[:, None] < tl.num_programs(0)
            count = tl.load(counts_ptr + c[:, None] * BINS + expert[None, :], mask=inside, other=0)
            total += tl.sum(count, axis=0)
            before += tl.sum(tl.where(c[:, None] < chunk, count, 0), axis=0)
    total = tl.where(expert < E, total, 0)
    start = tl.cumsum(total) - total
    # The place of each pair: in its own chunk, those of its expert before it are counted one by one.
    rank = tl.zeros([BLOCK], tl.int32)
    for j0 in range(0, BLOCK, 32):
        j = j0 + tl.arange(0, 32)
        other = _places(expert_ptr, chunk * BLOCK + j, num_pairs, first, E)
        earlier = (other[None, :] == place[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(order_ptr + tl.gather(start + before, place, 0) + rank, at, mask=place < E)
    # The tiles, shared out among the programs.
    tiles = (total + (rows - 1)) // rows
    past = tl.cumsum(tiles)
    for g0 in range(chunk * 32, num_tiles, tl.num_programs(0) * 32):
        g = g0 + tl.arange(0, 32)
        mine = tl.sum(((past[None, :] <= g[:, None]) & (expert[None, :] < E)).to(tl.int32), axis=1)
        used = mine < E
        begin = tl.gather(start, mine, 0) + (g - tl.gather(past - tiles, mine, 0)) * rows
        end = tl.minimum(begin + rows, tl.gather(start + total, mine, 0))
        inside = g < num_tiles
        tl.store(tile_ptr + g * 3, tl.where(used, mine, 0), mask=inside)
        tl.store(tile_ptr + g * 3 + 1, tl.where(used, begin, 0), mask=inside)
        tl.store(tile_ptr + g * 3 + 2, tl.where(used, end, 0), mask=inside)
