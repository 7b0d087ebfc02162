"""Rows as products want them: normalised where there is a norm, then rounded, or split into exact parts.

One kernel has every form, so that several products of the same rows cost one launch in front of them.  A program has
a whole row where something is known of the row alone (its norm, whether its lower parts are zeros), else a piece of
it, so that one token is rounded by several.  Rows are padded with zeros to whole groups of 128 channels: products
read them without masks.  Integers take the maximum and choose the scale: NaN is above infinity, nothing is rounded.
Shape letters: M rows, K channels, P of them with padding, G groups of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.device import decode_e4m3, encode_e4m3, fp8_scale, size_bits, split3
from pyrosome.ops.gpu import Variant
from pyrosome.quant.activation import ACTIVATION_GROUP as GROUP

_PIECE = 1024  # channels of a program where a row needs no whole
_WHOLE = 1 << 16  # the widest row that one program takes
_ROWS = {w: Variant(f"row-{w}", {}, warps=w, stages=1) for w in (4, 8, 16)}


class Rows(NamedTuple):
    """The forms that were asked for; the others are None."""

    codes_MP: Tensor | None = None  # uint8, e4m3
    scale_MG: Tensor | None = None  # float32 powers of two
    rounded_MP: Tensor | None = None  # bfloat16: codes times scales, exactly
    parts_3MP: Tensor | None = None  # bfloat16: three tensors that add up to the rows
    deep_M: Tensor | None = None  # int32: whether the second and the third have anything but zeros
    plain_MP: Tensor | None = None  # float32
    scale_GM: Tensor | None = None  # the scales as a tile of tokens reads them; M is rounded up to 16, with anything


def padded(K: int) -> int:
    """K, rounded up to whole groups of channels."""
    return gpu.cdiv(K, GROUP) * GROUP


def prepared_rows(
    x_MK: Tensor,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    *,
    codes: bool = False,
    rounded: bool = False,
    parts: bool = False,
    plain: bool = False,
    columns: bool = False,
) -> Rows:
    """The forms of float32 rows that are asked for, by one launch.

    Args:
        columns: codes and the scales of a group side by side, `scale_GM`.

    Raises:
        RuntimeError: the norm is not one of such rows, or a row is wider than one program takes.
    """
    M, K = x_MK.shape
    if norm_K is not None and norm_K.shape != (K,):
        raise RuntimeError(f"rows of {K} channels were given with a norm of {tuple(norm_K.shape)}, and need one of {K}")
    P, x = padded(K), x_MK.contiguous()
    whole = norm_K is not None or parts
    if whole and K > _WHOLE:
        raise RuntimeError(f"rows of {K} channels were given, and a row that is read whole has at most {_WHOLE}")
    made = Rows(
        codes_MP=x.new_empty(M, P, dtype=torch.uint8) if codes or columns else None,
        scale_MG=x.new_empty(M, P // GROUP) if codes else None,
        rounded_MP=x.new_empty(M, P, dtype=torch.bfloat16) if rounded else None,
        parts_3MP=x.new_empty(3, M, P, dtype=torch.bfloat16) if parts else None,
        deep_M=x.new_empty(M, dtype=torch.int32) if parts else None,
        plain_MP=x.new_empty(M, P) if plain else None,
        scale_GM=x.new_empty(P // GROUP, gpu.cdiv(M, 16) * 16) if columns else None,
    )
    block = gpu.pow2(P) if whole else min(gpu.pow2(P), _PIECE)
    gpu.launch(
        _rows, (M, gpu.cdiv(P, block)), x, None if norm_K is None else norm_K.contiguous(), *made, M, eps, K=K, P=P,
        BLOCK=block, variant=_ROWS[4 if block <= 4096 else 8 if block <= 16384 else 16],
    )  # fmt: skip
    return made


@gpu.jit
def _rows(
    x_ptr, norm_ptr, codes_ptr, scale_ptr, rounded_ptr, parts_ptr, deep_ptr, plain_ptr,
    column_ptr, M, eps,
    K: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < K
    x = tl.load(x_ptr + row * K + channel, mask=inside, other=0.0)
    if norm_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x) / K + eps)
        x = x * tl.load(norm_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    at = row * P + channel
    stored = channel < P
    if codes_ptr is not None or rounded_ptr is not None:
        code, scale = fp8_groups(tl.reshape(x, [BLOCK // 128, 128]))
        if codes_ptr is not None:
            tl.store(codes_ptr + at, tl.reshape(code, [BLOCK]).to(tl.uint8), mask=stored)
            group = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
            if scale_ptr is not None:
                tl.store(scale_ptr + row * (P // 128) + group, scale, mask=group < P // 128)
            if column_ptr is not None:
                M16 = (M + 15).to(tl.int64) // 16 * 16
                tl.store(column_ptr + group * M16 + row, scale, mask=group < P // 128)
        if rounded_ptr is not None:
            value = decode_e4m3(code) * scale[:, None]
            tl.store(rounded_ptr + at, tl.reshape(value, [BLOCK]).to(tl.bfloat16), mask=stored)
    if parts_ptr is not None:
        high, middle, low = split3(x)
        plane = M.to(tl.int64) * P
        tl.store(parts_ptr + at, high.to(tl.bfloat16), mask=stored)
        tl.store(parts_ptr + plane + at, middle.to(tl.bfloat16), mask=stored)
        tl.store(parts_ptr + 2 * plane + at, low.to(tl.bfloat16), mask=stored)
        tl.store(deep_ptr + row, tl.max(((middle != 0.0) | (low != 0.0)).to(tl.int32)))
    if plain_ptr is not None:
        tl.store(plain_ptr + at, x, mask=stored)


@triton.jit
def fp8_groups(x):
    """(e4m3 codes [G, 128] as int32, float32 scales [G]) of float32 x [G, 128]: `quant.quantize_activation`."""
    scale, inverse, _ = fp8_scale(tl.max(size_bits(x), axis=1))
    return encode_e4m3(x * inverse[:, None]), scale
