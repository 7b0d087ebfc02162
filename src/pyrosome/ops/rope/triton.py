"""Rotation on the device, and what stands beside a turn in the network.

A program takes one vector with one warp: a decode step's 64 heads are 64 programs, and at a prompt's sizes 32 of them
share a multiprocessor, with enough bytes on their way to keep memory busy.  Nothing crosses a warp, so no barrier
waits.  The sum of squares is taken over a tile whose shape and warps depend on the width alone.  `index_rows` has no
sum beside its butterflies, whose order is written out: its variants differ in rows of a program only.

Shape letters: T vectors, H heads, C channels, F frequencies, G groups of 64 channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import device, gpu
from pyrosome.ops import rope as ops
from pyrosome.ops.gpu import Variant
from pyrosome.ops.rope import pairs
from pyrosome.quant import round_index as fp4_index
from pyrosome.quant import round_kv, unchanged

_ANGLES = Variant("angles", {"BLOCK": 128}, warps=1, stages=1)
VARIANTS = {"narrow": Variant("narrow", {}, warps=1, stages=1), "wide": Variant("wide", {}, warps=4, stages=1)}
INDEX_VARIANTS = {
    "few": Variant("few", {"ROWS": 1}, warps=1, stages=1),
    "many": Variant("many", {"ROWS": 4}, warps=1, stages=1),
}


@triton.jit
def _cos_sin(x):
    """(cos, sin) of float64 x, off by no more than 1e-9 at angles of millions: a sixtieth of float32's last bit at 1.

    The library's float32 functions keep what is left of such angles in local memory, and the fast ones are wrong beyond
    a few turns.
    """
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - quarter * 1.5707963267948966  # within a half of a quarter: a few terms of the series are enough
    s = r * r
    # 1 - s/2 + s^2/24 - ..., and r (1 - s/6 + s^2/120 - ...)
    cos = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800 + s * (1 / 479001600))))))
    sin = 1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880 + s * (-1 / 39916800)))))
    sin = r * sin
    turned = quarter.to(tl.int64) & 3
    swapped = (turned & 1) == 1
    x_part, y_part = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((turned == 1) | (turned == 2), -x_part, x_part), tl.where(turned >= 2, -y_part, y_part)


@gpu.jit
def _rotation(position_ptr, frequency_ptr, turn_ptr, T, F: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < T * F
    position = tl.load(position_ptr + at // F, mask=inside, other=0)
    frequency = tl.load(frequency_ptr + at % F, mask=inside, other=0.0)
    angle = tl.maximum(position, 0).to(tl.float32) * frequency
    cos, sin = _cos_sin(angle.to(tl.float64))
    both = tl.reshape(tl.join(cos.to(tl.float32), sin.to(tl.float32)), (2 * BLOCK,))
    to = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(turn_ptr + to, both, mask=to < 2 * T * F)


@gpu.jit
def _turned_rows(
    x_ptr, weight_ptr, turn_ptr, out_ptr, eps, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, G: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, G * 64)
    inside = channel < C
    even, odd = pairs.split_pairs(tl.load(x_ptr + row * C + channel, mask=inside, other=0.0), G)
    if NORM:
        even, odd = pairs.divide_by_rms(even, odd, weight_ptr, eps, C, G)
    even, odd = pairs.turn(even, odd, turn_ptr + row // H * (2 * F), INVERSE, C, F, G)
    if ROUND:
        even, odd = pairs.round_nope(even, odd, C, F, G)
    tl.store(out_ptr + row * C + channel, pairs.join_pairs(even, odd, G), mask=inside)


@gpu.jit
def _index_rows(
    x_ptr, turn_ptr, out_ptr, num_rows, norm, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, PASSES: tl.constexpr,
    GROUP: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None]
    at = row[:, None] * C + tl.arange(0, C)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    for i in tl.static_range(PASSES):
        # Sums and differences of neighbours, sums before differences: after all passes channels are in order again.
        even, odd = tl.split(tl.reshape(x, (ROWS, C // 2, 2)))
        if i == 0 and F > 0:
            turn_at = tl.arange(0, C)[None, :] - (C - 2 * F)
            turn = tl.load(turn_ptr + (row // H * (2 * F))[:, None] + turn_at, mask=inside & (turn_at >= 0), other=0.0)
            cos, sin = tl.split(tl.reshape(turn, (ROWS, C // 2, 2)))
            turned = tl.arange(0, C // 2)[None, :] >= C // 2 - F
            turned_even = tl.where(turned, even * cos - odd * sin, even)
            odd = tl.where(turned, even * sin + odd * cos, odd)
            even = turned_even
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, C))
    x = x * norm
    if ROUND:
        grouped = tl.reshape(x, (ROWS, C // GROUP, GROUP))
        largest = tl.max(device.size_bits(grouped), axis=2, keep_dims=True)
        scale, inverse, _ = device.fp4_scale(largest)
        x = tl.reshape(device.decode_e2m1(device.encode_e2m1(grouped * inverse)) * scale, (ROWS, C))
    tl.store(out_ptr + at, x, mask=inside)


def rotation(frequency_F: Tensor, position_T: Tensor) -> Tensor:
    """As the definition, for float32 frequencies."""
    if frequency_F.dim() != 1 or position_T.dim() != 1:
        raise RuntimeError(
            f"rotation takes frequencies [F] and positions [T]; given {[*frequency_F.shape]} and {[*position_T.shape]}"
        )
    T, F = position_T.shape[0], frequency_F.shape[0]
    turn = frequency_F.new_empty(T, F, 2)
    grid = (gpu.cdiv(T * F, _ANGLES.constants["BLOCK"]),)
    gpu.launch(_rotation, grid, position_T.contiguous(), frequency_F.contiguous(), turn, T, F=F, variant=_ANGLES)
    return torch.view_as_complex(turn)


def rope(x: Tensor, rotation_TF: Tensor, inverse: bool = False) -> Tensor:
    """As the definition, for float32 x."""
    return _turned(x, None, rotation_TF, 0.0, is_normed=False, inverse=inverse)


def norm_rope(
    x: Tensor,
    weight_C: Tensor | None,
    rotation_TF: Tensor,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 x."""
    out = _turned(x, weight_C, rotation_TF, eps, is_normed=True, rounds=round_nope is round_kv)
    if round_nope in (round_kv, unchanged):
        return out
    nope = x.shape[-1] - 2 * rotation_TF.shape[1]
    return torch.cat([round_nope(out[..., :nope]), out[..., nope:]], dim=-1)


