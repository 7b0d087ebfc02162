"""Hyper-connections in two launches: the streams' mix by leaves of channels, then each token by one program or two.

A program of the first takes a leaf of channels of all streams, for a few tokens: it makes the new streams of what went
out, and multiplies them by `fn`, [24, J x D], as tiles of plain float32 multiply-adds.  These add along the channels
one after the other, so a token's sums have the same bits in a tile of four tokens and of thirty-two; and one token
keeps as many programs busy as there are leaves.  Of more tokens a program takes a group of leaves, each summed from
zero and added to those before it, which is what the second launch does with them elsewhere: the same bits, and fewer of
them in memory.

A program of the second adds a token's groups, reads its streams (64 KB, out of L2) for their statistic, and collapses
them.  To make a matrix doubly stochastic is a chain of 39 divisions: of few tokens a second program walks it meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Variant

LEAF = 32  # channels of every stream whose products are one sum
GROUP = 4  # leaves whose sums are one
# By the tokens of a tile: `fn` is read once for so many.
VARIANTS = {
    "few": Variant("few", {"TOKENS": 4, "WHOLE": 0}, warps=4, stages=1),
    "some": Variant("some", {"TOKENS": 16, "WHOLE": 1}, warps=8, stages=2),
    "many": Variant("many", {"TOKENS": 32, "WHOLE": 1}, warps=8, stages=2),
}
_TOKEN = Variant("token", {}, warps=8, stages=1)
_MOST_APART = 64  # tokens up to which a second program has a token's matrix
_PIECE = Variant("piece", {"BLOCK": 1024}, warps=4, stages=1)


@triton.jit
def _shares(post_ptr, comb_ptr, token, there, J: tl.constexpr):
    """(post_k, comb_jk row by row) of tokens, as tuples: they grow by addition alone on the device."""
    posts = ()
    combs = ()
    for k in tl.static_range(J):
        posts = posts + (tl.load(post_ptr + token * J + k, mask=there, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(J * J):
        combs = combs + (tl.load(comb_ptr + token * (J * J) + i, mask=there, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return posts, combs


@triton.jit
def _new_stream(xs, out, posts, combs, k: tl.constexpr, J: tl.constexpr):
    """post_k out + sum_j comb_jk x_j: tiles whose last axis are tokens."""
    x = combs[k] * xs[0]
    for j in tl.static_range(1, J):
        x = tl.fma(combs[j * J + k], xs[j], x)
    return tl.fma(posts[k], out, x)


@gpu.jit
def _hyper_connection_mix(
    streams_ptr, out_ptr, post_ptr, comb_ptr, fn_ptr, new_ptr, sums_ptr, T,
    J: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sums[t, group, leaf, n] = sum over the leaf's channels, of all streams, of fn[n] x; x new where there is `out`.

    Under WHOLE sums[t, group, n], the leaves of a group as one.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :]
    there = token < T
    piece = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    here: tl.constexpr = GROUP if WHOLE else 1
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    if out_ptr is not None:
        posts, combs = _shares(post_ptr, comb_ptr, token, there, J)
    for leaf in range(here):
        channel = (piece * here + leaf) * LEAF + tl.arange(0, LEAF)
        inside = (channel[:, None] < D) & there
        at = token * (J * D) + channel[:, None]
        weight_at = fn_ptr + row * (J * D) + channel[None, :]
        has_weight = (row < N) & (channel[None, :] < D)
        xs = ()  # a tuple grows by addition alone on the device
        weights = ()
        for j in tl.static_range(J):
            if not WHOLE:  # no loop loads ahead: all that is read is under way before anything is multiplied
                weights = weights + (tl.load(weight_at + j * D, mask=has_weight, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
            xs = xs + (tl.load(streams_ptr + at + j * D, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        if out_ptr is not None:
            out = tl.load(out_ptr + token * D + channel[:, None], mask=inside, other=0.0)
        news = ()
        for k in tl.static_range(J):
            if out_ptr is not None:
                new = _new_stream(xs, out, posts, combs, k, J)
                tl.store(new_ptr + at + k * D, new, mask=inside)
                news = news + (new,)  # type: ignore[assignment]  # noqa: RUF005
            else:
                news = xs
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for k in tl.static_range(J):
            weight = tl.load(weight_at + k * D, mask=has_weight, other=0.0) if WHOLE else weights[k]  # type: ignore[misc]
            acc = tl.dot(weight, news[k], acc, input_precision="ieee")  # type: ignore[misc]
        total += acc
    pieces: tl.constexpr = GROUPS if WHOLE else GROUPS * GROUP
    tl.store(sums_ptr + (token * pieces + piece) * ROWS + row, total, mask=there)


@triton.jit
def _mixed(sums_ptr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, LEAVES: tl.constexpr):
    """A token's products [ROWS]: the sums of each group's leaves in their order, and of the groups by one tile's."""
    group = tl.arange(0, PADDED)[:, None]
    at = group * (LEAVES * ROWS) + tl.arange(0, ROWS)[None, :]
    total = tl.zeros([PADDED, ROWS], tl.float32)
    for leaf in tl.static_range(LEAVES):
        total += tl.load(sums_ptr + at + leaf * ROWS, mask=group < GROUPS, other=0.0)
    return tl.sum(total, axis=0)


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


