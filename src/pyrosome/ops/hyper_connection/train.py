"""Hyper-connections with gradients by the native library.

Shape letters: T tokens, J streams (4), D model dim, X = (2 + J) J, S strips of tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrosome.ops import hyper_connection as ops
from pyrosome.ops import native

_P = ctypes.c_void_p
STREAMS, LANES, BLOCK = 4, 16, 64  # BLOCK: tokens that are worth a strip of their own


class In(ctypes.Structure):
    """What a sub-block read, and the gradients: `In` of train.cpp."""

    _fields_ = [
        (name, _P)
        for name in (
            "streams", "mix", "fn", "scale", "base", "norm", "du", "dpost", "dcomb", "given",
            "dstreams", "dfn", "dbase", "dscale", "dnorm",
        )
    ]  # fmt: skip


class Out(ctypes.Structure):
    """What went back into the streams, and the gradients: `Out` of train.cpp."""

    _fields_ = [
        (name, _P) for name in ("streams", "sub", "post", "comb", "dstreams", "dsub", "dpost", "dcomb")
    ]  # fmt: skip


def hyper_connection_in(
    streams_TJD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    norm_D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, for four float32 streams."""
    numbers = norm_eps, hc_eps, sinkhorn_iters
    if not _can(streams_TJD, fn, base, scale, norm_D):
        return ops.hyper_connection_in.definition(streams_TJD, fn, base, scale, *numbers, norm_D)  # type: ignore[no-any-return]
    read = [_contiguous(x) for x in (streams_TJD, fn, base, scale, norm_D)]
    return _In.apply(numbers, *read)  # type: ignore[no-any-return, no-untyped-call]


def hyper_connection_out(streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor) -> Tensor:
    """As the definition, for four float32 streams."""
    if not _can(streams_TJD, out_TD, post_TJ, comb_TJJ):
        return ops.hyper_connection_out.definition(streams_TJD, out_TD, post_TJ, comb_TJJ)  # type: ignore[no-any-return]
    written = [_contiguous(x) for x in (streams_TJD, out_TD, post_TJ, comb_TJJ)]
    return _Out.apply(*written)  # type: ignore[no-any-return, no-untyped-call]


def hyper_connection_turn(
    streams_TJD: Tensor,
    out_TD: Tensor,
    post_TJ: Tensor,
    comb_TJJ: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    norm_D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the definition, for four float32 streams: in one pass over them, and one back."""
    numbers = norm_eps, hc_eps, sinkhorn_iters
    written, read = (streams_TJD, out_TD, post_TJ, comb_TJJ), (fn, base, scale)
    if not _can(*written, *read, norm_D):
        return ops.hyper_connection_turn.definition(*written, *read, *numbers, norm_D)  # type: ignore[no-any-return]
    given = [_contiguous(x) for x in (*written, *read, norm_D)]
    return _Turn.apply(numbers, *given)  # type: ignore[no-any-return, no-untyped-call]


def _can(streams_TJD: Tensor, *others: Tensor | None) -> bool:
    _, J, D = streams_TJD.shape
    return J == STREAMS and D % LANES == 0 and all(x is None or x.dtype == torch.float32 for x in others)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _In(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Any, *read: Any) -> Any:
        mix_TX, *made = _read(None, read, numbers)
        ctx.numbers = numbers
        ctx.save_for_backward(*read, mix_TX)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        dstreams_TJD = torch.empty_like(ctx.saved_tensors[0]) if needed[0] else None
        rest = _read_back(ctx.saved_tensors, ctx.numbers, gradients, needed[1:], dstreams_TJD=dstreams_TJD)
        return None, dstreams_TJD, *rest


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *written: Tensor) -> Tensor:
        ctx.save_for_backward(*written)
        new_TJD = torch.empty_like(written[0])
        native.library().hyper_connection_out(
            *map(_address, written), new_TJD.data_ptr(), *new_TJD.shape, native.threads()
        )
        return new_TJD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient_TJD = gradients[0].contiguous()
        T, _, D = gradient_TJD.shape
        made = _room(ctx.saved_tensors, ctx.needs_input_grad)
        native.library().hyper_connection_out_back(
            gradient_TJD.data_ptr(), _told(ctx.saved_tensors, made), T, D, native.threads()
        )
        return made


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Any, *given: Any) -> Any:
        written, read = given[:4], (torch.empty_like(given[0]), *given[4:])
        mix_TX, *made = _read(written, read, numbers)
        ctx.numbers = numbers
        ctx.save_for_backward(*written, *read, mix_TX)
        return read[0], *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        written, read = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        needed = ctx.needs_input_grad[1:]
        made = _room(written, needed) if any(needed[:4]) else _NOTHING
        out = _told(written, made) if any(needed[:4]) else None
        rest = _read_back(read, ctx.numbers, gradients[1:], needed[4:], given_TJD=gradients[0].contiguous(), out=out)
        return None, *made, *rest


_NOTHING: tuple[Tensor | None, ...] = (None,) * 4


def _read(written: Sequence[Tensor] | None, read: Sequence[Any], numbers: Any) -> list[Tensor]:
    """[mix_TX, u_TD, post_TJ, comb_TJJ] of (streams, fn, base, scale, norm); streams are first made of `written`."""
    streams_TJD, fn, base, scale, norm_D = read
    T, J, D = streams_TJD.shape
    mix_TX, u_TD, post_TJ, comb_TJJ = (streams_TJD.new_empty(T, *s) for s in ((len(fn),), (D,), (J,), (J, J)))
    out = None if written is None else _told(written, _NOTHING)
    native.library().hyper_connection_train(
        out, *map(_address, (streams_TJD, fn, scale, base, norm_D, u_TD, post_TJ, comb_TJJ, mix_TX)), T, D, *numbers,
        native.threads(),
    )  # fmt: skip
    return [mix_TX, u_TD, post_TJ, comb_TJJ]


def _read_back(
    read: Sequence[Any],
    numbers: Any,
    gradients: Sequence[Tensor],
    needed: Sequence[bool],
    *,
    dstreams_TJD: Tensor | None = None,
    given_TJD: Tensor | None = None,
    out: Any = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (fn, base, scale, norm), of which `needed` tells; those of the streams are written into `dstreams`.

    Args:
        read: (streams, fn, base, scale, norm, mix).
        gradients: of u, post and comb; `given` is what else the streams have.
        out: the streams were made of others, and their gradient goes on to those.
    """
    streams_TJD, fn, base, scale, norm_D, mix_TX = read
    (T, _, D), (X, Y) = streams_TJD.shape, fn.shape
    S = max(1, min(native.threads(), T // BLOCK))
    shapes = (X, Y), (X,), (3,), (D,)
    wanted = needed[0], True, True, needed[3]
    made = [streams_TJD.new_empty(S, *s) if wish else None for s, wish in zip(shapes, wanted, strict=True)]
    held = [x.contiguous() for x in gradients]
    told = In(*map(_address, (streams_TJD, mix_TX, fn, scale, base, norm_D, *held, given_TJD, dstreams_TJD, *made)))
    native.library().hyper_connection_train_back(ctypes.byref(told), out, T, D, *numbers, S)
    # Strips are added in their order: the same sum each time, for one number of threads.
    return tuple(x if x is None else x[0] if S == 1 else x.sum(0) for x in made)


def _room(written: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """For the gradients of what was written back."""
    return tuple(torch.empty_like(x) if i or needed[0] else None for i, x in enumerate(written))


def _told(written: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
    return ctypes.byref(Out(*map(_address, (*written, *gradients))))
