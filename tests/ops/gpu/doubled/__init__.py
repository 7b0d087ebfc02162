"""An op of two variants, for tests of what surrounds kernels.  It is no op of the network."""

from __future__ import annotations

from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.seam import OPS, Op


@Op
def doubled(x: Tensor) -> Tensor:
    """2 x, of rows x [M, D]."""
    return x * 2


OPS.pop("doubled")
gpu.kernel(doubled)
