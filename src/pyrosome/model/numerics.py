"""Which arithmetic a network runs in: `exact` or `trained`.

`exact` computes in float32 with quantised weights dequantised exactly and no rounding simulated.
`trained` adds every rounding the weights were trained with: FP8 activations in front of quantised weights,
FP8 on the unrotated channels of KV rows, FP4 on the indexer's queries and keys (DeepSeek-V4 report,
quantisation-aware training).  On unquantised weights only the KV and indexer roundings remain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from pyrosome.errors import RequestError
from pyrosome.quant import round_activation, round_index, round_kv
from pyrosome.quant import unchanged as unchanged


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The quantisation points, as functions; the model calls them and never asks which they are."""

    name: str
    activation: Callable[[Tensor], Tensor]  # input of a quantised weight, [..., K]
    kv: Callable[[Tensor], Tensor]  # unrotated channels of a KV row
    index: Callable[[Tensor], Tensor]  # indexer query or key, after the Hadamard rotation
    default_kv_format: str


EXACT = Numerics("exact", unchanged, unchanged, unchanged, "f32")
TRAINED = Numerics(
    "trained",
    round_activation,
    round_kv,
    round_index,
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
