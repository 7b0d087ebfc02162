"""Routing in two launches: products of the gate by segments of channels, then each token's choice by one program.

A program of the first multiplies a tile of experts (the left operand) by a tile of tokens over one segment of channels,
so that one token still keeps tens of programs busy; of many tokens a program takes all segments, each summed from zero
and added to those before it, which is what the second launch does with them elsewhere: the same bits.  Float32
tokens are cut into three parts of bfloat16, whose products with a gate of bfloat16 lose nothing.  The network holds its
gate in float32, and it is cut likewise: of the nine products those six are taken that reach float32's last bits.  What
a checkpoint stores in bfloat16 has no second part, and loses nothing here either.  Plain float32 multiply-adds would
wait for shared memory: at a prompt's sizes they take longer than all six.

In the second launch a single warp holds a token's affinities, takes the greatest of distinct integer keys as often as
experts are wanted, and lists them by id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyrosome.ops import device, gpu
from pyrosome.ops.gpu import Variant
from pyrosome.ops.linear import dense
from pyrosome.quant import QuantTensor

SEGMENT = 128  # channels whose products are one sum
BLOCK_K = 32  # of them in one tile: with more, parts of both tiles would not stay in registers
VARIANTS = {
    "few": Variant("few", {"ROWS": 64, "TOKENS": 16, "WHOLE": 0}, warps=4, stages=4),
    "some": Variant("some", {"ROWS": 64, "TOKENS": 64, "WHOLE": 0}, warps=4, stages=2),
    "many": Variant("many", {"ROWS": 64, "TOKENS": 64, "WHOLE": 1}, warps=4, stages=2),
}
_TOKEN = Variant("token", {}, warps=1, stages=1)
_PIECE = Variant("piece", {"BLOCK": 1024}, warps=4, stages=1)
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _root_softplus(x):
    """sqrt(log(1 + e^x)) of float32, without an overflow: e^-|x| is at most 1."""
    e = device.exp(-tl.abs(x))
    # log(1 + e) is 2 artanh(z), z = e / (2 + e) up to 1/3: a series without cancellation, to float32's last bits.
    z = e / (2.0 + e)
    y = z * z
    series = y * 0.0 + 1.0 / 19.0
    for i in tl.static_range(9):
        series = tl.fma(series, y, 1.0 / (17 - 2 * i))
    return tl.sqrt_rn(tl.maximum(x, 0.0) + 2.0 * z * series)


@gpu.jit
def _affinity(logit_ptr, out_ptr, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logit_ptr + at, mask=at < num, other=0.0)
    tl.store(out_ptr + at, _root_softplus(x), mask=at < num)


@gpu.jit
def _route_products(
    x_ptr, gate_ptr, sums_ptr, T, E: tl.constexpr, D: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr, FLOAT: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """sums[t, segment, e] = gate[e] . x[t] over a segment; under WHOLE over all of them, as one.

    FLOAT: the gate is float32; else bfloat16.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :]
    expert = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    piece = tl.program_id(2)
    here: tl.constexpr = SEGMENTS if WHOLE else 1
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for segment in range(here):
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in range(0, SEGMENT, BLOCK_K):
            channel = (piece * here + segment) * SEGMENT + start + tl.arange(0, BLOCK_K)
            mask = (expert < E) & (channel[None, :] < D)
            gate = tl.load(gate_ptr + expert * D + channel[None, :], mask=mask, other=0.0)
            mask = (token < T) & (channel[:, None] < D)
            x = tl.load(x_ptr + token * D + channel[:, None], mask=mask, other=0.0)
            if FLOAT:
                acc = device.float_dot(gate, x, acc, UPCAST)
            else:
                high, middle, low = device.narrow3(x, UPCAST)
                acc = device.dot(gate, low, acc, UPCAST)
                acc = device.dot(gate, middle, acc, UPCAST)
                acc = device.dot(gate, high, acc, UPCAST)
        total += acc
    pieces: tl.constexpr = 1 if WHOLE else SEGMENTS
    tl.store(sums_ptr + (token * pieces + piece) * E + expert, total, mask=(token < T) & (expert < E))


@triton.jit
def _score(sums_ptr, expert, there, E: tl.constexpr, PIECES: tl.constexpr):
    """Affinities of experts to a token: its pieces, added in their order."""
    total = tl.load(sums_ptr + expert, mask=there, other=0.0)
    for piece in tl.static_range(1, PIECES):
        total += tl.load(sums_ptr + piece * E + expert, mask=there, other=0.0)
    return tl.where(there, _root_softplus(total), 0.0)


