"""Both halves of a hyper-connection by the native library: one call each in place of some ninety small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrosome.ops import hyper_connection as ops
from pyrosome.ops import native, workspace

MAX_STREAMS = 8  # what the kernels keep on their stack


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
    T, J, D = streams_TJD.shape
    if J > MAX_STREAMS:
        return ops.hyper_connection_in.definition(  # type: ignore[no-any-return]
            streams_TJD, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters, norm_D
        )
    streams_TJD, fn, base, scale = (x.contiguous() for x in (streams_TJD, fn, base, scale))
    u, post, comb = workspace.empty(T, D, like=streams_TJD), streams_TJD.new_empty(T, J), streams_TJD.new_empty(T, J, J)
    native.library().hyper_connection_in(
        streams_TJD.data_ptr(), fn.data_ptr(), scale.data_ptr(), base.data_ptr(), native.address(norm_D), u.data_ptr(),
        post.data_ptr(), comb.data_ptr(), T, J, D, norm_eps, hc_eps, sinkhorn_iters, native.threads(),
    )  # fmt: skip
    return u, post, comb


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
    """As the definition, for float32 streams: in one pass over them."""
    T, J, D = streams_TJD.shape
    if J > MAX_STREAMS:
        return ops.hyper_connection_turn.definition(  # type: ignore[no-any-return]
            streams_TJD, out_TD, post_TJ, comb_TJJ, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters, norm_D
        )
    streams_TJD, out_TD, post_TJ, comb_TJJ = (x.contiguous() for x in (streams_TJD, out_TD, post_TJ, comb_TJJ))
    fn, base, scale, new_TJD = fn.contiguous(), base.contiguous(), scale.contiguous(), workspace.empty_like(streams_TJD)
    u, post, comb = workspace.empty_like(out_TD), torch.empty_like(post_TJ), torch.empty_like(comb_TJJ)
    native.library().hyper_connection_turn(
        streams_TJD.data_ptr(), out_TD.data_ptr(), post_TJ.data_ptr(), comb_TJJ.data_ptr(), new_TJD.data_ptr(),
        fn.data_ptr(), scale.data_ptr(), base.data_ptr(), native.address(norm_D), u.data_ptr(), post.data_ptr(),
        comb.data_ptr(), T, J, D, norm_eps, hc_eps, sinkhorn_iters, native.threads(),
    )  # fmt: skip
    return new_TJD, u, post, comb


def hyper_connection_out(streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor) -> Tensor:
    """As the definition, for float32 streams."""
    T, J, D = streams_TJD.shape
    streams_TJD, out_TD, post_TJ, comb_TJJ = (x.contiguous() for x in (streams_TJD, out_TD, post_TJ, comb_TJJ))
    new_TJD = workspace.empty_like(streams_TJD)
    native.library().hyper_connection_out(
        streams_TJD.data_ptr(), out_TD.data_ptr(), post_TJ.data_ptr(), comb_TJJ.data_ptr(), new_TJD.data_ptr(),
        T, J, D, native.threads(),
    )  # fmt: skip
    return new_TJD


def hyper_connection_head(
    streams_TJD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """As the definition, for float32 streams."""
    T, J, D = streams_TJD.shape
    if J > MAX_STREAMS:
        return ops.hyper_connection_head.definition(streams_TJD, fn, base, scale, norm_eps, hc_eps)  # type: ignore[no-any-return]
    streams_TJD, fn, base, scale = (x.contiguous() for x in (streams_TJD, fn, base, scale))
    y_TD = streams_TJD.new_empty(T, D)
    native.library().hyper_connection_head(
        streams_TJD.data_ptr(), fn.data_ptr(), scale.data_ptr(), base.data_ptr(), y_TD.data_ptr(), T, J, D, norm_eps,
        hc_eps,
    )  # fmt: skip
    return y_TD
