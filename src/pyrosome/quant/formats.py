"""Weights as they are stored: which format a tensor is in, its exact values, and back.

A format is decided for each tensor from what is there (dtype, scale, shapes), never from a configuration's
say-so.  New formats register; the network does not change.
Shape letters: N output rows, K inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from pyrosome.errors import UnsupportedFormat
from pyrosome.quant.e8m0 import ceil_pow2, e8m0_to_float

FP8_MAX, FP4_MAX = 448.0, 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Format(Protocol):
    """One way of storing a matrix [..., N, K] as data and scale."""

    name: str
    block: tuple[int, int]  # rows and inputs that share a scale

    def detect(
        self, data_dtype: torch.dtype, scale_dtype: torch.dtype, data_shape: tuple[int, ...], scale_shape: tuple[int, ...]
    ) -> bool:
        """Whether such a pair is in this format."""
        ...

    def logical_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """[..., N, K] of stored data."""
        ...

    def scale_shape(self, logical_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a matrix [..., N, K]."""
        ...

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The exact values [..., N, K], rounded only where `dtype` cannot hold them."""
        ...

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(data, scale) nearest to `weight` [..., N, K], rounding to even."""
        ...


@dataclasses.dataclass(frozen=True)
class QuantTensor:
    """A stored matrix: data and scale exactly as in the file, leading dims for stacks."""

    format: str
    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., N, K]."""
        return FORMATS[self.format].logical_shape(tuple(self.data.shape))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale together."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exact values [..., N, K] in `dtype`."""
        return FORMATS[self.format].dequantize(self.data, self.scale, dtype)

    def index_select(self, index: Tensor) -> QuantTensor:
        """The stacked matrices `index` along dim 0, still as stored."""
        # Eight-bit floats have no gather of their own on every device: their bytes do.
        return QuantTensor(self.format, _take(self.data, index), _take(self.scale, index))

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same bytes on `device`."""
        return QuantTensor(self.format, self.data.to(device), self.scale.to(device))


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.view(torch.uint8).index_select(0, index).view(x.dtype)


FORMATS: dict[str, Format] = {}


def register_format(new: Format) -> Format:
    """Make a format known to loader and ops.

    Raises:
        UnsupportedFormat: its name is taken.
    """
    if new.name in FORMATS:
        raise UnsupportedFormat(f"a weight format named {new.name!r} is registered already; choose another name")
    FORMATS[new.name] = new
    return new


def format_of(data: Tensor, scale: Tensor | None) -> Format | None:
    """The format of a stored pair; None for plain floating-point data without a scale.

    Raises:
        UnsupportedFormat: no registered format stores such a pair.
    """
    if scale is None:
        if data.dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32):
            return None
        raise UnsupportedFormat(f"data of dtype {data.dtype} has no scale; it cannot be read without one")
    for f in FORMATS.values():
        if f.detect(data.dtype, scale.dtype, tuple(data.shape), tuple(scale.shape)):
            return f
    raise UnsupportedFormat(
        f"data {data.dtype} {tuple(data.shape)} with scale {scale.dtype} {tuple(scale.shape)} is in none of the known "
        f"weight formats ({', '.join(FORMATS)}); convert the checkpoint, or register a format for it"
    )


class _Blocks:
    """What formats with an E8M0 scale per block of rows and inputs share."""

    name: str
    block: tuple[int, int]
    packed: int  # values per stored element along K
    data_dtype: torch.dtype

    def detect(
        self, data_dtype: torch.dtype, scale_dtype: torch.dtype, data_shape: tuple[int, ...], scale_shape: tuple[int, ...]
    ) -> bool:
        return (
            data_dtype == self.data_dtype
            and scale_dtype in (torch.float8_e8m0fnu, torch.uint8)
            and len(data_shape) >= 2
            and scale_shape == self.scale_shape(self.logical_shape(data_shape))
        )

    def logical_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*data_shape[:-1], data_shape[-1] * self.packed)

    def scale_shape(self, logical_shape: tuple[int, ...]) -> tuple[int, ...]:
        *lead, n, k = logical_shape
        return (*lead, -(-n // self.block[0]), -(-k // self.block[1]))

    def _spread(self, scale: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
        """The scale of every value, [..., N, K] (rows of a block may stay a broadcast dim of 1)."""
        rows, columns = self.block
        wide = e8m0_to_float(scale).to(dtype)
        if rows > 1:
            wide = wide.repeat_interleave(rows, -2)[..., :n, :]
        return wide.repeat_interleave(columns, -1)[..., :k]

    def _block_scales(self, weight: Tensor, largest: float, floor: float) -> tuple[Tensor, Tensor]:
        """(scale spread over [..., N, K], bytes [..., n, k]) from each block's largest magnitude."""
        *_, n, k = weight.shape
        rows, columns = self.block
        padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
        amax = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax(dim=(-3, -1))
        _, byte = ceil_pow2(amax.float().clamp(min=floor) / largest)
        return self._spread(byte, n, k, weight.dtype), byte.view(torch.float8_e8m0fnu)


