"""Experts with gradients on the CPU: pairs sorted by expert, plain products over each expert's rows.

Shape letters: T tokens, K experts per token, N rows of which each expert has a run, E experts, D model dim,
I intermediate dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import experts as ops
from pyrosome.ops import native
from pyrosome.ops.experts import ExpertWeights, held
from pyrosome.ops.linear import Prepare


def routed_experts(x_TD: Tensor, bank: ExpertWeights, expert_TK: Tensor, weight_TK: Tensor, limit: float) -> Tensor:
    """As the definition, for float32 x and weights; a token's experts are added in the order they are given in."""
    stacks = _plain(bank)
    if not stacks or bank.w1.shape[0] == 0:
        return ops.routed_experts.definition(x_TD, bank, expert_TK, weight_TK, limit)  # type: ignore[no-any-return]
    (T, K), E = expert_TK.shape, bank.w1.shape[0]
    place_N = held(expert_TK, bank).flatten()
    place_N = torch.where(place_N < 0, E, place_N)
    counts = torch.bincount(place_N, minlength=E + 1).tolist()[:E]
    pair_N = place_N.argsort(stable=True)[: sum(counts)]
    row_TK = pair_N.new_full((T * K,), -1).scatter_(0, pair_N, torch.arange(len(pair_N))).view(T, K)
    weight_N = weight_TK.float().flatten()[pair_N]
    x_ND = _Gather.apply(bank.prepare(x_TD), pair_N // K, row_TK)  # type: ignore[no-untyped-call]
    y_ND = _Experts.apply(x_ND, weight_N, *stacks, counts, bank.prepare, limit, _kind(x_TD))  # type: ignore[no-untyped-call]
    return _Sum.apply(y_ND, pair_N // K, row_TK)  # type: ignore[no-any-return, no-untyped-call]


def shared_expert(x_TD: Tensor, expert: ExpertWeights, limit: float, onto_TD: Tensor | None = None) -> Tensor:
    """As the definition, for float32 x and weights."""
    plain = _plain(expert)
    if not plain:
        return ops.shared_expert.definition(x_TD, expert, limit, onto_TD)  # type: ignore[no-any-return]
    stacks = [w[None] for w in plain]
    out_TD = _Experts.apply(
        expert.prepare(x_TD).contiguous(), None, *stacks, [x_TD.shape[0]], expert.prepare, limit, _kind(x_TD)
    )  # type: ignore[no-untyped-call]
    return out_TD if onto_TD is None else onto_TD + out_TD  # type: ignore[no-any-return]


def _plain(bank: ExpertWeights) -> list[Tensor]:
    """w1, w3 and w2; none where they are stored in another way than as float32."""
    plain = [w for w in bank[:3] if isinstance(w, Tensor) and w.dtype == torch.float32]
    return plain if len(plain) == 3 else []


def _kind(x: Tensor) -> torch.dtype:
    """What products are made of: where autocast is on, its type."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _sum_rows(rows_ND: Tensor, row_TK: Tensor) -> Tensor:
    (T, K), D = row_TK.shape, rows_ND.shape[1]
    out_TD, rows_ND = rows_ND.new_empty(T, D), rows_ND.contiguous()
    native.library().sum_rows(rows_ND.data_ptr(), row_TK.data_ptr(), out_TD.data_ptr(), T, K, D, native.threads())
    return out_TD


class _Gather(torch.autograd.Function):
    """Each row's token [N, D]; the gradients of a token's rows are added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.row_TK = row_TK
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sum_rows(gradients[0], ctx.row_TK), None, None


class _Sum(torch.autograd.Function):
    """The sum of each token's rows [T, D]."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.token_N = token_N
        return _sum_rows(y_ND, row_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].index_select(0, ctx.token_N), None, None


class _Experts(torch.autograd.Function):
    """W2 (weight x swiglu(W1 x, W3 x)) of prepared rows [N, D]: `counts` of each expert, one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_N: Tensor | None,
        w1_EID: Tensor,
        w3_EID: Tensor,
        w2_EDI: Tensor,
        counts: Sequence[int],
        prepare: Prepare,
        limit: float,
        kind: torch.dtype,
    ) -> Tensor:
        N, I = x_ND.shape[0], w1_EID.shape[1]  # noqa: E741
        gate_NI, up_NI = x_ND.new_empty(N, I), x_ND.new_empty(N, I)
        h_NI, y_ND = x_ND.new_empty(N, I), torch.empty_like(x_ND)  # in float32, as are gradients
        x_ND, w1_EID, w3_EID, w2_EDI = (x.to(kind) for x in (x_ND, w1_EID, w3_EID, w2_EDI))
        for e, at in _runs(counts):
            _product(x_ND[at], w1_EID[e].t(), gate_NI[at])
            _product(x_ND[at], w3_EID[e].t(), up_NI[at])
        native.library().swiglu_train(
            gate_NI.data_ptr(), up_NI.data_ptr(), native.address(weight_N), h_NI.data_ptr(), N, I, limit,
            native.threads(),
        )  # fmt: skip
        h_NI = prepare(h_NI).to(kind)
        for e, at in _runs(counts):
            _product(h_NI[at], w2_EDI[e].t(), y_ND[at])
        ctx.save_for_backward(x_ND, weight_N, w1_EID, w3_EID, w2_EDI, gate_NI, up_NI, h_NI)
        ctx.counts, ctx.limit = counts, limit
        return y_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_ND, weight_N, w1_EID, w3_EID, w2_EDI, gate_NI, up_NI, h_NI = ctx.saved_tensors
        needs_x, needs_weight, needs_w1, needs_w3, needs_w2, *_ = ctx.needs_input_grad
        gradient_ND, counts, (N, I) = gradients[0].contiguous(), ctx.counts, gate_NI.shape  # noqa: E741
        dgate_NI, dup_NI = torch.empty_like(gate_NI), torch.empty_like(gate_NI)
        narrow_ND = gradient_ND.to(x_ND.dtype)
        for e, at in _runs(counts):
            _product(narrow_ND[at], w2_EDI[e], dgate_NI[at])
        dweight_N = torch.empty_like(weight_N) if needs_weight else None
        native.library().swiglu_train_back(
            dgate_NI.data_ptr(), gate_NI.data_ptr(), up_NI.data_ptr(), native.address(weight_N), dgate_NI.data_ptr(),
            dup_NI.data_ptr(), native.address(dweight_N), N, I, ctx.limit, native.threads(),
        )  # fmt: skip
        dx_ND, dgate_NI, dup_NI = None, dgate_NI.to(x_ND.dtype), dup_NI.to(x_ND.dtype)
        if needs_x:
            dx_ND = torch.empty_like(gradient_ND)
            for e, at in _runs(counts):
                _product(dgate_NI[at], w1_EID[e], dx_ND[at])
                dx_ND[at] += torch.mm(dup_NI[at], w3_EID[e])
        return (
            dx_ND,
            dweight_N,
            _weights(dgate_NI, x_ND, counts) if needs_w1 else None,
            _weights(dup_NI, x_ND, counts) if needs_w3 else None,
            _weights(narrow_ND, h_NI, counts) if needs_w2 else None,
            None,
            None,
            None,
            None,
        )


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each expert that has any."""
    first = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(first, first + count)
        first += count


def _weights(out_NX: Tensor, in_NY: Tensor, counts: Sequence[int]) -> Tensor:
    """Gradients [E, X, Y] of matrices, from those of what they gave and what they were given."""
    shape = len(counts), out_NX.shape[1], in_NY.shape[1]
    stack_EXY = out_NX.new_empty(shape, dtype=torch.float32)
    for e, count in enumerate(counts):
        if not count:
            stack_EXY[e].zero_()
    for e, at in _runs(counts):
        _product(out_NX[at].t(), in_NY[at], stack_EXY[e])
    return stack_EXY


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b into float32 `out`; of bfloat16, its rounded result."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
