"""Attention by Triton: weights of keys first, then their sums of values, for 64 heads at once.

Keys are cut into leaves, and SEGMENT leaves are one run: the sums of a run's leaves join in order, then those of the
runs.  In a step of few leaves (decoding) each has programs of its own, which do all of it, and a last kernel joins what
they leave, in the same order.  Else a program takes a run; where all keys are one run, its programs finish by
themselves.  Rows are read where they are stored, through page tables and rings, whose numbers stay on the device: what
is launched is known from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant
from pyrosome.ops.rows import NARROW, Pages, RowSource, stored
from pyrosome.ops.sparse_attention.triton_attend import attend, weigh
from pyrosome.ops.sparse_attention.triton_gather import gather
from pyrosome.ops.sparse_attention.triton_merge import join_parts, merge_runs
from pyrosome.ops.sparse_attention.triton_rows import OWN, PAGE_ROWS, PAGES, RING
from pyrosome.ops.sparse_attention.triton_sums import FINISHED, LOG2_E, PART
from pyrosome.quant.rows import FP8KVRows

KEYS = {True: 64, False: 16}  # of a leaf, over narrow rows and over others
CHUNK = 64  # channels of a tile; with the keys of a leaf it decides about the bits
GROUP = {True: 2, False: 1}  # chunks of which a program sums a run's values
SEGMENT = 16  # leaves of a run
PROGRAMS = 512  # a step that needs no more has a program for each leaf
SPREAD = 128  # with no more than these it has several, which share the leaf's channels
WORKSPACE_BYTES = 96 << 20  # of weights, and of runs that wait to be merged

# "ahead" asks for the rows of the next leaf while it computes, where a device has room for them.
VARIANTS = {"plain": Variant("plain", {}, warps=4, stages=1), "ahead": Variant("ahead", {}, warps=4, stages=2)}
_HEAD = Variant("head", {}, warps=4, stages=1)


class Part(NamedTuple):
    """Where one part of the keys is read, as the kernel is told."""

    kind: int
    pool: tuple[Tensor | None, Tensor | None, Tensor | None]  # data, data as bfloat16, scales
    index_TK: Tensor
    map: Tensor | None = None  # page tables, or slots of spans
    span: Tensor | None = None  # of each token, where there are page tables
    own: Tensor | None = None  # rows of this step, float32
    width: int = 0  # pages of a span, or rows of a ring
    spans: int = 0
    format: str = ""  # of the pool
    nope: int = 0

    def num_rows(self) -> int:
        """How many rows an index can name, 0 being the first."""
        own = 0 if self.own is None else self.own.shape[0]
        if self.kind == PAGES.value:
            return PAGE_ROWS.value * self.width
        return own + (1 + self.spans * self.width if self.kind == RING.value else 0)


def attention(q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], sink_H: Tensor, rotation_TF: Tensor) -> Tensor:
    """As the definition, for float32 queries."""
    narrow = [source.format in NARROW for source, _ in parts]
    _check_rest(q_THC, sink_H, rotation_TF, len(parts))
    if len(parts) <= 2 and len(set(narrow)) == 1:
        return _attend(q_THC, parts, (sink_H, rotation_TF))[0]
    held = [sparse_attention(q_THC, source, index_TK) for source, index_TK in parts]
    out_THC = finish_attention(sink_H, rotation_TF, held)
    return out_THC.to(torch.bfloat16).float() if all(narrow) else out_THC


def sparse_attention(q_THC: Tensor, source: RowSource, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 queries."""
    if q_THC.dim() != 3:
        raise RuntimeError(f"attention takes queries [T, H, C]; they are {list(q_THC.shape)}")
    return _attend(q_THC, [(source, index_TK)], None)