class FP8Blocks(_Blocks):
    """e4m3 with an E8M0 scale per 128 x 128 block: every projection of the official checkpoints."""

    name, block, packed, data_dtype = "fp8", (128, 128), 1, torch.float8_e4m3fn

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (data.to(wide) * self._spread(scale, data.shape[-2], data.shape[-1], wide)).to(dtype)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        spread, byte = self._block_scales(weight.float(), FP8_MAX, 2.0**-126)
        return (weight.float() / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), byte


class FP4Groups(_Blocks):
    """Packed e2m1 (low nibble: even input) with an E8M0 scale per 32 inputs: the official experts."""

    name, block, packed, data_dtype = "fp4", (1, 32), 2, torch.int8

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        values = unpack_e2m1(data).to(wide)
        return (values * self._spread(scale, values.shape[-2], values.shape[-1], wide)).to(dtype)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        spread, byte = self._block_scales(weight.float(), FP4_MAX, FP4_MAX * 2.0**-126)
        return pack_e2m1(e2m1_codes(weight.float() / spread)).view(torch.int8), byte


def e2m1_codes(x: Tensor) -> Tensor:
    """uint8 codes 0..15 of the nearest e2m1 values, ties to the even mantissa, magnitudes above 6 to 6."""
    a = x.abs()
    # Between neighbours the tie goes to the even code: boundaries alternate between > and >=.
    code = (a > 0.25).to(torch.uint8)
    for i, edge in enumerate((0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (a >= edge) if i % 2 == 0 else (a > edge)
    return code | ((x < 0) | ((x == 0) & torch.signbit(x))).to(torch.uint8) << 3


def pack_e2m1(codes: Tensor) -> Tensor:
    """uint8 [..., K / 2] of codes [..., K]: the even one in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """float32 values [..., K] of packed codes [..., K / 2]."""
    table = _pair_table(packed.device)
    return table.index_select(0, packed.view(torch.uint8).flatten().int()).view(*packed.shape[:-1], -1)


def _pair_table(device: torch.device) -> Tensor:
    """float32 [256, 2]: both values of every byte."""
    key = str(device)
    if key not in _PAIR_TABLES:
        signed = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=device)
        byte = torch.arange(256, device=device)
        _PAIR_TABLES[key] = torch.stack([signed[byte & 15], signed[byte >> 4]], dim=-1)
    return _PAIR_TABLES[key]


_PAIR_TABLES: dict[str, Tensor] = {}

register_format(FP8Blocks())
register_format(FP4Groups())


def fp4_to_fp8(weight: QuantTensor) -> QuantTensor:
    """The same values in FP8 blocks, exactly.

    A block's scale is its largest group scale / 64: every e2m1 value of a group up to 2^6 smaller is then an
    e4m3 value (official converter).

    Raises:
        UnsupportedFormat: group scales of a block span more than that, and some value would be rounded.
    """
    values = weight.dequantize(torch.float32)
    fp8 = FORMATS["fp8"]
    *_, n, k = values.shape
    group = e8m0_to_float(weight.scale).repeat_interleave(32, -1)
    rows, columns = fp8.block
    padded = torch.nn.functional.pad(group, (0, -k % columns, 0, -n % rows))
    largest = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax(dim=(-3, -1))
    _, byte = ceil_pow2((largest / 64).clamp(min=2.0**-126))
    scale = byte.view(torch.float8_e8m0fnu)
    spread = e8m0_to_float(scale).repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(columns, -1)[..., :k]
    data = (values / spread).to(torch.float8_e4m3fn)
    exact = QuantTensor("fp8", data, scale)
    if not torch.equal(exact.dequantize(torch.float32), values):
        raise UnsupportedFormat(
            "these FP4 weights do not fit FP8 blocks exactly: group scales within one 128 x 128 block span more than "
            "2^6; keep them in FP4"
        )
    return exact
