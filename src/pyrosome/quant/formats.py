"""Weights as they are stored: which format a tensor is in, its exact values, and back.

A format is decided for each tensor from what is there (dtype, scale, shapes), never from a configuration's
say-so.  New formats register; the network does not change.
Shape letters: N output rows, K inputs, R rows and C columns of a block.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrosome.errors import UnsupportedFormat, WrongShape
from pyrosome.quant.codes import FP4_MAX, FP8_MAX, e2m1_values, e4m3_values, pack_e2m1
from pyrosome.quant.e8m0 import ceil_pow2, e8m0_to_float

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
_LEAST_SCALE = 2.0**-126  # of a block of zeros

Shape = tuple[int, ...]


class Format(Protocol):
    """One way of storing a matrix [..., N, K] as data and scale."""

    @property
    def name(self) -> str:
        """What the format is called in `FORMATS`, messages and plans."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """Rows and inputs that share a scale."""
        ...

    def detect(self, data_dtype: torch.dtype, scale_dtype: torch.dtype, data_shape: Shape, scale_shape: Shape) -> bool:
        """Whether such a pair is in this format."""
        ...

    def logical_shape(self, data_shape: Shape) -> Shape:
        """[..., N, K] of stored data."""
        ...

    def scale_shape(self, logical_shape: Shape) -> Shape:
        """Shape of the scale of a matrix [..., N, K]."""
        ...

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The exact values [..., N, K], rounded only where `dtype` cannot hold them."""
        ...

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(data, scale) nearest to `weight` [..., N, K], ties to even."""
        ...


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


def format_of(data: Tensor, scale: Tensor | None) -> Format:
    """The format of a stored pair.

    Raises:
        UnsupportedFormat: no registered format stores such a pair, or there is no scale.
    """
    if scale is None:
        raise UnsupportedFormat(
            f"the weight format of data {data.dtype} {tuple(data.shape)} was asked for and it has no scale; "
            "float data is used as it is, anything else needs its .scale"
        )
    for known in FORMATS.values():
        if known.detect(data.dtype, scale.dtype, tuple(data.shape), tuple(scale.shape)):
            return known
    raise UnsupportedFormat(
        f"data {data.dtype} {tuple(data.shape)} with scale {scale.dtype} {tuple(scale.shape)} is in none of the known "
        f"weight formats ({', '.join(FORMATS)}); convert the checkpoint, or register a format for it"
    )


@dataclasses.dataclass(frozen=True)
class QuantTensor:
    """A stored matrix: data and scale exactly as in the file, leading dims for stacks.

    Raises:
        UnsupportedFormat: no format of that name is registered.
        WrongShape: the scale is not the one such data has.
    """

    format: str
    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UnsupportedFormat(f"weight format {self.format!r} is unknown; registered are {', '.join(FORMATS)}")
        expected, found = FORMATS[self.format].scale_shape(self.shape), tuple(self.scale.shape)
        if found != expected:
            raise WrongShape(
                f"a scale of shape {found} was given for {self.format} data {tuple(self.data.shape)}, "
                f"whose scale has shape {expected}"
            )

    @property
    def shape(self) -> Shape:
        """Logical shape [..., N, K]."""
        return FORMATS[self.format].logical_shape(tuple(self.data.shape))

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale together."""
        return self.data.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exact values [..., N, K], rounded only where `dtype` cannot hold them; NaN under a NaN scale."""
        return FORMATS[self.format].dequantize(self.data, self.scale, dtype)

    def index_select(self, index: Tensor) -> QuantTensor:
        """The stacked matrices `index` (integers [M]) along dim 0, still as stored."""
        return QuantTensor(self.format, _take(self.data, index), _take(self.scale, index))

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same bytes on `device`."""
        return QuantTensor(self.format, self.data.to(device), self.scale.to(device))


def _take(x: Tensor, index: Tensor) -> Tensor:
    if x.dtype.itemsize > 1:
        return x.index_select(0, index)
    # Eight-bit floats have no gather of their own on every device: their bytes do.
    return x.view(torch.uint8).index_select(0, index).view(x.dtype)


