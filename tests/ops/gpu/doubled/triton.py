"""Doubling, in blocks of a variant's width; a block that is told to be wrong is off by one bit or so."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant

VARIANTS = {
    "few": Variant("few", {"BLOCK": 16, "WRONG": 0}, warps=1, stages=1),
    "many": Variant("many", {"BLOCK": 64, "WRONG": 0}, warps=1, stages=1),
}


@gpu.jit
def _doubled(x_ptr, out_ptr, N, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, x * (2 + WRONG), mask=at < N)


def doubled(x: Tensor) -> Tensor:
    """As the definition, for float32 x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    few = x.shape[0] <= 16
    key, default = ("M<=16", "few") if few else ("M>16", "many")
    variant = gpu.chosen("doubled", key, VARIANTS, default, gpu.target(x.device))
    grid = (gpu.cdiv(x.numel(), variant.constants["BLOCK"]),)
    gpu.launch(_doubled, grid, x, out, x.numel(), variant=variant)
    return out
