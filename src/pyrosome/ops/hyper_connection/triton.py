"""Hyper-connections in two launches: the streams' mix by segments of channels, then each token by one program.

A program of the first takes a segment of channels of all streams, for a few tokens or many: it makes the new streams of
what went out, and multiplies them by `fn`, [24, J x D], as tiles of plain float32 multiply-adds.  These add along the
channels one after the other, so a token's sums have the same bits in a tile of four tokens and of thirty-two; and one
token still keeps as many programs busy as there are segments.  A program of the second adds a token's segments,
normalises its matrix in registers, and reads its streams (64 KB, out of L2) for their statistic and to collapse them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant

SEGMENT = 128  # channels of every stream whose products are one sum, which the sums of others are then added to
CHUNK = 32  # of them in one tile
# By the tokens of a tile: `fn` is read once for so many.
VARIANTS = {
    "few": Variant("few", {"TOKENS": 4}, warps=4, stages=2),
    "some": Variant("some", {"TOKENS": 16}, warps=8, stages=2),
    "many": Variant("many", {"TOKENS": 32}, warps=8, stages=2),
}
_TOKEN = Variant("token", {}, warps=8, stages=1)
_PIECE = Variant("piece", {"BLOCK": 1024}, warps=4, stages=1)


@triton.jit
def _new_stream(xs, out, post_ptr, comb_ptr, token, there, k: tl.constexpr, J: tl.constexpr):
    """post_k out + sum_j comb_jk x_j: tiles whose last axis are tokens."""
    x = tl.load(comb_ptr + token * (J * J) + k, mask=there, other=0.0) * xs[0]
    for j in tl.static_range(1, J):
        x = tl.fma(tl.load(comb_ptr + token * (J * J) + (j * J + k), mask=there, other=0.0), xs[j], x)
    return tl.fma(tl.load(post_ptr + token * J + k, mask=there, other=0.0), out, x)


@gpu.jit
def _hyper_connection_mix(
    streams_ptr, out_ptr, post_ptr, comb_ptr, fn_ptr, new_ptr, sums_ptr, T,
    J: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """sums[t, segment, n] = sum over the segment's channels, of all streams, of fn[n] x; x new where there is `out`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :]
    there = token < T
    segment = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, SEGMENT, CHUNK):
        channel = segment * SEGMENT + start + tl.arange(0, CHUNK)
        inside = (channel[:, None] < D) & there
        at = token * (J * D) + channel[:, None]
        xs = ()  # a tuple grows by addition alone on the device
        for j in tl.static_range(J):
            xs = xs + (tl.load(streams_ptr + at + j * D, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        if out_ptr is not None:
            out = tl.load(out_ptr + token * D + channel[:, None], mask=inside, other=0.0)
        for k in tl.static_range(J):
            x = xs[k]  # type: ignore[var-annotated]
            if out_ptr is not None:
                x = _new_stream(xs, out, post_ptr, comb_ptr, token, there, k, J)
                tl.store(new_ptr + at + k * D, x, mask=inside)
            has_weight = (row < N) & (channel[None, :] < D)
            weight = tl.load(fn_ptr + row * (J * D) + k * D + channel[None, :], mask=has_weight, other=0.0)
            total = tl.dot(weight, x, total, input_precision="ieee")
    num_segments: tl.constexpr = (D + SEGMENT - 1) // SEGMENT
    tl.store(sums_ptr + (token * num_segments + segment) * ROWS + row, total, mask=there)


@triton.jit
def _mixed(sums_ptr, n, there, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """The products `n` [...] of a token: its segments' sums, added in their order."""
    total = tl.load(sums_ptr + n, mask=there, other=0.0)
    for segment in tl.static_range(1, SEGMENTS):
        total += tl.load(sums_ptr + segment * ROWS + n, mask=there, other=0.0)
    return total


@triton.jit
def _doubly_stochastic(a, inside, eps, ITERS: tl.constexpr):
    """A row softmax of a [J, J], then columns, and `ITERS` - 1 times rows and columns; `eps` in every sum, and once."""
    a = tl.where(inside, a, -float("inf"))
    a = tl.where(tl.max(inside.to(tl.int32), axis=1)[:, None] > 0, a, 0.0)  # a row of padding is no NaN
    comb = tl.exp(a - tl.max(a, axis=1)[:, None])
    comb = tl.where(inside, comb / tl.sum(comb, axis=1)[:, None] + eps, 0.0)
    comb = tl.where(inside, comb / (tl.sum(comb, axis=0) + eps)[None, :], 0.0)
    for _ in range(1, ITERS):
        comb = tl.where(inside, comb / (tl.sum(comb, axis=1) + eps)[:, None], 0.0)
        comb = tl.where(inside, comb / (tl.sum(comb, axis=0) + eps)[None, :], 0.0)
    return comb


@gpu.jit
def _hyper_connection_read(
    streams_ptr, sums_ptr, base_ptr, scale_ptr, norm_ptr, u_ptr, post_ptr, comb_ptr, norm_eps, hc_eps,
    J: tl.constexpr, D: tl.constexpr, JP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
    ITERS: tl.constexpr,
):  # fmt: skip
    """What a sub-block reads of a token's streams, and how its output will go back; the head has no `post`, no `comb`.

    JP and BLOCK: J and D, rounded up to powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    has_channel = channel < D
    streams_ptr += token * (J * D)
    sums_ptr += token * (SEGMENTS * ROWS)
    squares = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(J):
        x = tl.load(streams_ptr + j * D + channel, mask=has_channel, other=0.0)
        squares = tl.fma(x, x, squares)
    by_rms = tl.rsqrt(tl.sum(squares) / (J * D) + norm_eps)

    stream = tl.arange(0, JP)
    has_stream = stream < J
    pre = _mixed(sums_ptr, stream, has_stream, ROWS, SEGMENTS) * by_rms
    pre = pre * tl.load(scale_ptr).to(tl.float32) + tl.load(base_ptr + stream, mask=has_stream, other=0.0).to(
        tl.float32
    )
    pre = tl.sigmoid(pre) + hc_eps
    if post_ptr is not None:
        post = _mixed(sums_ptr, J + stream, has_stream, ROWS, SEGMENTS) * by_rms
        base = tl.load(base_ptr + J + stream, mask=has_stream, other=0.0).to(tl.float32)
        post = 2 * tl.sigmoid(post * tl.load(scale_ptr + 1).to(tl.float32) + base)
        tl.store(post_ptr + token * J + stream, post, mask=has_stream)
        cell = stream[:, None] * J + stream[None, :]
        inside = has_stream[:, None] & has_stream[None, :]
        comb = _mixed(sums_ptr, 2 * J + cell, inside, ROWS, SEGMENTS) * by_rms
        base = tl.load(base_ptr + 2 * J + cell, mask=inside, other=0.0).to(tl.float32)
        comb = _doubly_stochastic(comb * tl.load(scale_ptr + 2).to(tl.float32) + base, inside, hc_eps, ITERS)
        tl.store(comb_ptr + token * (J * J) + cell, comb, mask=inside)

    u = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(J):
        x = tl.load(streams_ptr + j * D + channel, mask=has_channel, other=0.0)
        u = tl.fma(tl.sum(tl.where(stream == j, pre, 0.0)), x, u)
    if norm_ptr is not None:
        u = u * tl.rsqrt(tl.sum(u * u) / D + norm_eps)
        u = u * tl.load(norm_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    tl.store(u_ptr + token * D + channel, u, mask=has_channel)


@gpu.jit
def _hyper_connection_out(
    streams_ptr, out_ptr, post_ptr, comb_ptr, new_ptr, J: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    at = token * (J * D) + channel
    xs = ()
    for j in tl.static_range(J):
        xs = xs + (tl.load(streams_ptr + at + j * D, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    out = tl.load(out_ptr + token * D + channel, mask=inside, other=0.0)
    for k in tl.static_range(J):
        x = _new_stream(xs, out, post_ptr, comb_ptr, token, token >= 0, k, J)
        tl.store(new_ptr + at + k * D, x, mask=inside)


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
    """As the definition, for float32 streams."""
    _, J, _ = streams_TJD.shape
    _require(fn, (2 + J) * J, streams_TJD)
    streams_TJD, fn = streams_TJD.contiguous(), fn.contiguous()
    sums = _mix(streams_TJD, fn, None)
    return _read(streams_TJD, sums, base, scale, norm_eps, hc_eps, sinkhorn_iters, norm_D)


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
    """As the definition, for float32 streams: in one pass over them, and one over the new ones."""
    _, J, _ = streams_TJD.shape
    _require(fn, (2 + J) * J, streams_TJD)
    _require_out(streams_TJD, out_TD, post_TJ, comb_TJJ)
    streams_TJD, fn, out_TD, post_TJ, comb_TJJ = (x.contiguous() for x in (streams_TJD, fn, out_TD, post_TJ, comb_TJJ))
    new_TJD = torch.empty_like(streams_TJD)
    sums = _mix(streams_TJD, fn, (out_TD, post_TJ, comb_TJJ, new_TJD))
    return new_TJD, *_read(new_TJD, sums, base, scale, norm_eps, hc_eps, sinkhorn_iters, norm_D)


def hyper_connection_out(streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor) -> Tensor:
    """As the definition, for float32 streams."""
    T, J, D = streams_TJD.shape
    _require_out(streams_TJD, out_TD, post_TJ, comb_TJJ)
    streams_TJD, out_TD, post_TJ, comb_TJJ = (x.contiguous() for x in (streams_TJD, out_TD, post_TJ, comb_TJJ))
    new_TJD = torch.empty_like(streams_TJD)
    grid = (T, gpu.cdiv(D, _PIECE.constants["BLOCK"]))
    gpu.launch(_hyper_connection_out, grid, streams_TJD, out_TD, post_TJ, comb_TJJ, new_TJD, J=J, D=D, variant=_PIECE)
    return new_TJD


def hyper_connection_head(
    streams_TJD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """As the definition, for float32 streams."""
    T, J, D = streams_TJD.shape
    _require(fn, J, streams_TJD)
    streams_TJD, fn = streams_TJD.contiguous(), fn.contiguous()
    sums, y_TD = _mix(streams_TJD, fn, None), streams_TJD.new_empty(T, D)
    _require_shapes(base=(base, (J,)), scale=(scale, (1,)))
    _launch_read(streams_TJD, sums, base, scale, None, (y_TD, None, None), norm_eps, hc_eps, 1)
    return y_TD


def _mix(streams_TJD: Tensor, fn: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> Tensor:
    """[T, segments, rows of fn to a power of two]; of new streams, which are written, where something goes out."""
    T, J, D = streams_TJD.shape
    N, ROWS, SEGMENTS = len(fn), gpu.pow2(len(fn)), gpu.cdiv(D, SEGMENT)
    size = "few" if T <= 16 else "some" if T <= 128 else "many"
    bound = {"few": "T<=16", "some": "T<=128", "many": "T>128"}[size]
    variant = gpu.chosen(
        "hyper_connection_mix", f"N={N},J={J},D={D},{bound}", VARIANTS, size, gpu.target(streams_TJD.device)
    )
    out_TD, post_TJ, comb_TJJ, new_TJD = out or (None,) * 4
    sums = streams_TJD.new_empty(T, SEGMENTS, ROWS)
    gpu.launch(
        _hyper_connection_mix, (gpu.cdiv(T, variant.constants["TOKENS"]), SEGMENTS),
        streams_TJD, out_TD, post_TJ, comb_TJJ, fn, new_TJD, sums, T,
        J=J, D=D, N=N, ROWS=ROWS, SEGMENT=SEGMENT, CHUNK=CHUNK, variant=variant,
    )  # fmt: skip
    return sums


def _read(
    streams_TJD: Tensor,
    sums: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
    norm_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, J, D = streams_TJD.shape
    _require_shapes(base=(base, ((2 + J) * J,)), scale=(scale, (3,)), norm=(norm_D, (D,)))
    made = streams_TJD.new_empty(T, D), streams_TJD.new_empty(T, J), streams_TJD.new_empty(T, J, J)
    _launch_read(streams_TJD, sums, base, scale, norm_D, made, norm_eps, hc_eps, iters)
    return made


def _launch_read(
    streams_TJD: Tensor,
    sums: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_D: Tensor | None,
    made: tuple[Tensor, Tensor | None, Tensor | None],
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> None:
    T, J, D = streams_TJD.shape
    base, scale, norm_D = base.contiguous(), scale.contiguous(), None if norm_D is None else norm_D.contiguous()
    gpu.launch(
        _hyper_connection_read, (T,), streams_TJD, sums, base, scale, norm_D, *made, norm_eps, hc_eps,
        J=J, D=D, JP=gpu.pow2(J), BLOCK=gpu.pow2(D), ROWS=sums.shape[2], SEGMENTS=sums.shape[1], ITERS=iters,
        variant=_TOKEN,
    )  # fmt: skip


def _require(fn: Tensor, num_rows: int, streams_TJD: Tensor) -> None:
    _, J, D = streams_TJD.shape
    _require_shapes(fn=(fn, (num_rows, J * D)))


def _require_out(streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor) -> None:
    T, J, D = streams_TJD.shape
    _require_shapes(out=(out_TD, (T, D)), post=(post_TJ, (T, J)), comb=(comb_TJJ, (T, J, J)))


def _require_shapes(**given: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Memory past a row must never be read.

    Raises:
        RuntimeError: a tensor has another shape than its streams need.
    """
    for name, (x, shape) in given.items():
        if x is not None and tuple(x.shape) != shape:
            raise RuntimeError(f"{name} is of shape {tuple(x.shape)}, and these streams need {shape}")
