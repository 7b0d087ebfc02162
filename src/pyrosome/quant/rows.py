"""Cache rows as they are stored: float32, bfloat16, or the production layout in FP8 and FP4.

A stored row is one or two *planes*, so that codes and scales stay aligned.
Shape letters: C row width, G groups of channels.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import CacheInvariantBroken, CheckpointError
from pyrosome.quant.activation import fp4_groups, fp8_groups, straight_through
from pyrosome.quant.codes import e2m1_values, e4m3_values, pack_e2m1
from pyrosome.quant.e8m0 import e8m0_to_float

KV_GROUP, INDEX_GROUP = 64, 32  # channels that share a scale (DeepSeek-V4 report)
SCALE_ALIGNMENT = 8  # bytes


class RowFormat(Protocol):
    """How rows [..., C] are stored."""

    @property
    def name(self) -> str:
        """What the `kv_format` option calls it."""
        ...

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        """(dtype, elements) of each plane of one row of `width` channels.

        Raises:
            CacheInvariantBroken: the format was made for rows of another width.
        """
        ...

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Planes of rows [..., C]."""
        ...

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        """float32 rows [..., C] of planes."""
        ...

    def round_trip(self, rows: Tensor) -> Tensor:
        """The rows as they will be read back, in their own dtype; gradients pass straight through."""
        ...


def kv_rows(kv_format: str, head_dim: int, rope_dim: int) -> RowFormat:
    """How KV rows [..., head_dim] are stored, their last `rope_dim` channels being the rotated ones.

    Raises:
        CheckpointError: unknown format, or a shape that FP8 rows cannot hold.
    """
    nope = head_dim - rope_dim
    if kv_format == "fp8" and nope % KV_GROUP == 0:
        return FP8KVRows(nope, rope_dim)
    return _float_rows(kv_format, f"{nope} unrotated channels do not divide into groups of {KV_GROUP}")


def index_rows(kv_format: str, index_head_dim: int) -> RowFormat:
    """How index keys [..., index_head_dim] are stored.

    Raises:
        CheckpointError: unknown format, or a shape that FP4 keys cannot hold.
    """
    if kv_format == "fp8" and index_head_dim % INDEX_GROUP == 0:
        return FP4IndexRows(index_head_dim)
    return _float_rows(kv_format, f"{index_head_dim} index channels do not divide into groups of {INDEX_GROUP}")


@dataclasses.dataclass(frozen=True)
class FloatRows:
    """One plane of plain numbers."""

    name: str
    dtype: torch.dtype

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((self.dtype, width),)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.detach().to(self.dtype),)

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        return planes[0].float()

    def round_trip(self, rows: Tensor) -> Tensor:
        return _round_trip(self, rows)


@dataclasses.dataclass(frozen=True)
class FP8KVRows:
    """Plane 0: `nope` e4m3 bytes, then `rope` bf16 values.  Plane 1: an E8M0 byte per 64 unrotated channels,
    padded with zeros to a multiple of 8 bytes."""

    nope: int
    rope: int
    name: str = "fp8"

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        _check_width(width, self.nope + self.rope)
        return (torch.uint8, self.nope + 2 * self.rope), (torch.uint8, self._scale_bytes)

    @property
    def _scale_bytes(self) -> int:
        return -(-(self.nope // KV_GROUP) // SCALE_ALIGNMENT) * SCALE_ALIGNMENT

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        rows = rows.detach()
        codes, _, scale = fp8_groups(rows[..., : self.nope], KV_GROUP)
        rotated = rows[..., self.nope :].float().to(torch.bfloat16).contiguous().view(torch.uint8)
        data = torch.cat([codes.flatten(-2).view(torch.uint8), rotated], dim=-1)
        return data, F.pad(scale, (0, self._scale_bytes - scale.shape[-1]))

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        data, scale = planes
        lead, num_groups = data.shape[:-1], self.nope // KV_GROUP
        rows = torch.empty(*lead, self.nope + self.rope, device=data.device)
        flat = e4m3_values(data[..., : self.nope], torch.float32).view(*lead, num_groups, KV_GROUP)
        flat_scale = e8m0_to_float(scale[..., :num_groups])[..., None]
        torch.mul(flat, flat_scale, out=rows[..., : self.nope].view(*lead, num_groups, KV_GROUP))
        rows[..., self.nope :] = data[..., self.nope :].view(torch.bfloat16)
        return rows

    def round_trip(self, rows: Tensor) -> Tensor:
        return _round_trip(self, rows)


@dataclasses.dataclass(frozen=True)
class FP4IndexRows:
    """Plane 0: packed e2m1, low nibble first.  Plane 1: an E8M0 byte per 32 channels.

    The indexer's keys are FP4 by training, whichever production format the KV rows have.
    """

    width: int
    name: str = "fp8"

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        _check_width(width, self.width)
        return (torch.uint8, self.width // 2), (torch.uint8, self.width // INDEX_GROUP)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        scaled, _, scale = fp4_groups(rows, INDEX_GROUP)
        return pack_e2m1(scaled).flatten(-2), scale

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        data, scale = planes
        values = e2m1_values(data, torch.float32)
        values.view(*scale.shape, INDEX_GROUP).mul_(e8m0_to_float(scale)[..., None])
        return values

    def round_trip(self, rows: Tensor) -> Tensor:
        return _round_trip(self, rows)


_FLOATS = {"f32": FloatRows("f32", torch.float32), "bf16": FloatRows("bf16", torch.bfloat16)}


def _round_trip(row_format: RowFormat, rows: Tensor) -> Tensor:
    return straight_through(rows, lambda rows: row_format.decode(row_format.encode(rows)).to(rows.dtype))


def _check_width(asked: int, made_for: int) -> None:
    if asked != made_for:
        raise CacheInvariantBroken(f"planes of a {asked}-channel row were asked of a format for {made_for} channels")


def _float_rows(kv_format: str, why_not_fp8: str) -> RowFormat:
    if kv_format in _FLOATS:
        return _FLOATS[kv_format]
    if kv_format == "fp8":
        raise CheckpointError(f"kv_format 'fp8' cannot store this shape: {why_not_fp8}; use kv_format='f32' or 'bf16'")
    raise CheckpointError(f"kv_format {kv_format!r} is unknown; it is one of f32, bf16, fp8")
