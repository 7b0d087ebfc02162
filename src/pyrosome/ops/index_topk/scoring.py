"""Scores of index keys on the device: float32 [tokens, rows], a program for some rows and some tokens.

The keys of a program are the left operand, decoded once and held while one token after the other comes by, whose heads
are the columns.  So a score is the same sum wherever its token stands: a product of one tile of rows and one token's
heads, then the sum of that tile over its heads.  FP4 and bfloat16 keys are exact in bfloat16; so are queries that were
rounded to FP4.  Others are a sum of up to three such parts, of which all but the first are skipped where they are zero.
Float32 keys, which no production format has, are multiplied as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import device, gpu
from pyrosome.ops.gpu import Target, Variant
from pyrosome.ops.rows import PAGE_ROWS as PAGE_ROWS
from pyrosome.quant.rows import INDEX_GROUP

TOKENS = 64  # most tokens of a program
GROUP = tl.constexpr(INDEX_GROUP)
PROGRAMS = 512  # enough for any device; more tokens to a program then spare it decoding keys
# A warp has as many rows and heads in both: so the sum over heads is in one order.  Of three stages the queries after
# next are on their way while a token's are multiplied; of two, the next would be asked for when they are done.
VARIANTS = {
    "128": Variant("128", {"BLOCK_N": 128}, warps=8, stages=3),
    "256": Variant("256", {"BLOCK_N": 256}, warps=16, stages=3),
}
_FLOATS = Variant("floats", {"BLOCK_N": 32}, warps=4, stages=1)
_MOST_TILES = 65535  # of a grid, along its second side
_SPLIT = Variant("split", {}, warps=8, stages=1)


@gpu.jit
def _split_queries(
    q_ptr, parts_ptr, num_parts_ptr, first, num_tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    """A token's query as a sum of up to three in bfloat16, and how many; where the first is all of it, no others."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(q_ptr + (first + t) * SIZE + at, mask=at < SIZE, other=0.0)
    high = device.round_bf16(x)
    rest = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)  # nothing is left of what is not finite
    out_ptr = parts_ptr + t * SIZE + at
    part_stride = tl.cast(num_tokens, tl.int64) * SIZE
    tl.store(out_ptr, device.narrow(high, UPCAST), mask=at < SIZE)
    num_parts = 1
    if tl.max(tl.abs(rest)) > 0:
        middle = device.round_bf16(rest)
        tl.store(out_ptr + part_stride, device.narrow(middle, UPCAST), mask=at < SIZE)
        lowest = device.round_bf16(rest - middle)
        tl.store(out_ptr + 2 * part_stride, device.narrow(lowest, UPCAST), mask=at < SIZE)
        num_parts = tl.where(tl.max(tl.abs(lowest)) > 0, 3, 2)
    tl.store(num_parts_ptr + t, num_parts)


