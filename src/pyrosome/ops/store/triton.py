"""Rows to stored bytes on the device: a program encodes one row and writes all of its planes, in one launch.

A row is at most a few kilobytes and no sum is taken, so bytes depend on nothing but the row: a thread takes
neighbouring channels, reads 16 bytes and writes what they become.  Rows of planes that lie apart in a larger pool are
found by their stride.  A place that is negative or past the planes is written nowhere.

Shape letters: M rows, C row width, G groups of channels that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import device, gpu
from pyrosome.ops import store as ops
from pyrosome.ops.gpu import Variant
from pyrosome.quant.rows import INDEX_GROUP, KV_GROUP, FloatRows, FP4IndexRows, FP8KVRows, RowFormat

_KV, _INDEX = tl.constexpr(KV_GROUP), tl.constexpr(INDEX_GROUP)
VARIANTS = {"narrow": Variant("narrow", {}, warps=1, stages=1), "wide": Variant("wide", {}, warps=4, stages=1)}


@triton.jit
def _fp8(x_ptr, G: tl.constexpr, NOPE: tl.constexpr):
    """(channels, e4m3 codes and scales of channels, E8M0 bytes [G]) of a row's first NOPE channels; zeros past them."""
    g = tl.arange(0, G)
    channel = g[:, None] * _KV + tl.arange(0, _KV)[None, :]
    x = tl.load(x_ptr + channel, mask=channel < NOPE, other=0.0)
    scale, inverse, byte = device.fp8_scale(tl.max(device.size_bits(x), axis=1)[:, None])
    byte = tl.where(g * _KV < NOPE, tl.reshape(byte, (G,)), 0)
    return channel, device.encode_e4m3(x * inverse), scale, byte


@triton.jit
def _fp4(x_ptr, G: tl.constexpr, C: tl.constexpr):
    """(channels, e2m1 codes and scales of channels, E8M0 bytes [G]) of a row's C channels; zeros past them."""
    channel = tl.arange(0, G)[:, None] * _INDEX + tl.arange(0, _INDEX)[None, :]
    x = tl.load(x_ptr + channel, mask=channel < C, other=0.0)
    scale, inverse, byte = device.fp4_scale(tl.max(device.size_bits(x), axis=1)[:, None])
    return channel, device.encode_e2m1(x * inverse), scale, tl.reshape(byte, (G,))


