"""Pooling of finished windows on the device, with what a compressed row ends with: a program for each row, one launch.

The window is read eight tokens at a time, each of them from this step's tokens or from the ring, as its position says:
48 KiB of a row of 512 channels are on their way at once.  The softmax is a running one over those eights, from the
window's first position on, oldest first: neither the cut of the sequence into steps nor the company changes a bit.
A thread holds the same channels of every token, so a sum over tokens stays in its registers; only the RMS crosses
warps.

Shape letters: as in the definition, G groups of 64 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant
from pyrosome.ops.rope import pairs
from pyrosome.quant import round_kv, unchanged

if TYPE_CHECKING:
    from pyrosome.ops.compress import Emit

_TOKENS = 8  # of a window, read together
# A warp for each 128 channels: by the width alone, which the order of sums depends on.
VARIANTS = {
    f"{128 * warps} channels": Variant(f"{128 * warps} channels", {}, warps, stages=1) for warps in (1, 2, 4, 8)
}


@gpu.jit
def _compress(
    kv_ptr, gate_ptr, tail_kv_ptr, tail_gate_ptr, bias_ptr, token_ptr, end_ptr, start_ptr, slot_ptr, norm_ptr, turn_ptr,
    out_ptr, R, eps, E: tl.constexpr, D: tl.constexpr, P: tl.constexpr, W: tl.constexpr, F: tl.constexpr,
    G: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + m).to(tl.int32)  # positions are small numbers, places are not
    d = tl.arange(0, G * 64)
    inside = d < D
    if end < 0:
        tl.store(out_ptr + m * D + d, tl.zeros((G * 64,), tl.float32), mask=inside)
        return
    token, start = tl.load(token_ptr + m), tl.load(start_ptr + m).to(tl.int32)
    slot = tl.load(slot_ptr + m) * R
    top = tl.full((G * 64,), float("-inf"), tl.float32)
    mass = tl.zeros((G * 64,), tl.float32)
    total = tl.zeros((G * 64,), tl.float32)
    for first in tl.range(0, W, TOKENS):
        w = first + tl.arange(0, TOKENS)
        position = end - (W - 1) + w
        is_there = (w < W) & (position >= 0)
        is_read = is_there[:, None] & inside[None, :]
        is_fresh = position >= start
        # With overlap the older part of the window gives its first D channels, the newer its last D.
        skip = tl.where(w < W - P, 0, E - D)
        position = tl.maximum(position, 0)
        fresh = tl.maximum(token - (W - 1) + w, 0) * E + skip
        kept = (slot + position % R) * E + skip
        gate_row = tl.where(is_fresh, gate_ptr + fresh, tail_gate_ptr + kept)
        kv_row = tl.where(is_fresh, kv_ptr + fresh, tail_kv_ptr + kept)
        bias_row = bias_ptr + position % P * E + skip
        gate = tl.load(gate_row[:, None] + d[None, :], mask=is_read, other=0.0)
        kv = tl.load(kv_row[:, None] + d[None, :], mask=is_read, other=0.0)
        gate += tl.load(bias_row[:, None] + d[None, :], mask=is_read, other=0.0)
        gate = tl.where(is_there[:, None], gate, float("-inf"))
        # Where all there is so far has a weight of zero, the difference of two infinities must not be taken.
        higher = tl.maximum(top, tl.max(gate, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(gate - level[None, :])
        fade = tl.exp(top - level)
        mass = mass * fade + tl.sum(p, axis=0)
        total = total * fade + tl.sum(p * kv, axis=0)
        top = higher
    row = tl.where(inside, total / mass, 0.0)
    if norm_ptr is not None:
        even, odd = pairs.split_pairs(row, G)
        even, odd = pairs.divide_by_rms(even, odd, norm_ptr, eps, D, G)
        even, odd = pairs.turn(even, odd, turn_ptr + m * (2 * F), False, D, F, G)
        if ROUND:
            even, odd = pairs.round_nope(even, odd, D, F, G)
        row = pairs.join_pairs(even, odd, G)
    tl.store(out_ptr + m * D + d, row, mask=inside)


def compress(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
) -> Tensor:
    """As the definition, for float32 kv."""
    return compressed_rows(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width, None, None, 0.0)


def compressed_rows(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
    norm_D: Tensor | None,
    rotation_MF: Tensor | None,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 kv; rows as they are pooled where there is no norm."""
    _check_windows(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width)
    (P, E), R, M = bias_PE.shape, tail_kv_SRE.shape[1], emit.end.shape[0]
    D, F, turn = E * P // width, 0, None
    if norm_D is not None and rotation_MF is not None:
        F = rotation_MF.shape[-1]
        if norm_D.shape != (D,) or rotation_MF.shape != (M, F) or 2 * F > D or D % 2:
            raise RuntimeError(
                f"{M} rows of {D} channels, an even number, need a norm [{D}] and rotations [{M}, at most {D // 2}]; "
                f"given {[*norm_D.shape]} and {[*rotation_MF.shape]}"
            )
        norm_D, turn = norm_D.contiguous(), torch.view_as_real(rotation_MF).contiguous()
    rows_MD = kv_TE.new_empty(M, D)
    held = [x.contiguous() for x in (kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, *emit)]
    gpu.launch(
        _compress, (M,), *held, norm_D, turn, rows_MD, R, eps, E=E, D=D, P=P, W=width, F=F,
        G=gpu.pow2(D, 64) // 64, ROUND=round_nope is round_kv, TOKENS=min(_TOKENS, gpu.pow2(width)),
        variant=VARIANTS[f"{min(gpu.pow2(D, 128), 1024)} channels"],
    )  # fmt: skip
    if round_nope in (round_kv, unchanged):
        return rows_MD
    nope = D - 2 * F
    return torch.cat([round_nope(rows_MD[:, :nope]), rows_MD[:, nope:]], dim=-1)


def _check_windows(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
) -> None:
    """Raises RuntimeError where the kernel would read past a row."""
    (P, E), M = bias_PE.shape, emit.end.shape
    is_projected = kv_TE.dim() == 2 and kv_TE.shape[1] == E and gate_TE.shape == kv_TE.shape
    is_kept = tail_kv_SRE.dim() == 3 and tail_kv_SRE.shape[2] == E and tail_gate_SRE.shape == tail_kv_SRE.shape
    is_window = P <= width <= 2 * P and E * P % width == 0
    if not (is_projected and is_kept and is_window and all(x.shape == M for x in emit)):
        raise RuntimeError(
            f"windows of {width} tokens with a bias [{P}, {E}] need kv and gate [T, {E}], rings [S, R, {E}] and emit "
            f"[M]; given {[*kv_TE.shape]}, {[*gate_TE.shape]}, {[*tail_kv_SRE.shape]}, {[*tail_gate_SRE.shape]} and "
            f"{[[*x.shape] for x in emit]}"
        )