def finish_attention(sink_H: Tensor, rotation_TF: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """As the definition, for float32 parts."""
    first = parts[0][0]
    _check_rest(first, sink_H, rotation_TF, len(parts))
    for o, lse in parts:
        if o.shape != first.shape or lse.shape != first.shape[:2]:
            raise RuntimeError(
                f"finish_attention: parts are o [T, H, C] and lse [T, H] of one shape; the first has "
                f"{list(first.shape)}, another {list(o.shape)} and {list(lse.shape)}"
            )
    (T, H, C), (sink_H, turn) = first.shape, _finishing(sink_H, rotation_TF)
    held = [(o.contiguous(), lse.contiguous()) for o, lse in parts]
    while True:
        (o, lse), (other, other_lse) = held[0], held[1] if len(held) > 1 else (None, None)
        out, out_lse = torch.empty_like(o), torch.empty_like(lse)
        is_last = len(held) <= 2
        gpu.launch(
            join_parts, (T, H), o, lse, other, other_lse, sink_H, turn, out, out_lse,
            WRITES=FINISHED.value if is_last else PART.value, H=H, C=C, F=turn.shape[1], BLOCK=gpu.pow2(C, 2),
            variant=_HEAD,
        )  # fmt: skip
        if is_last:
            return out
        held[:2] = [(out, out_lse)]


def _attend(
    q_THC: Tensor, parts: Sequence[tuple[RowSource, Tensor]], finish: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """(attention [T, H, C], nothing) where it is to be finished with (sink, rotation), else (o, lse)."""
    (T, H, C), target, where = q_THC.shape, gpu.target(q_THC.device), q_THC.device
    narrow = parts[0][0].format in NARROW
    told = [_part(source, index_TK, q_THC) for source, index_TK in parts]
    if len({part.format for part in told if part.format}) > 1:  # a kernel reads one
        told[1:] = [_decoded(source, index_TK, C) for source, index_TK in parts[1:]]
    keys, block_h, block_c = KEYS[narrow], min(64, gpu.pow2(H, 16)), min(CHUNK, gpu.pow2(C, 16))
    leaves = max(1, sum(gpu.cdiv(part.index_TK.shape[1], keys) for part in told))
    run = 1 if T * leaves <= PROGRAMS else SEGMENT
    runs, blocks, chunks = gpu.cdiv(leaves, run), gpu.cdiv(H, block_h), gpu.cdiv(C, block_c)
    q_THC = q_THC.contiguous()
    kinds, arguments = _told(told, torch.bfloat16 if narrow and run > 1 else torch.float32)
    out, lse = torch.empty(T, H, C, device=where), torch.empty(0 if finish else T, H, device=where)
    sink, turn = _finishing(*finish) if finish else (None, None)
    writes, scale = FINISHED.value if finish else PART.value, C**-0.5 * LOG2_E.value
    shape: dict[str, Any] = {"H": H, "C": C, "NARROW": narrow}
    constants = {
        **kinds, **shape, "KEYS": keys, "BLOCK_H": block_h, "BLOCK_C": block_c, "HAS_FP8": target.has_fp8,
        "UPCAST": target.interpreted,
    }  # fmt: skip
    last = {"WRITES": writes, "F": 0 if turn is None else turn.shape[1]}
    merging = {**shape, **last, "TOGETHER": SEGMENT // run, "BLOCK": gpu.pow2(C, 2)}

    if run == 1:
        # Few programs: each scores for itself, and has some of the channels.
        each = gpu.cdiv(chunks, max(1, min(chunks, SPREAD // max(1, T * leaves * blocks))))
        sums = torch.empty(T, leaves, H, C, device=where)
        top, mass = torch.empty(2, T, leaves, H, device=where)
        gpu.launch(
            attend, (T * leaves, blocks, gpu.cdiv(chunks, each)), q_THC, top, mass, sums, *arguments, leaves, each,
            scale, **constants, variant=VARIANTS["plain"], matrix="bf16",
        )  # fmt: skip
        gpu.launch(merge_runs, (T, H), sums, top, mass, sink, turn, out, lse, 0, runs, **merging, variant=_HEAD)
        return out, lse

    # As many tokens at once as the workspace has room for.
    room = H * (leaves * (keys * (2 if narrow else 4) + 8) + (4 * runs * (C + 2) if runs > 1 else 0))
    tokens = max(1, min(T, WORKSPACE_BYTES // room))
    p = torch.empty(tokens, leaves, H, keys, dtype=torch.bfloat16 if narrow else torch.float32, device=where)
    top, mass = torch.empty(2, tokens, leaves, H, device=where)
    sums, run_top, run_mass = out, lse, lse
    if runs > 1:
        sums = torch.empty(tokens, runs, H, C, device=where)
        run_top, run_mass = torch.empty(2, tokens, runs, H, device=where)
    weighing, gathering = (_variant(kernel, target, narrow, C) for kernel in ("weigh", "gather"))
    group = min(GROUP[narrow], chunks)
    for first in range(0, T, tokens):
        count = min(tokens, T - first)
        gpu.launch(
            weigh, (count, runs, blocks), q_THC, p, top, mass, *arguments, first, leaves, scale, RUN=run, **constants,
            variant=weighing, matrix="bf16",
        )  # fmt: skip
        gpu.launch(
            gather, (count * blocks * gpu.cdiv(chunks, group), runs), p, top, mass, sums, sink, turn, run_top, run_mass,
            *arguments, first, leaves, RUN=run, GROUP=group, **constants,
            **last, variant=gathering, matrix="bf16",
        )  # fmt: skip
        if runs > 1:
            gpu.launch(
                merge_runs, (count, H), sums, run_top, run_mass, sink, turn, out, lse, first, runs, **merging,
                variant=_HEAD,
            )  # fmt: skip
    return out, lse


def _variant(kernel: str, target: gpu.Target, narrow: bool, C: int) -> Variant:
    default = "ahead" if narrow and target.capability in (90, 100) else "plain"
    return gpu.chosen(kernel, f"C={C},{'narrow' if narrow else 'float32'}", VARIANTS, default, target)


def _finishing(sink_H: Tensor, rotation_TF: Tensor) -> tuple[Tensor, Tensor]:
    return sink_H.float().contiguous(), torch.view_as_real(rotation_TF.resolve_conj()).float().contiguous()


def _check_rest(x_THC: Tensor, sink_H: Tensor, rotation_TF: Tensor, parts: int) -> None:
    if x_THC.dim() != 3:
        raise RuntimeError(f"attention takes [T, H, C]; it is {list(x_THC.shape)}")
    T, H, C = x_THC.shape
    if not parts or sink_H.shape != (H,) or rotation_TF.shape[:-1] != (T,) or C % 2 or 2 * rotation_TF.shape[1] > C:
        raise RuntimeError(
            f"attention of {T} tokens and {H} heads of {C} channels needs at least one part, a sink [{H}] and a "
            f"rotation [{T}, at most {C // 2}]; there are {parts}, {list(sink_H.shape)}, {list(rotation_TF.shape)}"
        )


def _part(source: RowSource, index_TK: Tensor, q_THC: Tensor) -> Part:
    T, _, C = q_THC.shape
    if index_TK.dim() != 2 or index_TK.shape[0] != T:
        raise RuntimeError(f"attention of {T} tokens needs an index [{T}, K]; it is {list(index_TK.shape)}")
    where = stored(source)
    if where is None or not all(_is_plain(plane) for plane in where.planes):
        return _decoded(source, index_TK, C)
    data, row_format = where.planes[0], where.row_format
    nope, wide, scale = 0, None, None
    width = row_format.nope + row_format.rope if isinstance(row_format, FP8KVRows) else data.shape[-1]
    if width != C or row_format.planes(C)[0] != (data.dtype, data.shape[-1]):
        raise RuntimeError(f"attention over rows of {C} channels: they are stored as {row_format}, {list(data.shape)}")
    if isinstance(row_format, FP8KVRows):
        nope, wide, scale = row_format.nope, data.view(torch.bfloat16), where.planes[1].view(torch.int64)
    index_TK, pool = index_TK.long().contiguous(), (data, wide, scale)
    if isinstance(where, Pages):
        table, span = where.table_BP.contiguous(), where.span_T.contiguous()
        told = Part(PAGES.value, pool, index_TK, table, span, None, table.shape[1], table.shape[0])
        return told._replace(format=row_format.name, nope=nope)
    own, slot = where.fresh_TC.float().contiguous(), where.slot_B.contiguous()
    return Part(RING.value, pool, index_TK, slot, slot, own, data.shape[1], slot.shape[0], row_format.name, nope)


def _told(parts: Sequence[Part], own_dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor | int | None]]:
    """Constants and arguments of the kernels for two parts of one format; one part has a second beside it, of no keys.

    What a part lacks and the other has is the other's, so that a pointer can be chosen by a number; it is not read.
    """
    parts = [part if part.own is None else part._replace(own=part.own.to(own_dtype)) for part in parts]
    if len(parts) == 1:
        (one,) = parts
        kind = {PAGES.value: RING.value, RING.value: PAGES.value}.get(one.kind, OWN.value)
        own = torch.empty(1, dtype=own_dtype, device=one.index_TK.device) if one.own is None else one.own
        nothing = one._replace(kind=kind, index_TK=one.index_TK[:, :0], own=own)
        parts = [nothing, one] if one.kind == PAGES.value else [one, nothing]
    a, b = parts
    arguments: list[Tensor | int | None] = []
    for part, other in ((a, b), (b, a)):
        arguments += part.pool if part.format else other.pool
        arguments += [other.map if part.map is None else part.map, other.span if part.span is None else part.span]
        arguments += [other.own if part.own is None else part.own, part.index_TK]
        arguments += [part.width, part.spans, part.index_TK.shape[1], part.num_rows()]
    kinds = {"A_KIND": a.kind, "B_KIND": b.kind, "FORMAT": a.format or b.format, "NOPE": max(a.nope, b.nope)}
    return kinds, arguments


def _is_plain(plane: Tensor) -> bool:
    return plane.is_contiguous() and plane.storage_offset() * plane.element_size() % 16 == 0


def _decoded(source: RowSource, index_TK: Tensor, C: int) -> Part:
    """A part whose source decodes its rows."""
    if index_TK.shape[1]:
        rows_NC, flat_TK = source.read(index_TK)
        index_TK = torch.where(index_TK < 0, -1, flat_TK)
    else:
        rows_NC = torch.empty(0, C, device=index_TK.device)
    if rows_NC.shape[1] != C:
        raise RuntimeError(f"attention over rows of {C} channels: the source gives {list(rows_NC.shape)}")
    return Part(OWN.value, (None, None, None), index_TK.long().contiguous(), own=rows_NC.float().contiguous())
