"""Attention by the native library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pyrosome.ops import native
from pyrosome.ops.rows import RowSource


def sparse_attention(q_THC: Tensor, source: RowSource, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries."""
    (T, H, C), K = q_THC.shape, index_TK.shape[1]
    o_THC, lse_TH = torch.empty_like(q_THC, memory_format=torch.contiguous_format), q_THC.new_empty(T, H)
    if K == 0 or T == 0:
        return o_THC.zero_(), lse_TH.fill_(float("-inf"))
    rows_NC, flat_TK = source.read(index_TK)
    q_THC, rows_NC = q_THC.contiguous(), rows_NC.float().contiguous()
    flat_TK, index_TK = flat_TK.contiguous(), index_TK.contiguous()
    native.library().pyrosome_sparse_attention(
        q_THC.data_ptr(), rows_NC.data_ptr(), flat_TK.data_ptr(), index_TK.data_ptr(), o_THC.data_ptr(),
        lse_TH.data_ptr(), T, H, C, K, C**-0.5, native.threads(),
    )  # fmt: skip
    return o_THC, lse_TH


def finish_attention(sink_H: Tensor, rotation_TF: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """As the definition, for float32 parts."""
    T, H, C = parts[0][0].shape
    held = [(o.contiguous(), lse.contiguous()) for o, lse in parts]
    at_o = (ctypes.c_void_p * len(held))(*(o.data_ptr() for o, _ in held))
    at_lse = (ctypes.c_void_p * len(held))(*(lse.data_ptr() for _, lse in held))
    sink_H, turn = sink_H.contiguous(), torch.view_as_real(rotation_TF).contiguous()
    out_THC = torch.empty_like(held[0][0])
    native.library().pyrosome_finish_attention(
        at_o, at_lse, len(held), sink_H.data_ptr(), turn.data_ptr(), out_THC.data_ptr(), T, H, C,
        rotation_TF.shape[1], native.threads(),
    )  # fmt: skip
    return out_THC