@gpu.jit
def _store_floats(
    x_ptr, place_ptr, data_ptr, num_places, C: tl.constexpr, STRIDE: tl.constexpr, BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + m).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    is_written = (channel < C) & (place >= 0) & (place < num_places)
    x = tl.load(x_ptr + m * C + channel, mask=is_written, other=0.0)
    if BF16:
        x = (device.to_bf16_bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(data_ptr + place * STRIDE + channel, x, mask=is_written)


@gpu.jit
def _store_fp8(
    x_ptr, place_ptr, data_ptr, scale_ptr, num_places, NOPE: tl.constexpr, ROPE: tl.constexpr, STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, SCALES: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + m).to(tl.int64)
    is_written = (place >= 0) & (place < num_places)
    x_ptr += m * (NOPE + ROPE)
    data_ptr += place * STRIDE
    if NOPE > 0:
        channel, code, _, byte = _fp8(x_ptr, G, NOPE)
        tl.store(data_ptr + channel, code.to(tl.uint8), mask=(channel < NOPE) & is_written)
        g = tl.arange(0, G)
        tl.store(scale_ptr + place * SCALE_STRIDE + g, byte.to(tl.uint8), mask=(g < SCALES) & is_written)
    # The turned channels as bytes of bfloat16, low byte first: rows may begin at any byte.
    channel = tl.arange(0, BLOCK)
    bits = device.to_bf16_bits(tl.load(x_ptr + NOPE + channel, mask=channel < ROPE, other=0.0))
    halves = tl.reshape(tl.join((bits >> 16) & 0xFF, (bits >> 24) & 0xFF), (2 * BLOCK,))
    at = tl.arange(0, 2 * BLOCK)
    tl.store(data_ptr + NOPE + at, halves.to(tl.uint8), mask=(at < 2 * ROPE) & is_written)


@gpu.jit
def _store_fp4(
    x_ptr, place_ptr, data_ptr, scale_ptr, num_places, C: tl.constexpr, STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + m).to(tl.int64)
    is_written = (place >= 0) & (place < num_places)
    _, code, _, byte = _fp4(x_ptr + m * C, G, C)
    low, high = tl.split(tl.reshape(code, (G * _INDEX // 2, 2)))
    at = tl.arange(0, G * _INDEX // 2)
    tl.store(data_ptr + place * STRIDE + at, (low | (high << 4)).to(tl.uint8), mask=(at < C // 2) & is_written)
    g = tl.arange(0, G)
    tl.store(scale_ptr + place * SCALE_STRIDE + g, byte.to(tl.uint8), mask=(g < C // _INDEX) & is_written)


@gpu.jit
def _round_fp8(x_ptr, out_ptr, NOPE: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * (NOPE + ROPE)
    out_ptr += m * (NOPE + ROPE)
    if NOPE > 0:
        channel, code, scale, _ = _fp8(x_ptr, G, NOPE)
        tl.store(out_ptr + channel, device.decode_e4m3(code) * scale, mask=channel < NOPE)
    channel = NOPE + tl.arange(0, BLOCK)
    inside = channel < NOPE + ROPE
    tl.store(out_ptr + channel, device.round_bf16(tl.load(x_ptr + channel, mask=inside, other=0.0)), mask=inside)


@gpu.jit
def _round_fp4(x_ptr, out_ptr, C: tl.constexpr, G: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    channel, code, scale, _ = _fp4(x_ptr + m * C, G, C)
    tl.store(out_ptr + m * C + channel, device.decode_e2m1(code) * scale, mask=channel < C)


def store_rows(rows_MC: Tensor, planes: tuple[Tensor, ...], row_format: RowFormat, place_M: Tensor) -> None:
    """As the definition, for float32 rows; by the definition for a format that is not one of ours."""
    if not _is_known(row_format) or any(plane.stride(-1) != 1 for plane in planes):
        ops.store_rows.definition(rows_MC, planes, row_format, place_M)
        return
    _check(rows_MC, planes, row_format, place_M)
    (M, C), data, scale = rows_MC.shape, planes[0], planes[-1]
    args = rows_MC.contiguous(), place_M.contiguous(), *planes, data.shape[0]
    stride, variant = data.stride(0), _variant(C)
    if isinstance(row_format, FP8KVRows):
        nope, rope, scales = row_format.nope, row_format.rope, scale.shape[1]
        gpu.launch(
            _store_fp8, (M,), *args, NOPE=nope, ROPE=rope, STRIDE=stride, SCALE_STRIDE=scale.stride(0), SCALES=scales,
            G=gpu.pow2(scales), BLOCK=gpu.pow2(rope), variant=variant,
        )  # fmt: skip
    elif isinstance(row_format, FP4IndexRows):
        G = gpu.pow2(C // INDEX_GROUP)
        gpu.launch(_store_fp4, (M,), *args, C=C, STRIDE=stride, SCALE_STRIDE=scale.stride(0), G=G, variant=variant)
    else:
        is_bf16 = data.dtype == torch.bfloat16
        gpu.launch(_store_floats, (M,), *args, C=C, STRIDE=stride, BF16=is_bf16, BLOCK=gpu.pow2(C), variant=variant)


def as_stored(rows: Tensor, row_format: RowFormat) -> Tensor:
    """As the definition, for float32 rows; by the definition for a format that is not one of ours."""
    if not _is_known(row_format):
        return ops.as_stored.definition(rows, row_format)  # type: ignore[no-any-return]
    if isinstance(row_format, FloatRows) and row_format.dtype == torch.float32:
        return rows
    C = rows.shape[-1]
    row_format.planes(C)  # raises where the format is for rows of another width
    rows, out = rows.contiguous(), torch.empty(rows.shape, device=rows.device)
    M, variant = rows.numel() // max(C, 1), _variant(C)
    if isinstance(row_format, FP4IndexRows):
        gpu.launch(_round_fp4, (M,), rows, out, C=C, G=gpu.pow2(C // INDEX_GROUP), variant=variant)
        return out
    nope, rope = (row_format.nope, row_format.rope) if isinstance(row_format, FP8KVRows) else (0, C)
    G = gpu.pow2(gpu.cdiv(nope, KV_GROUP))
    gpu.launch(_round_fp8, (M,), rows, out, NOPE=nope, ROPE=rope, G=G, BLOCK=gpu.pow2(rope), variant=variant)
    return out


def _variant(C: int) -> Variant:
    """A warp for each 256 channels or so; no sum is taken, so nothing depends on it."""
    return VARIANTS["narrow" if C <= 256 else "wide"]


def _is_known(row_format: RowFormat) -> bool:
    if isinstance(row_format, FloatRows):
        return row_format.dtype in (torch.float32, torch.bfloat16)
    return isinstance(row_format, (FP8KVRows, FP4IndexRows))


def _check(rows_MC: Tensor, planes: tuple[Tensor, ...], row_format: RowFormat, place_M: Tensor) -> None:
    """Raises RuntimeError where a row would not fit its planes."""
    wanted = row_format.planes(rows_MC.shape[-1])
    given = [(plane.dtype, plane.shape[-1]) for plane in planes]
    is_flat = all(plane.dim() == 2 and plane.shape[0] == planes[0].shape[0] for plane in planes)
    if rows_MC.dim() != 2 or not is_flat or given != [*wanted] or place_M.shape != rows_MC.shape[:1]:
        raise RuntimeError(
            f"rows [M, C] as {row_format.name!r} go to places [M] of planes [places, elements] of {[*wanted]}; given "
            f"rows {[*rows_MC.shape]}, places {[*place_M.shape]}, planes {[(p.dtype, [*p.shape]) for p in planes]}"
        )
