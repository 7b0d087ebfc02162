"""Sums over disjoint sets of keys become one: runs of a token's keys, or parts that were attended to apart.

Shape letters: T tokens, R runs, H heads, C head dim, F frequencies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrosome.ops import device, gpu
from pyrosome.ops.sparse_attention.triton_sums import (
    FINISHED,
    LOG2_E,
    LOWEST,
    TINY,
    joined,
    kept,
    log_mass,
    turned_back,
)


@triton.jit
def _write(
    o, top, mass, token, head, sink_ptr, turn_ptr, out_ptr, lse_ptr, WRITES: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = token * H + head + tl.zeros((1, 1), tl.int64)
    if WRITES == FINISHED:
        o = turned_back(o * kept(top, mass, tl.load(sink_ptr + head)), turn_ptr + token * 2 * F, 0, C, F)
        if NARROW:
            o = device.round_bf16(o)
    else:
        o = o * (1.0 / tl.maximum(mass, TINY))
        tl.store(lse_ptr + at, log_mass(top, mass))
    channel = tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at * C + channel, o, mask=channel < C)


@triton.jit
def _run(o_ptr, top_ptr, mass_ptr, row, head, run, runs, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """(sum, maximum, mass) of a run; of one without a key nothing but a mass of -1 was written."""
    channel = tl.arange(0, BLOCK)[None, :]
    at = (row * runs + run) * H + head + tl.zeros((1, 1), tl.int64)
    # What was not written is read, too: to wait for the mass first would take longer.
    mass = tl.load(mass_ptr + at, mask=run < runs, other=-1.0)
    top = tl.load(top_ptr + at, mask=run < runs, other=0.0)
    o = tl.load(o_ptr + at * C + channel, mask=(run < runs) & (channel < C), other=0.0)
    is_there = mass != -1.0
    return tl.where(is_there, o, 0.0), tl.where(is_there, top, LOWEST), tl.where(is_there, mass, 0.0)


@gpu.jit
def merge_runs(
    o_ptr, top_ptr, mass_ptr, sink_ptr, turn_ptr, out_ptr, lse_ptr, first_token, runs,
    WRITES: tl.constexpr, TOGETHER: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, head): so many runs TOGETHER as one program would have taken, then those, each in order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o, mass = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, 1), tl.float32)
    top = mass + LOWEST
    BATCH: tl.constexpr = TOGETHER if TOGETHER < 8 else 8  # are asked for before the first is used
    for start in range(0, runs, TOGETHER):
        own_o, own_mass = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, 1), tl.float32)
        own_top = own_mass + LOWEST
        if TOGETHER == 1:
            own_o, own_top, own_mass = _run(o_ptr, top_ptr, mass_ptr, row, head, start, runs, H, C, BLOCK)
        else:
            for low in range(start, tl.minimum(start + TOGETHER, runs), BATCH):
                several = ()
                for j in tl.static_range(BATCH):
                    one = _run(o_ptr, top_ptr, mass_ptr, row, head, low + j, runs, H, C, BLOCK)
                    several = several + (one,)  # type: ignore[assignment]  # noqa: RUF005
                for j in tl.static_range(BATCH):
                    run_o, run_top, run_mass = several[j]  # type: ignore[var-annotated]
                    own_top, own_mass, share, run_share = joined(own_top, own_mass, run_top, run_mass)
                    own_o = tl.fma(own_o, share, run_o * run_share)
        top, mass, share, own_share = joined(top, mass, own_top, own_mass)
        o = tl.fma(o, share, own_o * own_share)
    _write(o, top, mass, first_token + row, head, sink_ptr, turn_ptr, out_ptr, lse_ptr, WRITES, H, C, F, NARROW, BLOCK)


@triton.jit
def _as_sum(lse):
    """(top, mass) of a part whose sum is divided by its mass already; what is no number stays none."""
    # `fma`, so that no compiler fuses the product with what follows: a part by itself has a share of 1.
    return tl.fma(tl.maximum(lse, LOWEST), LOG2_E, 0.0), tl.where(
        lse == float("-inf"), 0.0, tl.where(lse == lse, 1.0, lse)
    )


@gpu.jit
def join_parts(
    o_ptr, lse_ptr, other_o_ptr, other_lse_ptr, sink_ptr, turn_ptr, out_ptr, out_lse_ptr,
    WRITES: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, head): one part, or two."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = token * H + head + tl.zeros((1, 1), tl.int64)
    channel = tl.arange(0, BLOCK)[None, :]
    o = tl.load(o_ptr + at * C + channel, mask=channel < C, other=0.0)
    top, mass = _as_sum(tl.load(lse_ptr + at))
    if other_o_ptr is not None:
        other = tl.load(other_o_ptr + at * C + channel, mask=channel < C, other=0.0)
        other_top, other_mass = _as_sum(tl.load(other_lse_ptr + at))
        top, mass, share, other_share = joined(top, mass, other_top, other_mass)
        o = tl.fma(o, share, other * other_share)
    _write(o, top, mass, token, head, sink_ptr, turn_ptr, out_ptr, out_lse_ptr, WRITES, H, C, F, False, BLOCK)
