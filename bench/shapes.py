"""What `bench.kernels` and `bench.wide` measure with: V4-Flash's widths, values that come from memory, ceilings.

Shape letters: N outputs or rows, K inputs, C row width, P pages.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.streams import PAGE_ROWS
from pyrosome.cache.views import PagedRows
from pyrosome.config import ModelConfig
from pyrosome.ops import native
from pyrosome.quant import FORMATS, QuantTensor
from pyrosome.quant.rows import RowFormat
from pyrosome.quant.tiles import tiled_bytes

ALIGNMENT = 64  # bytes: where a value begins within a buffer of several
BLOCK_ROWS = 16384  # rows encoded at once


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is that a run of `bench.kernels` measures."""

    config: ModelConfig
    cold_bytes: int  # of different weights or rows that calls go round, so that each comes from memory
    read_bytes: int  # of the buffer whose sum is the ceiling of reading
    gemm: int  # rows, columns and inputs of the product that is the ceiling of computing
    seconds: float  # CPU time for the calls of a row, about
    many: int  # tokens of a large product
    head_rows: int
    experts: int  # resident routed experts
    index_rows: int
    csa_rows: int
    hca_rows: int


FULL = Size(ModelConfig.preset("flash"), 180_000_000, 512 << 20, 2048, 1.0, 512, 16384, 32, 262144, 65536, 8192)
QUICK = Size(
    ModelConfig.preset(
        "flash", hidden_size=256, moe_intermediate_size=128, num_attention_heads=4, head_dim=128, q_lora_rank=128,
        o_groups=2, o_lora_rank=64, index_n_heads=4, index_head_dim=64, index_topk=32, sliding_window=16,
        n_routed_experts=16,
    ),
    200_000, 1 << 20, 128, 0.005, 32, 512, 8, 2048, 1024, 256,
)  # fmt: skip


class Ceilings:
    """What this machine can do now, by one thread's CPU time: bytes read and bfloat16 FLOPs per second."""

    def __init__(self, read_bytes: int, gemm: int = 0) -> None:
        # On huge pages, as weights are: else the misses of address translation would lower the ceiling.
        self._values = native.empty_pages(read_bytes).view(torch.int64).fill_(1)
        g = torch.Generator().manual_seed(1)
        self._a, self._b = (torch.randn(gemm, gemm, generator=g).bfloat16() for _ in range(2))

    def read(self, repeats: int = 5) -> float:
        """Bytes per second of summing a buffer that no cache holds: the median of so many times."""
        return self._values.nbytes / statistics.median(cpu_seconds(self._values.sum) for _ in range(repeats))

    def gemm(self, repeats: int = 5) -> float:
        """FLOPs per second of a square bfloat16 product by torch: the median of so many times."""
        flops = 2 * self._a.shape[0] ** 3
        return flops / statistics.median(cpu_seconds(lambda: self._a @ self._b) for _ in range(repeats))


def cpu_seconds(run: Callable[[], Any]) -> float:
    """This thread's CPU time for one call."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


def normal(*shape: int) -> Tensor:
    """Seeded values of unit variance; others for another shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def native_bytes(weight: Tensor | QuantTensor) -> int:
    """What a product with this weight reads."""
    if isinstance(weight, QuantTensor):
        return weight.data.nbytes + weight.scale.nbytes
    return weight.nbytes


def quantized(kind: str, N: int, K: int, seed: int) -> QuantTensor:
    """A seeded weight [N, K] whose outputs are near one."""
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * K**-0.5
    return QuantTensor(kind, *FORMATS[kind].quantize(values))


def stacked(weight: QuantTensor, count: int) -> QuantTensor:
    """A stack of the same matrix, so many times."""
    data, scale = (x.view(torch.uint8).expand(count, *x.shape) for x in (weight.data, weight.scale))
    return QuantTensor(weight.format, data.view(weight.data.dtype), scale.view(weight.scale.dtype))