@gpu.jit
def _route_choose(
    sums_ptr, choice_ptr, position_ptr, expert_ptr, weight_ptr, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PIECES: tl.constexpr, BY_SCORE: tl.constexpr,
):  # fmt: skip
    """A token's experts and weights; `choice` is a bias by expert, or under not BY_SCORE the token's experts.

    EP and KP: E and K, rounded up to powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    sums_ptr += token * (PIECES * E)
    is_padding = tl.load(position_ptr + token) < 0
    if BY_SCORE:
        expert = tl.arange(0, EP)
        there = expert < E
        score = _score(sums_ptr, expert, there, E, PIECES)
        bits = device.bits_of(score + tl.load(choice_ptr + expert, mask=there, other=0.0).to(tl.float32))
        bits = tl.where(bits == -2147483648, 0, bits).to(tl.int64)  # zeros of either sign are one
        # Distinct integers, ordered by score and then by the lowest id.
        order = tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
        key = tl.where(there, order * EP + (EP - 1 - expert), _LOWEST)
        chosen = expert < 0
        for _ in tl.static_range(K):
            best = key == tl.max(key)
            chosen = chosen | best
            key = tl.where(best, _LOWEST, key)
        slot = tl.cumsum(chosen.to(tl.int32)) - 1
        score = tl.where(chosen, score, 0.0)
        expert = expert.to(tl.int64)
    else:
        slot = tl.arange(0, KP)
        chosen = slot < K
        expert = tl.load(choice_ptr + token * K + slot, mask=chosen, other=0).to(tl.int64)
        score = _score(sums_ptr, expert, chosen & (expert >= 0) & (expert < E), E, PIECES)
    weight = score / tl.sum(score) * scale
    tl.store(expert_ptr + token * K + slot, tl.where(is_padding, -1, expert), mask=chosen)
    tl.store(weight_ptr + token * K + slot, weight, mask=chosen)


def affinity(logit_TE: Tensor) -> Tensor:
    """As the definition, for float32 logits."""
    logit_TE = logit_TE.contiguous()
    out, num = torch.empty_like(logit_TE), logit_TE.numel()
    gpu.launch(_affinity, (gpu.cdiv(num, _PIECE.constants["BLOCK"]),), logit_TE, out, num, variant=_PIECE)
    return out


def route(
    x_TD: Tensor, gate_ED: Tensor, choice: Tensor, num_chosen: int, scale: float, position_T: Tensor
) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 x; an expert that a choice names and that is none has the weight 0."""
    (T, D), (E, width) = x_TD.shape, gate_ED.shape
    by_score = choice.is_floating_point()
    K = num_chosen if by_score else choice.shape[-1]
    needed = (E,) if by_score else (T, K)
    if width != D:  # memory past a row must never be read
        raise RuntimeError(f"rows of {D} were given to a gate of {width} inputs")
    if tuple(choice.shape) != needed or tuple(position_T.shape) != (T,):
        raise RuntimeError(
            f"a choice of shape {tuple(choice.shape)} and {tuple(position_T.shape)} positions were given; {T} tokens "
            f"and {E} experts need {needed} and ({T},)"
        )
    if by_score and not 0 < K <= E:
        raise RuntimeError(f"{K} of {E} experts were to be chosen")
    x_TD, choice, position_T = x_TD.contiguous(), choice.contiguous(), position_T.contiguous()
    gate_ED = dense(gate_ED, torch.float32) if isinstance(gate_ED, QuantTensor) else gate_ED.contiguous()
    sums, pieces = _products(x_TD, gate_ED)
    expert_TK = torch.empty(T, K, dtype=torch.int64, device=x_TD.device)
    weight_TK = x_TD.new_empty(T, K)
    gpu.launch(
        _route_choose, (T,), sums, choice, position_T, expert_TK, weight_TK, float(scale),
        E=E, EP=gpu.pow2(E), K=K, KP=gpu.pow2(K), PIECES=pieces, BY_SCORE=by_score, variant=_TOKEN,
    )  # fmt: skip
    return expert_TK, weight_TK


def _products(x_TD: Tensor, gate_ED: Tensor) -> tuple[Tensor, int]:
    """(sums [T, pieces, E], how many pieces of a sum there are)."""
    (T, D), E = x_TD.shape, len(gate_ED)
    target = gpu.target(x_TD.device)
    size = "few" if T <= 32 else "some" if T <= 1024 else "many"
    bound = {"few": "M<=32", "some": "M<=1024", "many": "M>1024"}[size]
    variant = gpu.chosen("route_products", f"N={E},K={D},{bound}", VARIANTS, size, target)
    c, segments = variant.constants, gpu.cdiv(D, SEGMENT)
    pieces = 1 if c["WHOLE"] else segments
    sums = x_TD.new_empty(T, pieces, E)
    is_bf16 = gate_ED.dtype == torch.bfloat16
    gpu.launch(
        _route_products, (gpu.cdiv(T, c["TOKENS"]), gpu.cdiv(E, c["ROWS"]), pieces), x_TD, gate_ED, sums, T,
        E=E, D=D, SEGMENT=SEGMENT, SEGMENTS=segments, BLOCK_K=BLOCK_K, FLOAT=not is_bf16, UPCAST=target.interpreted,
        variant=variant, matrix="bf16",
    )  # fmt: skip
    return sums, pieces
