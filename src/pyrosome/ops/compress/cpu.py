"""`compress` by the native library: no window is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrosome.ops import compress as ops
from pyrosome.ops import native
from pyrosome.quant import round_kv, unchanged

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
    return compressed_rows(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width, None, None, 0.0)


def compressed_rows(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
    norm_D: Tensor | None,
    rotation_MF: Tensor | None,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 kv: in one call; rows as they are pooled where there is no norm."""
    if round_nope not in (round_kv, unchanged):
        return ops.compressed_rows.definition(  # type: ignore[no-any-return]
            kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width, norm_D, rotation_MF, eps, round_nope
        )
    (P, E), R, M = bias_PE.shape, tail_kv_SRE.shape[1], emit.end.shape[0]
    D = E * P // width
    rows_MD = kv_TE.new_empty(M, D)
    if M == 0:
        return rows_MD
    kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE = (
        x.float().contiguous() for x in (kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE)
    )
    held = [x.contiguous() for x in emit]
    turn = None if rotation_MF is None else torch.view_as_real(rotation_MF).contiguous()
    native.library().compress(
        kv_TE.data_ptr(), gate_TE.data_ptr(), tail_kv_SRE.data_ptr(), tail_gate_SRE.data_ptr(), bias_PE.data_ptr(),
        *(x.data_ptr() for x in held), rows_MD.data_ptr(), M, E, D, P, R, width, native.address(norm_D),
        native.address(turn), 0 if rotation_MF is None else rotation_MF.shape[1], eps, round_nope is round_kv,
        native.threads(),
    )  # fmt: skip
    return rows_MD