def index_rows(x: Tensor, rotation_TF: Tensor | None, round_index: Callable[[Tensor], Tensor] = unchanged) -> Tensor:
    """As the definition, for float32 x."""
    C = x.shape[-1]
    if round_index not in (fp4_index, unchanged) or C < 2 or C & (C - 1):
        return ops.index_rows.definition(x, rotation_TF, round_index)  # type: ignore[no-any-return]
    H, turn = _turns(x, rotation_TF)
    x, F = x.contiguous(), 0 if turn is None else turn.shape[1]
    out, rows = torch.empty_like(x), x.numel() // C
    size, default = (">4096", "many") if rows > 4096 else ("<=4096", "few")
    variant = gpu.chosen("index_rows", f"C={C},rows{size}", INDEX_VARIANTS, default, gpu.target(x.device))
    gpu.launch(
        _index_rows, (gpu.cdiv(rows, variant.constants["ROWS"]),), x, turn, out, rows, C**-0.5, H=H, C=C, F=F,
        PASSES=C.bit_length() - 1, GROUP=min(C, 32), ROUND=round_index is fp4_index, variant=variant,
    )  # fmt: skip
    return out


def _turns(x: Tensor, rotation_TF: Tensor | None) -> tuple[int, Tensor | None]:
    """(heads of a token, turns [T, F, 2]) for vectors x [T, C] or [T, H, C].

    Raises:
        RuntimeError: the rotation is not one of each token, or turns more channels than there are.
    """
    if x.dim() not in (2, 3):
        raise RuntimeError(f"vectors [T, C] or [T, H, C] are turned; given {[*x.shape]}")
    H = x.shape[1] if x.dim() == 3 else 1
    if rotation_TF is None:
        return H, None
    T, C = x.shape[0], x.shape[-1]
    if C % 2 or rotation_TF.dim() != 2 or rotation_TF.shape[0] != T or 2 * rotation_TF.shape[1] > C:
        raise RuntimeError(
            f"vectors {[*x.shape]} need rotations [{T}, F] of at most {C // 2} pairs of channels, which are even in "
            f"number; given {[*rotation_TF.shape]}"
        )
    return H, torch.view_as_real(rotation_TF).contiguous()


def _row_variant(G: int) -> Variant:
    """One warp where it can hold the row in registers; by the width alone, which the order of sums depends on."""
    return VARIANTS["narrow" if G <= 8 else "wide"]


def _turned(
    x: Tensor,
    weight_C: Tensor | None,
    rotation_TF: Tensor,
    eps: float,
    *,
    is_normed: bool,
    inverse: bool = False,
    rounds: bool = False,
) -> Tensor:
    H, turn = _turns(x, rotation_TF)
    C, F = x.shape[-1], rotation_TF.shape[1]
    if weight_C is not None:
        if weight_C.shape != (C,):
            raise RuntimeError(f"rows of {C} channels need a weight [{C}]; given {[*weight_C.shape]}")
        weight_C = weight_C.contiguous()
    x = x.contiguous()
    out, G = torch.empty_like(x), gpu.pow2(C, 64) // 64
    gpu.launch(
        _turned_rows, (x.numel() // max(C, 1),), x, weight_C, turn, out, eps, H=H, C=C, F=F, G=G, NORM=is_normed,
        INVERSE=inverse, ROUND=rounds, variant=_row_variant(G),
    )  # fmt: skip
    return out
