"""Cache rows as they are stored: float32, bfloat16, or the production layout in FP8 and FP4.

A stored row is one or two *planes*, so that codes and scales stay aligned.
Shape letters: C row width.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import CheckpointError
from pyrosome.quant.activation import _fp8, _StraightThrough, fp4_groups
from pyrosome.quant.e8m0 import e8m0_to_float
from pyrosome.quant.formats import e2m1_codes, pack_e2m1, unpack_e2m1

KV_GROUP, INDEX_GROUP = 64, 32
SCALE_ALIGNMENT = 8  # bytes


class RowFormat(Protocol):
    """How rows [..., C] are stored."""

    name: str

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        """(dtype, elements) of each plane of one row."""
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


@dataclasses.dataclass(frozen=True)
class FloatRows:
    """One plane of plain numbers."""

    name: str
    dtype: torch.dtype

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((self.dtype, width),)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.to(self.dtype),)

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        return planes[0].float()

    def round_trip(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype).to(rows.dtype)


class _Encoded:
    """Round trip by way of the bytes."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("a row format says how it encodes")

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        raise AssertionError("a row format says how it decodes")

    def round_trip(self, rows: Tensor) -> Tensor:
        return _StraightThrough.apply(rows, lambda x: self.decode(self.encode(x)).to(x.dtype))  # type: ignore[no-any-return,no-untyped-call]


@dataclasses.dataclass(frozen=True)
class FP8KVRows(_Encoded):
    """nope e4m3 bytes and rope bf16 values; one E8M0 scale per 64 unrotated channels, padded to 8 bytes."""

    nope: int
    rope: int
    name: str = "fp8"

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        return (torch.uint8, self.nope + 2 * self.rope), (torch.uint8, self._scale_bytes)

    @property
    def _scale_bytes(self) -> int:
        return -(-(self.nope // KV_GROUP) // SCALE_ALIGNMENT) * SCALE_ALIGNMENT

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        rows = rows.float()
        codes, _, scale = _fp8(rows[..., : self.nope], KV_GROUP)
        turned = rows[..., self.nope :].to(torch.bfloat16).contiguous().view(torch.uint8)
        data = torch.cat([codes.view(torch.uint8), turned], dim=-1)
        return data, F.pad(scale, (0, self._scale_bytes - scale.shape[-1]))

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        data, scale = planes
        codes = data[..., : self.nope].contiguous().view(torch.float8_e4m3fn).float()
        groups = e8m0_to_float(scale[..., : self.nope // KV_GROUP].contiguous())
        flat = (codes.unflatten(-1, (-1, KV_GROUP)) * groups[..., None]).flatten(-2)
        turned = data[..., self.nope :].contiguous().view(torch.bfloat16).float()
        return torch.cat([flat, turned], dim=-1)


@dataclasses.dataclass(frozen=True)
class FP4IndexRows(_Encoded):
    """Packed e2m1 and an E8M0 scale per 32 channels: the indexer's keys are FP4 by training."""

    width: int
    name: str = "fp8"

    def planes(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        return (torch.uint8, self.width // 2), (torch.uint8, self.width // INDEX_GROUP)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        scaled, _, byte = fp4_groups(rows, INDEX_GROUP)
        return pack_e2m1(e2m1_codes(scaled).flatten(-2)), byte

    def decode(self, planes: tuple[Tensor, ...]) -> Tensor:
        data, scale = planes
        values = unpack_e2m1(data.contiguous()).unflatten(-1, (-1, INDEX_GROUP))
        return (values * e8m0_to_float(scale.contiguous())[..., None]).flatten(-2)


_FLOATS = {"f32": FloatRows("f32", torch.float32), "bf16": FloatRows("bf16", torch.bfloat16)}


def kv_rows(kv_format: str, head_dim: int, rope_dim: int) -> RowFormat:
    """How KV rows [..., head_dim] are stored.

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


def _float_rows(kv_format: str, why_not_fp8: str) -> RowFormat:
    if kv_format in _FLOATS:
        return _FLOATS[kv_format]
    if kv_format == "fp8":
        raise CheckpointError(f"kv_format 'fp8' cannot store this shape: {why_not_fp8}; use kv_format='f32' or 'bf16'")
    raise CheckpointError(f"kv_format {kv_format!r} is unknown; it is one of f32, bf16, fp8")
