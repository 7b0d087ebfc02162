"""Rotary position embedding: interleaved pairs of the last `rope_dim` channels.

Shape letters: T vectors, F frequencies (rope_dim / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrosome.config import YarnScaling
from pyrosome.ops import gpu, native
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.seam import Op
from pyrosome.quant import hadamard, unchanged


def frequencies(base: float, rope_dim: int, yarn: YarnScaling | None) -> Tensor:
    """Angle per position, float32 [rope_dim / 2], in radians.

    With YaRN, dims that turn fewer than `beta_slow` times within the original context are slowed by
    `factor`, those that turn more than `beta_fast` times are kept, and a linear ramp lies between.
    No attention factor: neither cos and sin nor the softmax scale change (official inference code).
    """
    f = 1.0 / (base ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))
    if yarn is None:
        return f

    def dim_of(turns: float) -> float:
        return rope_dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), rope_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return f / yarn.factor * (1 - keep) + f * keep


@Op
def rotation(frequency_F: Tensor, position_T: Tensor) -> Tensor:
    """Unit complex numbers [T, F] at the angles position x frequency, in the complex type of `frequency_F`.

    The angle is a float32 product on purpose: near a million tokens it is off by about 0.01 rad, and
    the weights were trained and served with exactly that (official inference code).
    """
    angle_TF = position_T.clamp(min=0).to(frequency_F.dtype)[:, None] * frequency_F
    return torch.complex(angle_TF.cos(), angle_TF.sin())


@Op
def rope(x: Tensor, rotation_TF: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last 2 F channels of x [T, C] or [T, H, C] by its token's angles; `inverse` turns back.

    Channels (2i, 2i + 1) form one complex number (official inference code: not rotate-half).
    """
    width = 2 * rotation_TF.shape[1]
    turn = rotation_TF.conj() if inverse else rotation_TF
    if x.dim() == 3:
        turn = turn[:, None]
    pairs = x[..., -width:].to(turn.real.dtype).unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    return torch.cat([x[..., :-width], turned.to(x.dtype)], dim=-1)


@Op
def norm_rope(
    x: Tensor,
    weight_C: Tensor | None,
    rotation_TF: Tensor,
    eps: float,
    round_nope: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """x [T, C] or [T, H, C] divided by its RMS (times `weight_C`), turned, and its other channels rounded."""
    x = rope(rms_norm(x, weight_C, eps), rotation_TF)
    if round_nope is unchanged:
        return x
    nope = x.shape[-1] - 2 * rotation_TF.shape[1]
    return torch.cat([round_nope(x[..., :nope]), x[..., nope:]], dim=-1)


@Op
def index_rows(x: Tensor, rotation_TF: Tensor | None, round_index: Callable[[Tensor], Tensor] = unchanged) -> Tensor:
    """Index queries or keys x [T, C] or [T, H, C]: turned (where a rotation is given), rotated by Hadamard, rounded."""
    x = x if rotation_TF is None else rope(x, rotation_TF)
    return round_index(hadamard(x))


native.kernel(rotation)
gpu.kernel(rotation)
native.kernel(rope)
gpu.kernel(rope)
native.training_kernel(rope)
native.kernel(norm_rope)
gpu.kernel(norm_rope)
native.training_kernel(norm_rope)
native.kernel(index_rows)
gpu.kernel(index_rows)
native.training_kernel(index_rows)
