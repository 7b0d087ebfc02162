"""Root-mean-square normalisation, a program for each row."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant

_ROW = Variant("row", {}, warps=4, stages=1)


@gpu.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < K
    x = tl.load(x_ptr + row * K + channel, mask=inside, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps)
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * K + channel, x, mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As the definition, for float32 x."""
    K = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    weight = weight if weight is None else weight.contiguous()
    rows = x.numel() // max(K, 1)
    gpu.launch(_rms_norm, (rows,), x, weight, out, eps, K=K, BLOCK=gpu.pow2(K), variant=_ROW)
    return out
