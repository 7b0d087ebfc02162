"""Rotation by the native library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrosome.ops import native, workspace
from pyrosome.ops import rope as ops
from pyrosome.quant import round_index as fp4_index
from pyrosome.quant import round_kv, unchanged


def rotation(frequency_F: Tensor, position_T: Tensor) -> Tensor:
    """As the definition, for float32 frequencies."""
    T, F = position_T.shape[0], frequency_F.shape[0]
    turn = frequency_F.new_empty(T, F, 2)
    position_T, frequency_F = position_T.contiguous(), frequency_F.contiguous()
    native.library().rotation(position_T.data_ptr(), frequency_F.data_ptr(), turn.data_ptr(), T, F)
    return torch.view_as_complex(turn)


def rope(x: Tensor, rotation_TF: Tensor, inverse: bool = False) -> Tensor:
    """As the definition, for float32 x."""
    x, turn = x.contiguous(), torch.view_as_real(rotation_TF).contiguous()
    T, C, out = x.shape[0], x.shape[-1], workspace.empty_like(x)
    native.library().rope(
        x.data_ptr(), turn.data_ptr(), out.data_ptr(), T, x[0].numel() // C if T else 0, C, rotation_TF.shape[1],
        -1.0 if inverse else 1.0, native.threads(),
    )  # fmt: skip
    return out


def norm_rope(
    x: Tensor,
    weight_C: Tensor | None,
    rotation_TF: Tensor,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """As the definition, for float32 x."""
    if round_nope not in (round_kv, unchanged):
        return ops.norm_rope.definition(x, weight_C, rotation_TF, eps, round_nope)  # type: ignore[no-any-return]
    x, turn, out = x.contiguous(), torch.view_as_real(rotation_TF).contiguous(), workspace.empty_like(x)
    native.library().norm_rope(
        x.data_ptr(), native.address(weight_C), turn.data_ptr(), out.data_ptr(), x.shape[0],
        x.shape[1] if x.dim() == 3 else 1, x.shape[-1], rotation_TF.shape[1], eps, round_nope is round_kv,
        native.threads(),
    )  # fmt: skip
    return out


def index_rows(x: Tensor, rotation_TF: Tensor | None, round_index: Callable[[Tensor], Tensor] = unchanged) -> Tensor:
    """As the definition, for float32 x."""
    C = x.shape[-1]
    if round_index not in (fp4_index, unchanged) or C & (C - 1):
        return ops.index_rows.definition(x, rotation_TF, round_index)  # type: ignore[no-any-return]
    x = x.contiguous()
    turn = None if rotation_TF is None else torch.view_as_real(rotation_TF).contiguous()
    out = workspace.empty_like(x)
    native.library().index_rows(
        x.data_ptr(), native.address(turn), out.data_ptr(), x.shape[0], x.shape[1] if x.dim() == 3 else 1, C,
        0 if rotation_TF is None else rotation_TF.shape[1], round_index is fp4_index, native.threads(),
    )  # fmt: skip
    return out
