"""Pool finished windows of tokens into compressed rows (CSA, HCA, indexer).

Shape letters: T tokens in this step, M rows emitted, S cache slots, R ring
rows per slot, D channels per row, E projected channels (D, or 2 D when
windows overlap), P pooling ratio, W window width (P, or 2 P).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.rope import norm_rope
from pyrosome.ops.seam import Op
from pyrosome.quant import unchanged

# Gathered elements held at once: a definition works in tiles, so that a long prefill does not take gigabytes.
TILE_ELEMENTS = 1 << 24


class Emit(NamedTuple):
    """Which rows this step emits.  All int64 [M].

    M is the step's static bound, so that a captured graph can replay any step; entries past the last
    real row have `end == -1` and yield zeros that the cache write skips.
    """

    token: Tensor  # index into T of the window's last token
    end: Tensor  # absolute position of that token, (end + 1) % P == 0; -1 where there is no row
    start: Tensor  # absolute position where this step's span of the sequence starts
    slot: Tensor  # cache slot of the sequence


@Op
def compress(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
) -> Tensor:
    """Rows [M, D] in promote(kv, float32): softmax over the window of (gate + bias), per channel, times kv.

    Tokens of the window that precede this step's span are read from the tail ring at `position % R`,
    so a row has the same value however the sequence was cut into steps.  With overlap (E == 2 D) the
    older half of the window contributes its first D channels and the newer half its last D.
    Before a sequence's first token there is nothing: gate -inf (DeepSeek-V4 report, CSA and HCA).
    """
    M, E = emit.end.shape[0], kv_TE.shape[1]
    if M == 0:
        return kv_TE.new_zeros(0, E * bias_PE.shape[0] // width)
    rows = max(1, TILE_ELEMENTS // (width * E))
    if rows >= M:
        return _compress(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width)
    tiles = (Emit(*(x[m : m + rows] for x in emit)) for m in range(0, M, rows))
    return torch.cat([_compress(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, t, width) for t in tiles])


def _compress(
    kv_TE: Tensor,
    gate_TE: Tensor,
    tail_kv_SRE: Tensor,
    tail_gate_SRE: Tensor,
    bias_PE: Tensor,
    emit: Emit,
    width: int,
) -> Tensor:
    (P, E), R, W = bias_PE.shape, tail_kv_SRE.shape[1], width
    D = E * P // W
    back_W = torch.arange(W - 1, -1, -1, device=kv_TE.device)
    real_M1 = (emit.end >= 0)[:, None]
    pos_MW = emit.end[:, None] - back_W
    fresh_MW1 = (pos_MW >= emit.start[:, None])[..., None]
    token_MW = (emit.token[:, None] - back_W).clamp(min=0)
    ring = emit.slot[:, None], pos_MW.clamp(min=0) % R

    kv_MWE = torch.where(fresh_MW1, kv_TE[token_MW], tail_kv_SRE[ring])
    gate_MWE = torch.where(fresh_MW1, gate_TE[token_MW], tail_gate_SRE[ring]) + bias_PE[pos_MW.clamp(min=0) % P]
    if W > P:
        older, newer = slice(None, W - P), slice(W - P, None)
        kv_MWE = torch.cat([kv_MWE[:, older, :D], kv_MWE[:, newer, D:]], dim=1)
        gate_MWE = torch.cat([gate_MWE[:, older, :D], gate_MWE[:, newer, D:]], dim=1)
    absent_MW1 = (pos_MW < 0)[..., None]
    gate_MWE = gate_MWE.masked_fill(absent_MW1 & real_M1[..., None], float("-inf"))
    kv_MWE = kv_MWE.masked_fill(absent_MW1, 0.0)
    rows_MD = (kv_MWE * gate_MWE.softmax(dim=1)).sum(dim=1)
    return torch.where(real_M1, rows_MD, 0.0)


@Op
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
    """Rows of `compress`, divided by their RMS, times `norm_D`, turned by their window's first position, rounded."""
    rows_MD = compress(kv_TE, gate_TE, tail_kv_SRE, tail_gate_SRE, bias_PE, emit, width)
    return norm_rope(rows_MD, norm_D, rotation_MF, eps, round_nope)  # type: ignore[no-any-return]


native.kernel(compress)
gpu.kernel(compress)
native.training_kernel(compress)
native.kernel(compressed_rows)
gpu.kernel(compressed_rows)
native.training_kernel(compressed_rows)