@triton.jit
def _collapse(
    total, streams_ptr, base_ptr, scale_ptr, norm_ptr, u_ptr, norm_eps, hc_eps, J: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK)
    has_channel = channel < D
    scale = tl.load(scale_ptr).to(tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(J):
        mixed = tl.sum(tl.where(tl.arange(0, ROWS) == j, total, 0.0))
        pre = tl.sigmoid(mixed * scale + tl.load(base_ptr + j).to(tl.float32)) + hc_eps
        x = tl.load(streams_ptr + j * D + channel, mask=has_channel, other=0.0)
        u = tl.fma(pre, x, u)
    if norm_ptr is not None:
        u = u * tl.rsqrt(tl.sum(u * u) / D + norm_eps)
        u = u * tl.load(norm_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)
    tl.store(u_ptr + channel, u, mask=has_channel)


@triton.jit
def _way_back(
    total, base_ptr, scale_ptr, post_ptr, comb_ptr, hc_eps, J: tl.constexpr, JP: tl.constexpr, ROWS: tl.constexpr,
    ITERS: tl.constexpr,
):  # fmt: skip
    row, stream = tl.arange(0, ROWS), tl.arange(0, JP)
    has_stream = stream < J
    # An element of `total` is a sum of itself and zeros.
    post = tl.sum(tl.where((J + stream)[:, None] == row[None, :], total[None, :], 0.0), axis=1)
    base = tl.load(base_ptr + J + stream, mask=has_stream, other=0.0).to(tl.float32)
    post = 2 * tl.sigmoid(post * tl.load(scale_ptr + 1).to(tl.float32) + base)
    tl.store(post_ptr + stream, post, mask=has_stream)
    cell = stream[:, None] * J + stream[None, :]
    inside = has_stream[:, None] & has_stream[None, :]
    comb = tl.sum(tl.where((2 * J + cell)[:, :, None] == row[None, None, :], total[None, None, :], 0.0), axis=2)
    base = tl.load(base_ptr + 2 * J + cell, mask=inside, other=0.0).to(tl.float32)
    comb = _doubly_stochastic(comb * tl.load(scale_ptr + 2).to(tl.float32) + base, inside, hc_eps, ITERS)
    tl.store(comb_ptr + cell, comb, mask=inside)


@gpu.jit
def _hyper_connection_read(
    streams_ptr, sums_ptr, base_ptr, scale_ptr, norm_ptr, u_ptr, post_ptr, comb_ptr, norm_eps, hc_eps,
    J: tl.constexpr, D: tl.constexpr, JP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, LEAVES: tl.constexpr, ITERS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """What a sub-block reads of a token's streams, and how its output will go back; the head has no `post`, no `comb`.

    JP, BLOCK and PADDED: J, D and GROUPS, rounded up to powers of two.  APART: the second is another program's.
    """
    part, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    streams_ptr += token * (J * D)
    u_ptr += token * D
    total = _mixed(sums_ptr + token * (GROUPS * LEAVES * ROWS), ROWS, GROUPS, PADDED, LEAVES)
    channel = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(J):
        x = tl.load(streams_ptr + j * D + channel, mask=channel < D, other=0.0)
        squares = tl.fma(x, x, squares)
    total = total * tl.rsqrt(tl.sum(squares) / (J * D) + norm_eps)
    if not APART or part == 0:
        _collapse(total, streams_ptr, base_ptr, scale_ptr, norm_ptr, u_ptr, norm_eps, hc_eps, J, D, BLOCK, ROWS)
    if post_ptr is not None:  # noqa: SIM102 (a constant, and a number of the run)
        if not APART or part == 1:
            post_ptr += token * J
            comb_ptr += token * (J * J)
            _way_back(total, base_ptr, scale_ptr, post_ptr, comb_ptr, hc_eps, J, JP, ROWS, ITERS)


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
    posts, combs = _shares(post_ptr, comb_ptr, token, token >= 0, J)
    for k in tl.static_range(J):
        tl.store(new_ptr + at + k * D, _new_stream(xs, out, posts, combs, k, J), mask=inside)


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
    """[T, groups, leaves, rows of fn to a power of two]; of the new streams, written too, where something goes out."""
    T, J, D = streams_TJD.shape
    N, ROWS, groups = len(fn), gpu.pow2(len(fn)), gpu.cdiv(D, LEAF * GROUP)
    size = "few" if T <= 16 else "some" if T <= 128 else "many"
    bound = {"few": "T<=16", "some": "T<=128", "many": "T>128"}[size]
    key = f"N={N},J={J},D={D},{bound}"
    variant = gpu.chosen("hyper_connection_mix", key, VARIANTS, size, gpu.target(streams_TJD.device))
    c, leaves = variant.constants, 1 if variant.constants["WHOLE"] else GROUP
    out_TD, post_TJ, comb_TJJ, new_TJD = out or (None,) * 4
    sums = streams_TJD.new_empty(T, groups, leaves, ROWS)
    gpu.launch(
        _hyper_connection_mix, (gpu.cdiv(T, c["TOKENS"]), groups * leaves),
        streams_TJD, out_TD, post_TJ, comb_TJJ, fn, new_TJD, sums, T,
        J=J, D=D, N=N, ROWS=ROWS, LEAF=LEAF, GROUP=GROUP, GROUPS=groups, variant=variant,
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
    _, groups, leaves, ROWS = sums.shape
    is_apart = made[1] is not None and T <= _MOST_APART
    gpu.launch(
        _hyper_connection_read, (1 + is_apart, T), streams_TJD, sums, base, scale, norm_D, *made, norm_eps, hc_eps,
        J=J, D=D, JP=gpu.pow2(J), BLOCK=gpu.pow2(D), ROWS=ROWS, GROUPS=groups, PADDED=gpu.pow2(groups), LEAVES=leaves,
        ITERS=iters, APART=is_apart, variant=_TOKEN,
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
