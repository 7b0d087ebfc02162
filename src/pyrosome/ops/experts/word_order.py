"""Rows in the order in which words of codes are decoded.

A 32-bit word has C codes: eight of FP4, four of FP8.  Codes i and i + C / 2 lie 16 bits apart, as the two bfloat16 of
a register do: so a shift and a mask bring two of them into place.  A matrix instruction takes its left operand in
pairs, of which neighbouring threads have one each; with the inputs of four words in the order (code i, word q, half h)
for input C q + C / 2 h + i, a thread's pairs all come from one word, and nothing moves between threads.  A product does
not ask in which order its inputs are, as long as both operands have the same.
Shape letters: M rows, K channels, P of them with padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.device import bits_of, decode_e4m3, split3
from pyrosome.ops.gpu import Variant
from pyrosome.ops.linear.quantize import fp8_groups, padded

_PIECE = Variant("piece", {"BLOCK": 1024}, warps=4, stages=1)


def ordered_rows(x_MK: Tensor, codes: int, *, rounded: bool) -> Tensor:
    """Rows in the order of words of so many codes, zeros past K.

    Rounded to FP8, bfloat16 [M, P], or in three parts, bfloat16 [3, M, P].
    """
    M, K = x_MK.shape
    P = padded(K)
    out = x_MK.new_empty((M, P) if rounded else (3, M, P), dtype=torch.bfloat16)
    grid = (M, gpu.cdiv(P, _PIECE.constants["BLOCK"]))
    gpu.launch(_ordered, grid, x_MK.contiguous(), out, M, K, CODES=codes, ROUND=rounded, variant=_PIECE)
    return out


@triton.jit
def input_at(place, CODES: tl.constexpr):
    """Which input is at a place of word order."""
    HALF: tl.constexpr = CODES // 2
    within = place % (4 * CODES)
    return place - within + (within // 2) % 4 * CODES + within % 2 * HALF + within // 8


@triton.jit
def place_of(input, CODES: tl.constexpr):
    """Where an input is in word order."""
    HALF: tl.constexpr = CODES // 2
    within = input % (4 * CODES)
    return input - within + within % HALF * 8 + within // CODES * 2 + within // HALF % 2


@gpu.jit
def _ordered(x_ptr, out_ptr, M, K, CODES: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    P = (K + 127) // 128 * 128
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = input_at(place, CODES)
    x = tl.load(x_ptr + row * K + channel, mask=channel < K, other=0.0)
    at = out_ptr + row * P + place
    if ROUND:
        code, scale = fp8_groups(tl.reshape(x, [BLOCK // 128, 128]))
        value = tl.reshape(decode_e4m3(code) * scale[:, None], [BLOCK])
        tl.store(at, value.to(tl.bfloat16), mask=place < P)
    else:
        high, middle, low = split3(x)
        # What infinity leaves is no number; the high part alone says all there is to say.
        finite = (bits_of(high) & 0x7FFFFFFF) < 0x7F800000
        plane = M.to(tl.int64) * P
        tl.store(at, high.to(tl.bfloat16), mask=place < P)
        tl.store(at + plane, tl.where(finite, middle, 0.0).to(tl.bfloat16), mask=place < P)
        tl.store(at + 2 * plane, tl.where(finite, low, 0.0).to(tl.bfloat16), mask=place < P)
