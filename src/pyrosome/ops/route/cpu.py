"""Affinities by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import native


def affinity(logit_TE: Tensor) -> Tensor:
    """As the definition, for float32 logits."""
    logit_TE = logit_TE.contiguous()
    out = torch.empty_like(logit_TE)
    native.library().pyrosome_affinity(logit_TE.data_ptr(), out.data_ptr(), out.numel())
    return out
