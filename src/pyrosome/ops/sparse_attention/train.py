"""Attention with gradients by the native library.

Shape letters: T tokens, H heads, C head dim, K rows a token may read, N rows at hand, S strips of tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops import sparse_attention as ops
from pyrosome.ops.rows import NARROW, RowSource

_I, _P = ctypes.c_int64, ctypes.c_void_p
LANES = 16


class Part(ctypes.Structure):
    """One part of the keys: `Part` of train.cpp."""

    _fields_ = [("rows", _P), ("flat", _P), ("index", _P), ("gradient", _P), ("K", _I), ("N", _I)]


def attention(q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor) -> Tensor:
    """As the definition, for float32 queries over rows that nothing is rounded for."""
    if not _can(q_THC, parts):
        return ops.attention.definition(q_THC, parts, sink_H, rotation_TF)  # type: ignore[no-any-return]
    return _run(q_THC, parts, sink_H, rotation_TF)[0]


def watched_attention(
    q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries over rows that nothing is rounded for."""
    if not _can(q_THC, parts):
        return ops.watched_attention.definition(q_THC, parts, sink_H, rotation_TF)  # type: ignore[no-any-return]
    out_THC, p_THK = _run(q_THC, parts, sink_H, rotation_TF)
    last = parts[-1][1].shape[1]
    return out_THC, p_THK[..., p_THK.shape[-1] - 1 - last : -1].sum(1)


def _can(q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]]) -> bool:
    return q_THC.shape[2] % LANES == 0 and not any(source.format in NARROW for source, _ in parts)


def _run(
    q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor
) -> tuple[Tensor, Tensor]:
    read = [source.read(index_TK) for source, index_TK in parts if index_TK.shape[1]]
    index = [index_TK.contiguous() for _, index_TK in parts if index_TK.shape[1]]
    turn = torch.view_as_real(rotation_TF).contiguous()
    flat = [flat_TK.contiguous() for _, flat_TK in read]
    rows = [rows_NC.contiguous() for rows_NC, _ in read]
    return _Attention.apply(q_THC.contiguous(), sink_H, turn, flat, index, *rows)  # type: ignore[no-any-return, no-untyped-call]


def _told(rows: Sequence[Tensor], flat: Sequence[Tensor], index: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
    told = (Part * len(rows))()
    for i, rows_NC in enumerate(rows):
        gradient = gradients[i].data_ptr() if gradients else None
        K, N = index[i].shape[1], rows_NC.shape[0]
        told[i] = Part(rows_NC.data_ptr(), flat[i].data_ptr(), index[i].data_ptr(), gradient, K, N)
    return told


class _Attention(torch.autograd.Function):
    """(out [T, H, C], weights [T, H, K + 1] of the rows and the sink); no gradient comes from the weights."""

    @staticmethod
    def forward(ctx: Any, q_THC: Tensor, sink_H: Tensor, turn: Tensor, flat: Any, index: Any, *rows: Tensor) -> Any:
        (T, H, C), K = q_THC.shape, sum(i.shape[1] for i in index)
        out_THC, p_THK = torch.empty_like(q_THC), q_THC.new_empty(T, H, K + 1)
        native.library().attention_train(
            q_THC.data_ptr(), _told(rows, flat, index, []), len(rows), sink_H.contiguous().data_ptr(), turn.data_ptr(),
            out_THC.data_ptr(), p_THK.data_ptr(), T, H, C, turn.shape[1], C**-0.5, native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(q_THC, turn, out_THC, p_THK, *rows)
        ctx.flat, ctx.index = flat, index
        ctx.mark_non_differentiable(p_THK)
        return out_THC, p_THK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q_THC, turn, out_THC, p_THK, *rows = ctx.saved_tensors
        (T, H, C), S = q_THC.shape, native.threads()
        gradient = gradients[0].contiguous()
        dq_THC, dsink_SH = torch.empty_like(q_THC), q_THC.new_empty(S, H)
        drows = [r.new_zeros(S, *r.shape) for r in rows]
        native.library().attention_train_back(
            gradient.data_ptr(), q_THC.data_ptr(), out_THC.data_ptr(), p_THK.data_ptr(),
            _told(rows, ctx.flat, ctx.index, drows), len(rows), turn.data_ptr(), dq_THC.data_ptr(), dsink_SH.data_ptr(),
            T, H, C, turn.shape[1], C**-0.5, S,
        )  # fmt: skip
        # Strips are added in their order: the same sum each time, for one number of threads.
        return dq_THC, dsink_SH.sum(0), None, None, None, *(d[0] if S == 1 else d.sum(0) for d in drows)