class _Blocks:
    """What formats with an E8M0 scale per block of rows and inputs share."""

    name: str
    block: tuple[int, int]
    data_dtype: torch.dtype
    values_per_element: int  # along K

    def detect(self, data_dtype: torch.dtype, scale_dtype: torch.dtype, data_shape: Shape, scale_shape: Shape) -> bool:
        return (
            data_dtype == self.data_dtype
            and scale_dtype in (torch.float8_e8m0fnu, torch.uint8)
            and len(data_shape) >= 2
            and scale_shape == self.scale_shape(self.logical_shape(data_shape))
        )

    def logical_shape(self, data_shape: Shape) -> Shape:
        return (*data_shape[:-1], data_shape[-1] * self.values_per_element)

    def scale_shape(self, logical_shape: Shape) -> Shape:
        *lead, N, K = logical_shape
        return (*lead, -(-N // self.block[0]), -(-K // self.block[1]))

    def _times_scale(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Fresh `values` [..., N, K] times their blocks' scales, in place where it can be, as `dtype`."""
        factor = e8m0_to_float(scale).to(values.dtype)
        (*lead, N, K), (R, C) = values.shape, self.block
        if N % R or K % C:
            values.mul_(_spread(factor, self.block, N, K))
        else:
            values.view(*lead, N // R, R, K // C, C).mul_(factor[..., :, None, :, None])
        return values.to(dtype)

    def _normalise(self, weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        """(float32 weight / scale [..., N, K], E8M0 scales): each block's magnitudes brought to at most `largest`."""
        weight = weight.detach().float()
        (N, K), (R, C) = weight.shape[-2:], self.block
        scale, byte = ceil_pow2(_block_amax(weight.abs(), self.block).div_(largest).clamp_(min=_LEAST_SCALE))
        return weight / _spread(scale, (R, C), N, K), byte.view(torch.float8_e8m0fnu)


def _spread(scale: Tensor, block: tuple[int, int], N: int, K: int) -> Tensor:
    """The scale of every value, [..., N, K], of block scales; a dim whose blocks are 1 long is not repeated."""
    R, C = block
    if R > 1:
        scale = scale.repeat_interleave(R, -2)[..., :N, :]
    return scale.repeat_interleave(C, -1)[..., :K] if C > 1 else scale


def _block_amax(size: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest of every block, [..., ceil(N / R), ceil(K / C)], of magnitudes [..., N, K]."""
    (*lead, N, K), (R, C) = size.shape, block
    if N % R or K % C:
        size = F.pad(size, (0, -K % C, 0, -N % R))
    return size.reshape(*lead, -(-N // R), R, -(-K // C), C).amax(dim=(-3, -1))


class FP8Blocks(_Blocks):
    """e4m3 with an E8M0 scale per 128 x 128 block: every projection of the official checkpoints."""

    name, block, data_dtype, values_per_element = "fp8", (128, 128), torch.float8_e4m3fn, 1

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return self._times_scale(e4m3_values(data, _wide(dtype)), scale, dtype)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scaled, byte = self._normalise(weight, FP8_MAX)
        return scaled.to(torch.float8_e4m3fn), byte


class FP4Groups(_Blocks):
    """Packed e2m1 (low nibble: even input) with an E8M0 scale per 32 inputs: the official experts."""

    name, block, data_dtype, values_per_element = "fp4", (1, 32), torch.int8, 2

    def dequantize(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return self._times_scale(e2m1_values(data, _wide(dtype)), scale, dtype)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.shape[-1] % 2:
            raise WrongShape(f"a matrix of {weight.shape[-1]} inputs was to be stored in FP4, two to a byte; pad it")
        scaled, byte = self._normalise(weight, FP4_MAX)
        return pack_e2m1(scaled).view(torch.int8), byte


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to multiply in: `dtype` where its range holds a scale, else float32.  Products round at most once."""
    return dtype if dtype in (torch.float32, torch.float64, torch.bfloat16) else torch.float32


register_format(FP8Blocks())
register_format(FP4Groups())


def fp4_to_fp8(weight: QuantTensor) -> QuantTensor:
    """The same values [..., N, K] in FP8 blocks, exactly.

    A block's scale is its largest group scale / 64 (official converter), which puts that group's 6 at 384 of
    e4m3's 448.  Groups down to 2^-14 of the largest then still have e4m3 values for all of theirs.

    Raises:
        UnsupportedFormat: the weight is not in FP4, or some value would be rounded.
    """
    if weight.format != "fp4":
        raise UnsupportedFormat(f"an FP4 weight was to be turned into FP8, and this one is in {weight.format}")
    values = weight.dequantize()
    N, K = weight.shape[-2:]
    (R, C), (_, group) = FORMATS["fp8"].block, FORMATS["fp4"].block
    group_scale = e8m0_to_float(weight.scale)
    largest = _block_amax(group_scale, (R, C // group))
    scale, byte = ceil_pow2((largest / 64).clamp_(min=_LEAST_SCALE))
    data = (values / _spread(scale, (R, C), N, K)).to(torch.float8_e4m3fn)
    exact = QuantTensor("fp8", data, byte.view(torch.float8_e8m0fnu))
    rounded = (exact.dequantize() != values).sum().item()
    if rounded:
        smallest = group_scale.where(group_scale > 0, math.inf).min()
        raise UnsupportedFormat(
            f"this FP4 weight {weight.shape} does not fit FP8 blocks exactly: {rounded} of {values.numel()} values "
            f"would be rounded, because group scales range from {smallest.item():.3g} to "
            f"{group_scale.max().item():.3g} and one 128 x 128 block holds a range of 2^14 at most; keep it in FP4"
        )
    return exact
