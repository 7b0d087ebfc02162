"""`compress` with gradients by the native library.

Shape letters: T tokens, M rows emitted, S cache slots (of a tail) or strips of rows, R ring rows, D channels per row,
E projected channels, P pooling ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrosome.ops import compress as ops
from pyrosome.ops import native
from pyrosome.ops.compress import cpu
from pyrosome.ops.rope import norm_rope
from pyrosome.quant import unchanged

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
    """As the definition, for float32 kv over rings that want no gradient."""
    tensors = (kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE)
    learned = tail_kv_SRE.requires_grad or tail_gate_SRE.requires_grad
    if learned or emit.end.shape[0] == 0 or any(x.dtype != torch.float32 for x in tensors):
        return ops.compress.definition(*tensors, emit, width)  # type: ignore[no-any-return]
    held = [x.contiguous() for x in tensors]
    return _Compress.apply(*held, type(emit)(*(x.contiguous() for x in emit)), width)  # type: ignore[no-any-return, no-untyped-call]


def compressed_rows(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
    norm_D: Tensor,
    rotation_MF: Tensor,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 kv over rings that want no gradient."""
    rows_MD = compress(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width)
    return norm_rope(rows_MD, norm_D, rotation_MF, eps, round_nope)  # type: ignore[no-any-return]


class _Compress(torch.autograd.Function):
    """All tensors are contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
        kv_TE: Tensor,
        gate_TE: Tensor,
        tail_kv_SRE: Tensor,
        tail_gate_SRE: Tensor,
        bias_PE: Tensor,
        emit: Emit,
        width: int,
    ) -> Tensor:
        rows_MD = cpu.compress(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width)
        ctx.save_for_backward(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, rows_MD)
        ctx.emit, ctx.width = emit, width
        return rows_MD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, rows_MD = ctx.saved_tensors
        kv_TE, _, tail_kv_SRE, _, bias_PE = inputs
        gradient, S, (M, D), (P, E) = gradients[0].contiguous(), native.threads(), rows_MD.shape, bias_PE.shape
        needs_kv, needs_gate, _, _, needs_bias, *_ = ctx.needs_input_grad
        dkv_TE, dgate_TE = (torch.zeros_like(kv_TE) if needed else None for needed in (needs_kv, needs_gate))
        dbias_SPE = bias_PE.new_empty(S, P, E) if needs_bias else None
        native.library().compress_back(
            gradient.data_ptr(), rows_MD.data_ptr(), *(x.data_ptr() for x in (*inputs, *ctx.emit)),
            native.address(dkv_TE), native.address(dgate_TE), native.address(dbias_SPE), M, E, D, P,
            tail_kv_SRE.shape[1], ctx.width, S,
        )  # fmt: skip
        dbias_PE = None if dbias_SPE is None else dbias_SPE.sum(0)
        return dkv_TE, dgate_TE, None, None, dbias_PE, None, None