@triton.jit
def _fp4_rows(
    codes_ptr, scales_ptr, place, inside, G: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
    CHANNELS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows [N, C] at places of a pool, exact in bfloat16: a thread has the 16 bytes of a group, and its scale."""
    group = tl.arange(0, CHANNELS // GROUP)
    byte = tl.arange(0, GROUP // 2)
    loaded = inside[:, None] & (group < G)[None, :]
    scale = tl.load(scales_ptr + place[:, None] * SCALES + group[None, :], mask=loaded, other=127)
    scale = device.decode_e8m0(scale)[:, :, None]
    offset = place[:, None, None] * ROW + (group * (GROUP // 2))[None, :, None] + byte[None, None, :]
    code = tl.load(codes_ptr + offset, mask=loaded[:, :, None], other=0).to(tl.int32)
    rows = tl.join(device.decode_e2m1(code) * scale, device.decode_e2m1(code >> 4) * scale)
    return device.narrow(tl.reshape(rows, (BLOCK_N, CHANNELS)), UPCAST)  # narrowed last: else sm_100 does not compile


@triton.jit
def _weighted(product, weight, H: tl.constexpr, HEADS: tl.constexpr):
    """sum_h weight_h relu(product_h), [N] of [N, H]; NaN stays NaN."""
    product = tl.where(product < 0, 0.0, product) * weight[None, :]  # a maximum would lose NaN on a device
    if H < HEADS:  # what stands for no head is 0, though the key were infinite
        product = tl.where((tl.arange(0, HEADS) < H)[None, :], product, 0.0)
    return tl.sum(product, axis=1)


@gpu.jit
def _scores(
    q_ptr, parts_ptr, num_parts_ptr, rows_ptr, scales_ptr, table_ptr, span_ptr, weight_ptr, visible_ptr, out_ptr,
    first, num_tokens, each, first_row, end_row, span_rows, out_stride,
    FORMAT: tl.constexpr, H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    ROW: tl.constexpr, SCALES: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows first_row.. by tokens first..: `span_rows` is the pages of a span in the table, or its rows without one."""
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, num_tokens)
    low = tl.program_id(0) * BLOCK_N
    row = low + tl.arange(0, BLOCK_N)
    stored = first_row + row < end_row
    i = begin + tl.arange(0, TOKENS)
    seen = tl.full((TOKENS,), 0, tl.int64) + end_row
    if visible_ptr is not None:
        seen = tl.minimum(tl.load(visible_ptr + first + i, mask=i < end, other=0).to(tl.int64), seen)
    sees = (seen > first_row + low) & (i < end)
    span_of = tl.full((TOKENS,), 0, tl.int64)
    if span_ptr is not None:
        span_of = tl.load(span_ptr + first + i, mask=i < end, other=-1).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, CHANNELS)
    q_at = head[:, None] * C + channel[None, :]
    q_inside = (head < H)[:, None] & (channel < C)[None, :]
    t = tl.min(tl.where(sees, i, end))
    while t < end:  # tokens of one span after the other, from the first that sees these rows
        span = tl.sum(tl.where(i == t, span_of, 0))
        stop = tl.min(tl.where((i > t) & (span_of != span), i, end))
        most = tl.max(tl.where((i >= t) & (i < stop), seen, 0))
        inside = first_row + row < most  # what nobody sees is not read
        if table_ptr is not None:
            page = (first_row + row) // PAGE
            place = tl.load(table_ptr + span * span_rows + page, mask=inside, other=0).to(tl.int64) * PAGE
            place += (first_row + row) % PAGE
        else:
            place = span * span_rows + row
        if FORMAT == "f32":
            for j in tl.range(t, stop, num_stages=1):
                product = tl.zeros((BLOCK_N, HEADS), tl.float32)
                for c in tl.range(0, CHANNELS, 16, num_stages=1):
                    part = c + tl.arange(0, 16)
                    loaded = inside[:, None] & (part < C)[None, :]
                    rows = tl.load(rows_ptr + place[:, None] * ROW + part[None, :], mask=loaded, other=0.0)
                    loaded = (part < C)[:, None] & (head < H)[None, :]
                    q_j = q_ptr + tl.cast(first + j, tl.int64) * (H * C)
                    q = tl.load(q_j + part[:, None] + head[None, :] * C, mask=loaded, other=0.0)
                    product = tl.dot(rows, q, product, input_precision="ieee")
                weight = tl.load(weight_ptr + tl.cast(first + j, tl.int64) * H + head, mask=head < H, other=0.0)
                score = _weighted(product, weight, H, HEADS)
                tl.store(out_ptr + tl.cast(j, tl.int64) * out_stride + row, score, mask=stored)
        else:
            if FORMAT == "fp4":
                rows = _fp4_rows(
                    rows_ptr, scales_ptr, place, inside, C // GROUP, ROW, SCALES, CHANNELS, UPCAST, BLOCK_N
                )  # fmt: skip
            else:
                loaded = inside[:, None] & (channel < C)[None, :]
                rows = tl.load(rows_ptr + place[:, None] * ROW + channel[None, :], mask=loaded, other=0.0)
            for j in tl.range(t, stop):
                part_stride = tl.cast(num_tokens, tl.int64) * (H * C)
                q_j = parts_ptr + tl.cast(j, tl.int64) * (H * C) + q_at
                q = tl.load(q_j, mask=q_inside, other=0.0)
                num_parts = tl.load(num_parts_ptr + j)
                product = device.dot(rows, tl.trans(q), tl.zeros((BLOCK_N, HEADS), tl.float32), UPCAST)
                if num_parts > 1:
                    q = tl.load(q_j + part_stride, mask=q_inside, other=0.0)
                    product = device.dot(rows, tl.trans(q), product, UPCAST)
                if num_parts > 2:  # apart: products that follow each other would be cut for warps in another way
                    q = tl.load(q_j + 2 * part_stride, mask=q_inside, other=0.0)
                    product = device.dot(rows, tl.trans(q), product, UPCAST)
                weight = tl.load(weight_ptr + tl.cast(first + j, tl.int64) * H + head, mask=head < H, other=0.0)
                score = _weighted(product, weight, H, HEADS)
                tl.store(out_ptr + tl.cast(j, tl.int64) * out_stride + row, score, mask=stored)
        t = tl.min(tl.where((i >= stop) & sees, i, end))


