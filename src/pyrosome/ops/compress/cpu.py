"""`compress` by the native library: no window is gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyrosome.ops import native

if TYPE_CHECKING:
    from pyrosome.ops.compress import Emit


def compress(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
) -> Tensor:
    """As the definition, for float32 kv."""
    (P, E), R, M = bias_PE.shape, tail_kv_SRE.shape[1], emit.end.shape[0]
    D = E * P // width
    kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE = (
        x.float().contiguous() for x in (kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE)
    )
    held = [x.contiguous() for x in emit]
    rows_MD = kv_TE.new_empty(M, D)
    native.library().pyrosome_compress(
        kv_TE.data_ptr(), gate_TE.data_ptr(), tail_kv_SRE.data_ptr(), tail_gate_SRE.data_ptr(), bias_PE.data_ptr(),
        *(x.data_ptr() for x in held), rows_MD.data_ptr(), M, E, D, P, R, width, native.threads(),
    )  # fmt: skip
    return rows_MD
