"""Quantised weights as the CPU's kernels read them: the same codes and scales, laid in tiles.

A tile is 64 outputs (the last of a matrix may have 32) by all inputs, in groups of inputs that share a scale: 32 in
FP4, 128 in FP8.  A group is its codes, block by block, then a scale byte for each output.  A block is 64 bytes of 16
outputs, each of which has a 32-bit lane: 8 inputs in FP4, 4 in FP8.  In a lane, codes lie so that decoding yields
bfloat16 pairs whose earlier input is the high half.  What lies past the matrix is zero, under a scale of one.
`ops/tiles.h` has the kernels; here is the definition, and the way back.
Shape letters: N outputs, K inputs, G groups, B blocks, S strips of 16 outputs, L lanes (16).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyrosome.errors import WrongShape
from pyrosome.quant.formats import QuantTensor, Shape
from pyrosome.tiling import CODE_BYTES, GROUP, STRIP, group_bytes, tiles
from pyrosome.tiling import TILE as TILE
from pyrosome.tiling import tiled_bytes as tiled_bytes

_BLOCK_BYTES = 4  # of one output in a block
_ONE = 127  # the E8M0 byte of 1


@dataclasses.dataclass(frozen=True)
class TiledWeight(QuantTensor):
    """A stored matrix in tiles: data uint8 [..., bytes], no scale beside it; leading dims for stacks.

    Raises:
        WrongShape: the bytes are not those of such a matrix.
    """

    num_rows: int = 0
    num_inputs: int = 0
    parts: int = 1  # the matrix is so many groups of rows, tiled one by one, that a grouped projection reads apart

    def __post_init__(self) -> None:
        if self.num_rows % self.parts:
            raise WrongShape(f"a matrix of {self.num_rows} rows does not divide into {self.parts} parts")
        wanted = tiled_bytes(self.format, self.num_rows // self.parts, self.num_inputs) * self.parts
        if self.data.shape[-1] != wanted:
            raise WrongShape(
                f"{self.data.shape[-1]} bytes were given for a tiled {self.format} matrix of {self.num_rows} x "
                f"{self.num_inputs} in {self.parts} parts, which takes {wanted}"
            )

    @property
    def shape(self) -> Shape:
        """Logical shape [..., N, K]."""
        return (*self.data.shape[:-1], self.num_rows, self.num_inputs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exact values [..., N, K], rounded only where `dtype` cannot hold them."""
        return untile(self).dequantize(dtype)

    def index_select(self, index: Tensor) -> TiledWeight:
        """The stacked matrices `index` along dim 0, still in tiles."""
        return dataclasses.replace(self, data=self.data.index_select(0, index))

    def to(self, device: torch.device | str) -> QuantTensor:
        """As rows on another device: tiles are the CPU's."""
        return untile(self).to(device)


def tile(weight: QuantTensor, parts: int = 1) -> TiledWeight:
    """The matrices of a weight in tiles.  Plain torch: the definition that `ops.native.tile` is held to."""
    (*lead, N, K), group = weight.shape, GROUP[weight.format]
    num_groups, rows = -(-K // group), N // parts
    scale_rows = weight.scale.view(torch.uint8)
    if weight.format == "fp8":
        scale_rows = scale_rows.repeat_interleave(128, -2)[..., :N, :]
    codes = weight.data.view(torch.uint8)
    outs = []
    for part in range(parts):
        for first, count, strips in tiles(rows):
            at = slice(part * rows + first, part * rows + first + count)
            code = codes.new_zeros(*lead, strips * STRIP, num_groups * CODE_BYTES[weight.format])
            code[..., :count, : codes.shape[-1]] = codes[..., at, :]
            scale = torch.full((*lead, strips * STRIP, num_groups), _ONE, dtype=torch.uint8)
            scale[..., :count, :] = scale_rows[..., at, :]
            # [.., S, L, G, B, 4] -> [.., G, B, S, L, 4]: a group's blocks, strip by strip
            blocks = code.view(*lead, strips, STRIP, num_groups, -1, _BLOCK_BYTES).movedim((-3, -2), (-5, -4))
            laid = _lanes(weight.format, blocks).flatten(-4)
            outs.append(torch.cat([laid, scale.transpose(-1, -2)], dim=-1).flatten(-2))
    return TiledWeight(
        weight.format, torch.cat(outs, dim=-1), scale_rows.new_empty(0), num_rows=N, num_inputs=K, parts=parts
    )


def untile(weight: TiledWeight) -> QuantTensor:
    """The matrices as rows, as in a checkpoint."""
    (N, K), kind = weight.shape[-2:], weight.format
    rows, num_groups = N // weight.parts, -(-K // GROUP[kind])
    codes, scales, begin = [], [], 0
    for _ in range(weight.parts):
        for _, count, strips in tiles(rows):
            size = strips * group_bytes(kind)
            groups = weight.data[..., begin : begin + num_groups * size].unflatten(-1, (num_groups, size))
            begin += num_groups * size
            laid, scale = groups[..., : -strips * STRIP], groups[..., -strips * STRIP :]
            blocks = _lanes_back(kind, laid.unflatten(-1, (-1, strips, 64)))
            code = blocks.movedim((-5, -4), (-3, -2)).flatten(-5, -4).flatten(-3)
            codes.append(code[..., :count, :])
            scales.append(scale.transpose(-1, -2)[..., :count, :])
    num_bytes = K // 2 if kind == "fp4" else K
    data = torch.cat(codes, dim=-2)[..., :num_bytes].contiguous()
    scale = torch.cat(scales, dim=-2)
    if kind == "fp8":
        scale = scale[..., ::128, :]
    dtype = torch.int8 if kind == "fp4" else torch.float8_e4m3fn
    return QuantTensor(kind, data.view(dtype), scale.contiguous().view(torch.float8_e8m0fnu))


# Where each byte of a block comes from.  FP4: a lane's 16-bit halves take the odd and the even inputs, four nibbles
# each.  FP8: in each 16 bytes the first 8 are the earlier pairs of four lanes, the others their later pairs; the
# earlier input of a pair comes second.
def _lanes(kind: str, blocks: Tensor) -> Tensor:
    """uint8 [..., L, 4] as in rows -> [..., L, 4] as laid."""
    if kind == "fp8":
        pairs: Tensor = blocks.unflatten(-2, (4, 4)).unflatten(-1, (2, 2)).flip(-1)
        return pairs.transpose(-3, -2).reshape(blocks.shape)
    even, odd = blocks & 15, blocks >> 4
    return torch.cat([_close(odd), _close(even)], dim=-1)


def _close(nibbles: Tensor) -> Tensor:
    """Four nibbles, a byte each, in two bytes: the first the lowest."""
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _lanes_back(kind: str, laid: Tensor) -> Tensor:
    """[..., 64] as laid -> [..., L, 4] as in rows."""
    if kind == "fp8":
        pairs: Tensor = laid.unflatten(-1, (4, 2, 4, 2))
        return pairs.transpose(-3, -2).flip(-1).flatten(-2).flatten(-3, -2)
    odd, even = laid.unflatten(-1, (STRIP, 2, 2)).unbind(-2)
    return _open(even) | _open(odd) << 4


def _open(closed: Tensor) -> Tensor:
    return torch.stack([closed & 15, closed >> 4], dim=-1).flatten(-2)
