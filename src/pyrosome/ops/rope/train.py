"""Rotation with gradients by the native library.

Shape letters: T vectors, H heads, C channels, F frequencies, S strips of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops import rope as ops
from pyrosome.quant import round_index as fp4_index
from pyrosome.quant import round_kv, unchanged


def rope(x: Tensor, rotation_TF: Tensor, inverse: bool = False) -> Tensor:
    """As the definition, for float32 x."""
    return _Rope.apply(x.contiguous(), _turn(rotation_TF), -1.0 if inverse else 1.0)  # type: ignore[no-any-return, no-untyped-call]


def norm_rope(
    x: Tensor,
    weight_C: Tensor | None,
    rotation_TF: Tensor,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 x."""
    if round_nope not in (round_kv, unchanged) or (weight_C is not None and weight_C.dtype != torch.float32):
        return ops.norm_rope.definition(x, weight_C, rotation_TF, eps, round_nope)  # type: ignore[no-any-return]
    weight_C = None if weight_C is None else weight_C.contiguous()
    return _NormRope.apply(x.contiguous(), weight_C, _turn(rotation_TF), eps, round_nope is round_kv)  # type: ignore[no-any-return, no-untyped-call]


def index_rows(x: Tensor, rotation_TF: Tensor | None, round_index: Callable[[Tensor], Tensor] = unchanged) -> Tensor:
    """As the definition, for float32 x."""
    C = x.shape[-1]
    if round_index not in (fp4_index, unchanged) or C & (C - 1):
        return ops.index_rows.definition(x, rotation_TF, round_index)  # type: ignore[no-any-return]
    turn = None if rotation_TF is None else _turn(rotation_TF)
    return _IndexRows.apply(x.contiguous(), turn, round_index is fp4_index)  # type: ignore[no-any-return, no-untyped-call]


def _turn(rotation_TF: Tensor) -> Tensor:
    return torch.view_as_real(rotation_TF).contiguous()


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


def _turned(x: Tensor, turn: Tensor, sign: float) -> Tensor:
    out = torch.empty_like(x)
    native.library().rope(
        x.data_ptr(), turn.data_ptr(), out.data_ptr(), *_shape(x), turn.shape[1], sign, native.threads()
    )
    return out


def _hadamard(x: Tensor, turn: Tensor | None, rounds: bool) -> Tensor:
    out, F = torch.empty_like(x), 0 if turn is None else turn.shape[1]
    native.library().index_rows(
        x.data_ptr(), native.address(turn), out.data_ptr(), *_shape(x), F, rounds, native.threads()
    )
    return out


class _Rope(torch.autograd.Function):
    """Its gradient is turned the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor, sign: float) -> Tensor:
        ctx.turn, ctx.sign = turn, sign
        return _turned(x, turn, sign)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _turned(gradients[0].contiguous(), ctx.turn, -ctx.sign), None, None


class _IndexRows(torch.autograd.Function):
    """The Hadamard matrix is symmetric: the gradient goes through it, then is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor | None, rounds: bool) -> Tensor:
        ctx.turn = turn
        return _hadamard(x, turn, rounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dx = _hadamard(gradients[0].contiguous(), None, False)
        return dx if ctx.turn is None else _turned(dx, ctx.turn, -1.0), None, None


class _NormRope(torch.autograd.Function):
    """x [T, C] or [T, H, C]; `turn` [T, F, 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor | None, turn: Tensor, eps: float, rounds: bool) -> Tensor:
        out = torch.empty_like(x)
        native.library().norm_rope(
            x.data_ptr(), native.address(weight_C), turn.data_ptr(), out.data_ptr(), *_shape(x), turn.shape[1], eps,
            rounds, native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight_C)
        ctx.turn, ctx.eps = turn, eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, weight_C), gradient, S = ctx.saved_tensors, gradients[0].contiguous(), native.threads()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight_SC = x.new_empty(S, x.shape[-1]) if ctx.needs_input_grad[1] else None
        native.library().norm_rope_back(
            gradient.data_ptr(), x.data_ptr(), native.address(weight_C), ctx.turn.data_ptr(), native.address(dx),
            native.address(dweight_SC), *_shape(x), ctx.turn.shape[1], ctx.eps, S,
        )  # fmt: skip
        return dx, None if dweight_SC is None else dweight_SC.sum(0), None, None, None
