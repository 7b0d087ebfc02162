"""Rotation by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import native


def rotation(frequency_F: Tensor, position_T: Tensor) -> Tensor:
    """As the definition, for float32 frequencies."""
    T, F = position_T.shape[0], frequency_F.shape[0]
    turn = frequency_F.new_empty(T, F, 2)
    position_T, frequency_F = position_T.contiguous(), frequency_F.contiguous()
    native.library().pyrosome_rotation(position_T.data_ptr(), frequency_F.data_ptr(), turn.data_ptr(), T, F)
    return torch.view_as_complex(turn)


def rope(x: Tensor, rotation_TF: Tensor, inverse: bool = False) -> Tensor:
    """As the definition, for float32 x."""
    x, turn = x.contiguous(), torch.view_as_real(rotation_TF).contiguous()
    T, C, out = x.shape[0], x.shape[-1], torch.empty_like(x)
    native.library().pyrosome_rope(
        x.data_ptr(), turn.data_ptr(), out.data_ptr(), T, x[0].numel() // C if T else 0, C, rotation_TF.shape[1],
        -1.0 if inverse else 1.0, native.threads(),
    )  # fmt: skip
    return out
