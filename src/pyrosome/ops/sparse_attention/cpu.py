"""Attention by the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrosome.ops import native, workspace
from pyrosome.ops import sparse_attention as ops
from pyrosome.ops.rows import NARROW, Pages, RowSource, stored
from pyrosome.quant.rows import FP8KVRows

_I, _P = ctypes.c_int64, ctypes.c_void_p
PAGES, RING = 0, 1


class Source(ctypes.Structure):
    """Where one part of the keys is read: `Source` of attend.cpp."""

    _fields_ = [
        ("kind", _I), ("nope", _I), ("data", _P), ("scale", _P), ("data_bytes", _I), ("scale_bytes", _I), ("table", _P),
        ("width", _I), ("span", _P), ("slot", _P), ("ring_rows", _I), ("spans", _I), ("fresh", _P), ("index", _P),
        ("K", _I),
    ]  # fmt: skip


def attention(q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor) -> Tensor:
    """As the definition, for float32 queries: in one pass over rows that bfloat16 holds exactly."""
    (T, H, C), F = q_THC.shape, rotation_TF.shape[1]
    if not all(source.format in NARROW for source, _ in parts):
        return ops.attention.definition(q_THC, parts, sink_H, rotation_TF)  # type: ignore[no-any-return]
    q_THC, turn = q_THC.contiguous(), torch.view_as_real(rotation_TF).contiguous()
    out_THC, sources, held = workspace.empty_like(q_THC), (Source * len(parts))(), []
    for i, (source, index_TK) in enumerate(parts):
        sources[i], kept = _source(source, index_TK.contiguous())
        held.append(kept)
    native.library().attention(
        q_THC.data_ptr(), sources, len(parts), sink_H.contiguous().data_ptr(), turn.data_ptr(), out_THC.data_ptr(),
        T, H, C, F, C**-0.5, native.threads(),
    )  # fmt: skip
    del held
    return out_THC


def _source(source: RowSource, index_TK: Tensor) -> tuple[Source, object]:
    """What the kernel is told, and what must live until it has run."""
    where = stored(source)
    if where is None or not all(plane.is_contiguous() for plane in where.planes):
        # The source decodes its rows: they are as this step's own, one after the other.
        rows_NC, flat_TK = source.read(index_TK)
        rows_NC, index_TK = rows_NC.float().contiguous(), torch.where(index_TK < 0, -1, flat_TK + 1).contiguous()
        told = Source(kind=RING, fresh=rows_NC.data_ptr(), index=index_TK.data_ptr(), K=index_TK.shape[1])
        return told, (rows_NC, index_TK)
    data, scale, row_format = where.planes[0], where.planes[-1], where.row_format
    told = Source(
        nope=row_format.nope if isinstance(row_format, FP8KVRows) else 0, data=data.data_ptr(), scale=scale.data_ptr(),
        data_bytes=data.shape[-1] * data.element_size(), scale_bytes=scale.shape[-1], index=index_TK.data_ptr(),
        K=index_TK.shape[1],
    )  # fmt: skip
    if isinstance(where, Pages):
        table, span = where.table_BP.contiguous(), where.span_T
        told.kind, told.table, told.width, told.span = PAGES, table.data_ptr(), table.shape[1], span.data_ptr()
        return told, (table, span, index_TK)
    fresh, slot = where.fresh_TC.contiguous(), where.slot_B
    told.kind, told.slot, told.ring_rows, told.spans = RING, slot.data_ptr(), data.shape[1], slot.shape[0]
    told.fresh = fresh.data_ptr()
    return told, (slot, fresh, index_TK)


def sparse_attention(q_THC: Tensor, source: RowSource, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries over rows that nothing is rounded for."""
    if source.format in NARROW:
        return ops.sparse_attention.definition(q_THC, source, index_TK)  # type: ignore[no-any-return]
    (T, H, C), K = q_THC.shape, index_TK.shape[1]
    o_THC, lse_TH = torch.empty_like(q_THC, memory_format=torch.contiguous_format), q_THC.new_empty(T, H)
    if K == 0 or T == 0:
        return o_THC.zero_(), lse_TH.fill_(float("-inf"))
    rows_NC, flat_TK = source.read(index_TK)
    q_THC, rows_NC = q_THC.contiguous(), rows_NC.float().contiguous()
    flat_TK, index_TK = flat_TK.contiguous(), index_TK.contiguous()
    native.library().sparse_attention(
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
    native.library().finish_attention(
        at_o, at_lse, len(held), sink_H.data_ptr(), turn.data_ptr(), out_THC.data_ptr(), T, H, C,
        rotation_TF.shape[1], native.threads(),
    )  # fmt: skip
    return out_THC
