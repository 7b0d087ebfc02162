"""Which arithmetic a network runs in: `exact` or `trained`.

`exact` computes in float32 with quantised weights dequantised exactly and no rounding simulated.
`trained` adds every rounding the weights were trained with: FP8 activations in front of quantised weights,
FP8 on the unrotated channels of KV rows, FP4 on the indexer's queries and keys (DeepSeek-V4 report,
quantisation-aware training).  On unquantised weights only the KV and indexer roundings remain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pyrosome.errors import RequestError
from pyrosome.quant import simulate_fp4, simulate_fp8

ACTIVATION_GROUP = 128
KV_GROUP = 64


def unchanged(x: Tensor) -> Tensor:
    """The identity: what a quantisation point does where there is nothing to quantise."""
    return x


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The quantisation points, as functions; the model calls them and never asks which they are."""

    name: str
    activation: Callable[[Tensor], Tensor]  # input of a quantised weight, [..., K]
    kv: Callable[[Tensor], Tensor]  # unrotated channels of a KV row
    index: Callable[[Tensor], Tensor]  # indexer query or key, after the Hadamard rotation
    default_kv_format: str

    def kv_row(self, row: Tensor, nope_dim: int) -> Tensor:
        """A KV row [..., head_dim] as attention sees it: the rotated channels are left alone."""
        if self.kv is unchanged:
            return row
        return torch.cat([self.kv(row[..., :nope_dim]), row[..., nope_dim:]], dim=-1)


EXACT = Numerics("exact", unchanged, unchanged, unchanged, "f32")
TRAINED = Numerics(
    "trained",
    lambda x: simulate_fp8(x, ACTIVATION_GROUP),
    lambda x: simulate_fp8(x, KV_GROUP),
    simulate_fp4,
    "fp8",
)
NUMERICS = {n.name: n for n in (EXACT, TRAINED)}


def numerics_named(name: str) -> Numerics:
    """Look an arithmetic up by name.

    Raises:
        RequestError: there is no such arithmetic.
    """
    if name not in NUMERICS:
        raise RequestError(f"numerics {name!r} was asked for; this build offers {', '.join(NUMERICS)}")
    return NUMERICS[name]
