"""The best rows of many, on the device: those above an edge, and the first of those that equal it.

A program keeps the best K of a block of scores, in the order of rows; where there are several blocks, what they kept is
gone through again, until one is left.  Scores are ordered as integers, and the edge is found by halving their range, so
the result is one set whatever the blocks are.  Nothing is sorted, and no block waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Target, Variant

VARIANTS = {
    "1024": Variant("1024", {"BLOCK": 1024, "PART": 1024}, warps=4, stages=1),
    "4096": Variant("4096", {"BLOCK": 4096, "PART": 2048}, warps=8, stages=1),
    "8192": Variant("8192", {"BLOCK": 8192, "PART": 4096}, warps=16, stages=1),
    "16384": Variant("16384", {"BLOCK": 16384, "PART": 4096}, warps=16, stages=1),
}
LEAST = tl.constexpr(-(1 << 31))
MOST_ROWS = 16384  # of one block
MOST_KEPT = MOST_ROWS // 2  # of several blocks: else nothing would be left out


@triton.jit
def _in_order(score_ptr, index_ptr, column, end):
    """Row numbers and scores at some columns, the scores as int32 that are ordered as they are; LEAST for none."""
    valid = column < end
    row = column
    if index_ptr is not None:
        row = tl.load(index_ptr + column, mask=valid, other=-1)
        valid = row >= 0
    bits = tl.load(score_ptr + column, mask=valid, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == LEAST, 0, bits)  # -0.0 is 0.0
    return row, tl.where(valid, tl.maximum(_turned(bits), LEAST + 1), LEAST)  # the one below is a NaN too


@triton.jit
def _turned(bits):
    """Bits of floats as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gpu.jit
def _best_rows(
    score_ptr, index_ptr, visible_ptr, best_score_ptr, best_index_ptr, first, width, stride, K, first_out, out_stride,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of the scores [tokens, width]: of rows 0.., or of the rows in `index`, which ascend and where -1 stands for none.

    A block's K best are at its place of [tokens, blocks x K]; where there are fewer, -1 and -inf follow.
    """
    t = tl.program_id(0).to(tl.int64)
    score_ptr += t * stride
    end = width
    if index_ptr is not None:
        index_ptr += t * stride
    else:
        end = tl.minimum(tl.load(visible_ptr + first + t).to(tl.int64), width).to(tl.int32)
    low_column = tl.program_id(1) * BLOCK
    _, order = _in_order(score_ptr, index_ptr, low_column + tl.arange(0, BLOCK), end)
    total = tl.sum((order > LEAST).to(tl.int32))
    edge = tl.min(order)
    ties = total
    if total > K:
        low = tl.min(tl.where(order > LEAST, order, 0x7FFFFFFF))
        edge = tl.max(order)
        above = 0
        while low < edge:  # at most K are above the edge; more are above what is below `low`
            middle = (low & edge) + ((low ^ edge) >> 1)
            count = tl.sum((order > middle).to(tl.int32))
            edge = tl.where(count <= K, middle, edge)
            above = tl.where(count <= K, count, above)
            low = tl.where(count == K, middle, tl.where(count < K, low, middle + 1))
        ties = K - above
    out = (t + first_out) * out_stride + tl.program_id(1).to(tl.int64) * K
    best_score_ptr += out
    best_index_ptr += out
    num_greater = 0
    num_equal = 0
    for part in tl.range(0, BLOCK, PART, num_stages=1):  # a part at a time, read again: registers hold no more
        lane = part + tl.arange(0, PART)
        row, key = _in_order(score_ptr, index_ptr, low_column + lane, end)
        greater = key > edge
        equal = (key == edge) & (key > LEAST)
        upto = tl.cumsum(greater.to(tl.int32) | (equal.to(tl.int32) << 16), axis=0)  # both at once
        equal_here = num_equal + (upto >> 16)
        place = num_greater + (upto & 0xFFFF) + tl.minimum(equal_here, ties) - 1
        take = greater | (equal & (equal_here <= ties))
        tl.store(best_index_ptr + place, row, mask=take)
        tl.store(best_score_ptr + place, _turned(key).to(tl.float32, bitcast=True), mask=take)
        nothing = (lane >= tl.minimum(total, K)) & (lane < K)
        tl.store(best_index_ptr + lane, lane * 0 - 1, mask=nothing)
        tl.store(best_score_ptr + lane, lane * 0.0 - float("inf"), mask=nothing)
        num_greater += tl.sum(greater.to(tl.int32))
        num_equal += tl.sum(equal.to(tl.int32))


class Round(NamedTuple):
    """One time through what is left of a row's scores."""

    variant: Variant
    width: int  # scores that it looks at
    num_blocks: int


def plan(width: int, K: int, target: Target) -> list[Round]:
    """How the K best of `width` scores are found; K is at most MOST_KEPT, or all fit one block."""
    rounds: list[Round] = []
    while not rounds or rounds[-1].num_blocks > 1:
        width = rounds[-1].num_blocks * K if rounds else width
        # A block must hold all, or leave out half of what it sees.
        fit = {name: v for name, v in VARIANTS.items() if v.constants["BLOCK"] >= min(gpu.pow2(width), gpu.pow2(2 * K))}
        default = next((name for name, v in fit.items() if v.constants["BLOCK"] >= width), str(MOST_ROWS))
        variant = gpu.chosen("best_rows", f"N<={gpu.pow2(width)},K<={gpu.pow2(K)}", fit, default, target)
        rounds.append(Round(variant, width, gpu.cdiv(width, variant.constants["BLOCK"])))
    return rounds


def kept_bytes(rounds: list[Round], K: int) -> int:
    """Bytes a token takes between rounds."""
    return sum(12 * r.num_blocks * K for r in rounds[:-1])


def choose(
    score: Tensor, visible_T: Tensor, rounds: list[Round], tokens: tuple[int, int], out: tuple[Tensor, Tensor]
) -> None:
    """The best of score [tokens, width] of tokens first..last, into their places of out: (score, index) [T, K]."""
    (first, last), K = tokens, out[0].shape[1]
    index: Tensor | None = None
    for r in rounds:
        is_last = r is rounds[-1]
        if is_last:
            best_score, best_index = out
        else:
            stride = gpu.cdiv(r.num_blocks * K, 16) * 16
            best_score = score.new_empty(last - first, stride)
            best_index = score.new_empty(last - first, stride, dtype=out[1].dtype)  # one kernel, last or not
        gpu.launch(
            _best_rows, (last - first, r.num_blocks), score, index, visible_T, best_score, best_index, first, r.width,
            score.stride(0), K, first if is_last else 0, best_score.stride(0), variant=r.variant,
        )  # fmt: skip
        score, index = best_score, best_index