class Keys(NamedTuple):
    """Rows of every span as the kernel reads them: in a pool's pages, or one span behind the other."""

    format: str  # "fp4", "bf16" or "f32"
    rows: Tensor  # [places or rows, elements]
    scales: Tensor | None  # of FP4 rows
    table_BP: Tensor | None
    span_T: Tensor | None  # None: there is one span
    span_rows: int  # pages of a span in the table, or its rows without one


class Queries(NamedTuple):
    """Tokens and, once they are split, what three numbers of bfloat16 each hold of some of their queries."""

    q_THC: Tensor
    weight_TH: Tensor
    visible_T: Tensor | None  # None: every row counts
    parts: Tensor | None = None  # bfloat16 [3, tokens at hand, H, C]
    num_parts: Tensor | None = None  # int32 [tokens at hand]: how many of them a query has


def split(queries: Queries, first: int, last: int, target: Target) -> Queries:
    """With the queries of tokens first..last in parts: they come in as they are multiplied, for keys of any number."""
    _, H, C = queries.q_THC.shape
    parts = queries.q_THC.new_empty(3, last - first, H, C, dtype=torch.bfloat16)
    num_parts = queries.q_THC.new_empty(last - first, dtype=torch.int32)
    gpu.launch(
        _split_queries, (last - first,), queries.q_THC, parts, num_parts, first, last - first, SIZE=H * C,
        BLOCK=gpu.pow2(H * C), UPCAST=target.interpreted, variant=_SPLIT,
    )  # fmt: skip
    return queries._replace(parts=parts, num_parts=num_parts)


def score(queries: Queries, keys: Keys, out: Tensor, tokens: tuple[int, int], rows: tuple[int, int]) -> None:
    """Scores of tokens first..last and rows low..high into out [tokens, at least rows]; not of rows nobody sees."""
    (first, last), (low, high) = tokens, rows
    _, H, C = queries.q_THC.shape
    target = gpu.target(out.device)
    variant = _variant(keys.format, H, C, target)
    row_tiles = gpu.cdiv(high - low, variant.constants["BLOCK_N"])
    num_tokens = last - first
    each = max(1, min(TOKENS, num_tokens * row_tiles // PROGRAMS), gpu.cdiv(num_tokens, _MOST_TILES))
    gpu.launch(
        _scores, (row_tiles, gpu.cdiv(num_tokens, each)), queries.q_THC, queries.parts, queries.num_parts, keys.rows,
        keys.scales, keys.table_BP, keys.span_T, queries.weight_TH, queries.visible_T, out, first, num_tokens, each,
        low, high, keys.span_rows, out.stride(0), FORMAT=keys.format, H=H, C=C, HEADS=gpu.pow2(H, 16),
        CHANNELS=gpu.pow2(C, 32), ROW=keys.rows.stride(0), SCALES=0 if keys.scales is None else keys.scales.stride(0),
        PAGE=PAGE_ROWS, TOKENS=TOKENS, UPCAST=target.interpreted, variant=variant,
        matrix="" if keys.format == "f32" else "bf16",
    )  # fmt: skip


def variants(target: Target) -> dict[str, Variant]:
    """Those that keep to a device's registers, and multiply on its matrix units in one way."""
    return VARIANTS if target.capability // 10 == 9 else {"128": VARIANTS["128"]}


def _variant(row_format: str, H: int, C: int, target: Target) -> Variant:
    if row_format == "f32":
        return _FLOATS
    fit = variants(target)
    default = "256" if row_format == "fp4" and "256" in fit else "128"
    return gpu.chosen("index_scores", f"{row_format},H={H},C={C}", fit, default, target)
