"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.seam import Op


@Op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] divided by its own RMS over the last dim, times `weight` [D] where there is one.

    Statistics, product and weight are computed in promote(x, float32), with one cast at the end
    (official inference code; the query heads' norm has no weight).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight).to(x.dtype)


native.kernel(rms_norm)
gpu.kernel(rms_norm)
