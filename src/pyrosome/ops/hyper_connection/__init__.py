"""Manifold-constrained hyper-connections (mHC): residual mixing over parallel streams.

Shape letters: T tokens, J streams (4), D model dim.  Everything is computed in promote(x, float32).
Source: DeepSeek-V4 report, section on mHC, and the official inference code (orientation, eps).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyrosome.ops import gpu, native
from pyrosome.ops.linear import linear
from pyrosome.ops.rms_norm import rms_norm
from pyrosome.ops.seam import Op


@Op
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
    """What a sub-block reads, and how its output goes back.

    Args: fn [(2 + J) J, J D], base [(2 + J) J], scale [3] (for pre, post, comb); norm_D the weight of the RMS norm of
    what is read, where there is one.
    Returns: u_TD = sum_j pre_j X_j in the streams' dtype, normalised; post_TJ; comb_TJJ, made doubly
    stochastic by `sinkhorn_iters` normalisations that begin with a row softmax and end on columns.
    """
    J = streams_TJD.shape[1]
    wide_TJD, mix = _mix(streams_TJD, fn, norm_eps)
    pre_TJ = torch.sigmoid(mix[:, :J] * scale[0] + base[:J]) + hc_eps
    post_TJ = 2 * torch.sigmoid(mix[:, J : 2 * J] * scale[1] + base[J : 2 * J])
    comb_TJJ = (mix[:, 2 * J :] * scale[2] + base[2 * J :]).unflatten(-1, (J, J)).softmax(-1) + hc_eps
    comb_TJJ = _sinkhorn(comb_TJJ.flatten(1), J, hc_eps, sinkhorn_iters).unflatten(-1, (J, J))
    u_TD = _collapse(pre_TJ, wide_TJD, streams_TJD.dtype)
    return (u_TD if norm_D is None else rms_norm(u_TD, norm_D, norm_eps)), post_TJ, comb_TJJ


def _sinkhorn(comb_TX: Tensor, J: int, eps: float, iters: int) -> Tensor:
    """Normalise columns, then `iters` - 1 times rows and columns; X = J x J, row-major.

    A sum with its eps is one product with a matrix of ones: sums over so few elements would each cost a call.
    """
    rows_XX, columns_XX, eps_X = _sums(J, eps, comb_TX.dtype, str(comb_TX.device))
    comb_TX = comb_TX / torch.addmm(eps_X, comb_TX, columns_XX)
    for _ in range(iters - 1):
        comb_TX = comb_TX / torch.addmm(eps_X, comb_TX, rows_XX)
        comb_TX = comb_TX / torch.addmm(eps_X, comb_TX, columns_XX)
    return comb_TX


@functools.cache
def _sums(J: int, eps: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices that replace each element of a flat J x J matrix by its row's or its column's sum, and eps."""
    with torch.inference_mode(False):  # kept across calls, of which some may train
        one, ones = torch.eye(J, dtype=dtype), torch.ones(J, J, dtype=dtype)
        rows, columns = torch.kron(one, ones), torch.kron(ones, one)
        return rows.to(device), columns.to(device), torch.full((J * J,), eps, dtype=dtype, device=device)


@Op
def hyper_connection_out(streams_TJD: Tensor, out_TD: Tensor, post_TJ: Tensor, comb_TJJ: Tensor) -> Tensor:
    """New streams X'_k = post_k out + sum_j comb_jk X_j.  The sum runs over the *first* index of comb."""
    wide = post_TJ.dtype
    mixed_TJD = torch.bmm(comb_TJJ.transpose(1, 2), streams_TJD.to(wide))
    return torch.addcmul(mixed_TJD, post_TJ[..., None], out_TD.to(wide)[:, None]).to(streams_TJD.dtype)


@Op
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
    """Out of one sub-block and into the next: (new streams, and what `hyper_connection_in` says of them)."""
    streams_TJD = hyper_connection_out(streams_TJD, out_TD, post_TJ, comb_TJJ)
    return (
        streams_TJD,
        *hyper_connection_in(streams_TJD, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters, norm_D),
    )


@Op
def hyper_connection_head(
    streams_TJD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """Collapse the streams before the final norm: no post, no comb, no Sinkhorn.  fn [J, J D] -> y [T, D]."""
    wide_TJD, mix_TJ = _mix(streams_TJD, fn, norm_eps)
    return _collapse(torch.sigmoid(mix_TJ * scale + base) + hc_eps, wide_TJD, streams_TJD.dtype)


def _mix(streams_TJD: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """fn applied to all streams at once, divided by one RMS over all J x D values of the token."""
    wide_TJD = streams_TJD.to(torch.promote_types(streams_TJD.dtype, torch.float32))
    flat = wide_TJD.flatten(1)
    return wide_TJD, linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _collapse(weight_TJ: Tensor, wide_TJD: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(weight_TJ[:, None], wide_TJD)[:, 0].to(dtype)


native.kernel(hyper_connection_in)
gpu.kernel(hyper_connection_in)
native.kernel(hyper_connection_out)
gpu.kernel(hyper_connection_out)
native.kernel(hyper_connection_turn)
gpu.kernel(hyper_connection_turn)
native.kernel(hyper_connection_head)
gpu.kernel(hyper_connection_head)
native.training_kernel(hyper_connection_in)
native.training_kernel(hyper_connection_out)
native.training_kernel(hyper_connection_turn)