def copies(weights: list[tuple[Tensor | QuantTensor, int]], cold_bytes: int) -> list[list[Tensor | QuantTensor]]:
    """Groups of copies of some (weight, parts), as the kernels keep them: so many that a round comes from memory.

    One buffer holds all copies of all weights: short ones of their own would not lie on huge pages.
    """
    sizes = [_kept_bytes(value, parts) for value, parts in weights]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    count = max(2, -(-cold_bytes // sum(sizes)))
    buffer = native.empty_pages(count, sum(rooms))
    groups = []
    for row in buffer:
        places = row.split(rooms)
        held = zip(weights, sizes, places, strict=True)
        groups.append([_kept(value, parts, place[:size]) for (value, parts), size, place in held])
    return groups


def _kept_bytes(value: Tensor | QuantTensor, parts: int) -> int:
    if isinstance(value, QuantTensor):
        *lead, N, K = value.shape
        return math.prod(lead) * parts * tiled_bytes(value.format, N // parts, K)
    return value.nbytes


def _kept(value: Tensor | QuantTensor, parts: int, place: Tensor) -> Tensor | QuantTensor:
    if isinstance(value, QuantTensor):
        return native.tiled(value, parts, out=place.view(*value.shape[:-2], -1))
    kept = place.view(value.dtype).view(value.shape)
    return kept.copy_(value)


def encoded(row_format: RowFormat, num_rows: int, width: int, seed: int) -> tuple[Tensor, ...]:
    """Seeded rows of unit variance as they are stored: planes [N, bytes]."""
    g = torch.Generator().manual_seed(seed)
    blocks = [min(BLOCK_ROWS, num_rows - low) for low in range(0, num_rows, BLOCK_ROWS)]
    parts = [row_format.encode(torch.randn(n, width, generator=g)) for n in blocks]
    return tuple(torch.cat(planes) for planes in zip(*parts, strict=True))


def pools(planes: tuple[Tensor, ...], row_format: RowFormat, cold_bytes: int) -> list[PagedRows]:
    """Copies of the same rows, each in shuffled pages of its own: so many that a round comes from memory.

    Row 0 of a pool is nobody's, so its first page is left out.
    """
    N = planes[0].shape[0]
    assert N % PAGE_ROWS == 0
    P, g = N // PAGE_ROWS, torch.Generator().manual_seed(2)
    count = max(2, -(-cold_bytes // sum(plane.nbytes for plane in planes)))
    tables = [1 + i * P + torch.randperm(P, generator=g) for i in range(count)]
    stored = []
    for plane in planes:
        room = native.empty_pages(1 + count * P, PAGE_ROWS, plane.shape[1])
        room[0] = 0
        for table in tables:
            room[table] = plane.view(P, PAGE_ROWS, -1)
        stored.append(room.flatten(0, 1))
    step: Any = SimpleNamespace(span_T=torch.zeros(1, dtype=torch.int64), context=N)
    return [PagedRows(tuple(stored), row_format, table[None], step, 1) for table in tables]


def rms(found: Tensor, expected: Tensor) -> float:
    """Relative RMS difference, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def planted_ties(
    q_HC: Tensor, weight_H: Tensor, planes: tuple[Tensor, ...], row_format: RowFormat, topk: int
) -> tuple[Tensor, Tensor]:
    """Scores [N] of FP4 rows in float64, and the sizes of their terms, once ties stand at the edge of the choice.

    The worst row that is chosen is written over two that are not, one before and one after it.
    """
    score_N, _ = _scores(q_HC, weight_H, row_format.decode(planes))
    order_N = score_N.argsort(descending=True)
    edge, rest = int(order_N[topk - 1]), order_N[topk:]
    for other in (rest[rest < edge][:1], rest[rest > edge][:1]):
        for plane in planes:
            plane[other] = plane[edge].clone()
    return _scores(q_HC, weight_H, row_format.decode(planes))


def _scores(q_HC: Tensor, weight_H: Tensor, row_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Head by head: equal rows have equal scores, which a product over heads would not promise."""
    row_NC, total_N, size_N = row_NC.double(), torch.zeros(len(row_NC)).double(), torch.zeros(len(row_NC)).double()
    for q_C, weight in zip(q_HC.double(), weight_H.double(), strict=True):
        term_N = weight * (row_NC @ q_C).relu()  # exact: FP4 by FP4
        total_N += term_N
        size_N += term_N.abs()
    return total_N, size_N
