"""Products by Triton: rows prepared by one launch, weights of a kind multiplied by another.

FP8 weights with inputs rounded to FP8 multiply codes where matrix units take them.  Everything else is bfloat16 values
and float32 sums: decoded weights, and rounded inputs, or inputs cut into three parts that lose nothing.  At one token
tiles of 64 outputs and segments of K (`segments`) fill the device, which streams weights; at many, tiles are square.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from pyrosome.ops import gpu
from pyrosome.ops.gpu import Target, Variant
from pyrosome.ops.linear import Prepare
from pyrosome.ops.linear.products import (
    MOST,
    MOST_SEGMENTS,
    MOST_SUMS,
    code_products,
    float_products,
    sums,
    value_products,
)
from pyrosome.ops.linear.quantize import Rows, prepared_rows
from pyrosome.ops.rms_norm.triton import rms_norm
from pyrosome.quant import QuantTensor, round_activation, unchanged
from pyrosome.quant.tiles import TiledWeight, untile

_BLOCK, _TILE = 128, 64  # inputs of a block, outputs of the smallest tile
_FULL = 160  # programs that fill a device, and no more than that
_MOST_SPLIT = 1024  # tokens up to which segments may lie in memory one by one

CODE_VARIANTS = {
    "few": Variant("few", {"BLOCK_N": 64, "BLOCK_M": 16}, warps=4, stages=6),
    "some": Variant("some", {"BLOCK_N": 64, "BLOCK_M": 64}, warps=4, stages=4),
    "many": Variant("many", {"BLOCK_N": 128, "BLOCK_M": 128}, warps=8, stages=4),
    "narrow": Variant("narrow", {"BLOCK_N": 128, "BLOCK_M": 64}, warps=8, stages=3),
}
VALUE_VARIANTS = {
    "few": Variant("few", {"BLOCK_N": 64, "BLOCK_M": 16, "SKIPS": 0}, warps=4, stages=5),
    "some": Variant("some", {"BLOCK_N": 64, "BLOCK_M": 64, "SKIPS": 0}, warps=4, stages=3),
    # Weights of a byte or less: as many bytes on their way take more steps; inputs are mostly attention's, of one part.
    "few-long": Variant("few-long", {"BLOCK_N": 64, "BLOCK_M": 16, "SKIPS": 1}, warps=4, stages=8),
    "some-long": Variant("some-long", {"BLOCK_N": 64, "BLOCK_M": 64, "SKIPS": 1}, warps=4, stages=5),
    "slim": Variant("slim", {"BLOCK_N": 64, "BLOCK_M": 64, "SKIPS": 1}, warps=8, stages=3),
    "many": Variant("many", {"BLOCK_N": 128, "BLOCK_M": 128, "SKIPS": 1}, warps=8, stages=3),
    "narrow": Variant("narrow", {"BLOCK_N": 128, "BLOCK_M": 64, "SKIPS": 1}, warps=8, stages=2),
}
FLOAT_VARIANTS = {
    "few": Variant("few", {"BLOCK_N": 64, "BLOCK_M": 16}, warps=4, stages=3),
    "many": Variant("many", {"BLOCK_N": 64, "BLOCK_M": 32}, warps=8, stages=2),
}
_SUM = Variant("sum", {"BLOCK": 256}, warps=2, stages=1)
_SCALE = Variant("scale", {"BLOCK": 1024}, warps=4, stages=1)


class _Stored(NamedTuple):
    """A weight as kernels read it."""

    kind: str  # "fp8", "fp4", "bf16", "f32"
    data: Tensor
    scale: Tensor | None
    num_outputs: int
    num_inputs: int


class _Apart(NamedTuple):
    """A product whose segments lie in memory one by one."""

    parts: Tensor  # [S, M, N]
    out: Tensor  # [M, N]
    segments: int


class _Need(NamedTuple):
    """Weights that one launch reads have the same."""

    form: str  # of x, a field of `Rows`
    kind: str
    num_inputs: int


def linear(x: Tensor, weight_NK: Tensor | QuantTensor, prepare: Prepare = unchanged) -> Tensor:
    """As the definition, for float32 x."""
    (out,) = linears(x, ((weight_NK, prepare),))
    return out


def linears(
    x: Tensor, weights: Sequence[tuple[Tensor | QuantTensor, Prepare]], norm: Tensor | None = None, eps: float = 0.0
) -> list[Tensor]:
    """As the definition, for float32 x: one launch for its rows, one for the weights of each kind, one for sums."""
    if not all(prepare is unchanged or prepare is round_activation for _, prepare in weights):
        x = x if norm is None else rms_norm(x, norm, eps)
        known = (unchanged, round_activation)
        return [linear(x, w, p) if p in known else linear(p(x), w) for w, p in weights]
    lead, K = x.shape[:-1], x.shape[-1]
    x_MK = x.reshape(-1, K) if K else x.new_empty(lead.numel(), 0)
    stored = [_stored(weight, K) for weight, _ in weights]
    target = gpu.target(x.device)
    needs = [_need(w, prepare, target) for w, (_, prepare) in zip(stored, weights, strict=True)]
    rows = prepared_rows(x_MK, norm, eps, **{need.form: True for need in needs})
    outs = [x.new_empty(x_MK.shape[0], w.num_outputs) for w in stored]
    apart: list[_Apart] = []
    for need in dict.fromkeys(needs):
        same = [i for i, other in enumerate(needs) if other == need]
        for at in range(0, len(same), MOST):
            now = same[at : at + MOST]
            apart += _multiply(rows, need, [stored[i] for i in now], [outs[i] for i in now], 1, target)
    _add(apart)
    return [out.view(*lead, out.shape[1]) for out in outs]


def grouped_linear(x_TGK: Tensor, weight_NK: Tensor | QuantTensor) -> Tensor:
    """As the definition, for float32 x."""
    T, G, K = x_TGK.shape
    weight = _stored(weight_NK, K)
    if G == 0 or weight.num_outputs % G:
        raise RuntimeError(f"{weight.num_outputs} outputs were to be divided among {G} groups, and do not divide")
    target = gpu.target(x_TGK.device)
    need = _need(weight, unchanged, target)
    x_MK = x_TGK.reshape(T * G, K) if K else x_TGK.new_empty(T * G, 0)
    rows = prepared_rows(x_MK, None, 0.0, **{need.form: True})
    out = x_TGK.new_empty(T, weight.num_outputs)
    _add(_multiply(rows, need, [weight], [out], G, target))
    return out.view(T, G, weight.num_outputs // G)


def scaled(x: Tensor, factor: float) -> Tensor:
    """As the definition, for float32 x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    gpu.launch(_scaled, (gpu.cdiv(x.numel(), 1024),), x, out, x.numel(), float(factor), variant=_SCALE)
    return out


@gpu.jit
def _scaled(x_ptr, out_ptr, size, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size, other=0.0) * factor, mask=at < size)


@functools.cache
def segments(N: int, K: int) -> int:
    """Parts of equal length that K is cut into, whatever else is asked: so many that one token fills the device."""
    blocks, tiles = gpu.cdiv(K, _BLOCK), gpu.cdiv(N, _TILE)
    return max(s for s in range(1, MOST_SEGMENTS + 1) if s == 1 or (blocks % s == 0 and s * tiles <= _FULL))


def _stored(weight: Tensor | QuantTensor, K: int) -> _Stored:
    if len(weight.shape) != 2 or weight.shape[-1] != K:  # memory past a row must never be read
        raise RuntimeError(f"rows of {K} were given to a weight {tuple(weight.shape)}, and need one of [N, {K}]")
    N = weight.shape[0]
    if isinstance(weight, TiledWeight):
        weight = untile(weight)
    if isinstance(weight, QuantTensor) and weight.format not in ("fp8", "fp4"):
        weight = weight.dequantize(torch.float32)
    if isinstance(weight, QuantTensor):
        data, scale = weight.data.contiguous(), weight.scale.contiguous().view(torch.uint8)
        return _Stored(weight.format, data.view(torch.uint8), scale, N, K)
    if weight.dtype == torch.bfloat16:
        return _Stored("bf16", weight.detach().contiguous(), None, N, K)
    return _Stored("f32", weight.detach().float().contiguous(), None, N, K)


def _need(weight: _Stored, prepare: Prepare, target: Target) -> _Need:
    if prepare is round_activation:
        form = "columns" if weight.kind == "fp8" and target.has_fp8 else "rounded"
    else:
        form = "plain" if weight.kind == "f32" else "parts"
    return _Need(form, weight.kind, weight.num_inputs)


def _multiply(
    rows: Rows, need: _Need, weights: list[_Stored], outs: list[Tensor], G: int, target: Target
) -> list[_Apart]:
    """Fill outs [M, N] with products of `rows` [M G, P] and weights of one kind, but for those that are returned."""
    M, K = outs[0].shape[0], need.num_inputs
    if not K:
        for out in outs:
            out.zero_()
        return []
    sizes = tuple(w.num_outputs for w in weights)
    cuts = tuple(segments(N, K) for N in sizes)
    is_apart = max(cuts) > 1 and _leaves_room(M, sizes)
    splits = is_apart or max(cuts) == 1
    variant = _variant(need, M, sizes, splits, target)
    BLOCK_N, BLOCK_M = variant.constants["BLOCK_N"], variant.constants["BLOCK_M"]
    tiles = [gpu.cdiv(N // G, BLOCK_N) * G for N in sizes]
    columns = gpu.cdiv(M, BLOCK_M)
    programs = sum(t * (s if splits else 1) for t, s in zip(tiles, cuts, strict=True)) * columns
    apart = [
        _Apart(out.new_empty(s * M * N), out, s)
        for out, s, N in zip(outs, cuts, sizes, strict=True)
        if is_apart and s > 1
    ]
    parts = iter(apart)
    ys = _six([next(parts).parts if is_apart and s > 1 else out for out, s in zip(outs, cuts, strict=True)])
    data, scales = _six([w.data for w in weights]), _six([w.scale for w in weights])
    numbers = (*_filled([N // G for N in sizes], MOST, 0), *_filled(cuts, MOST, 1), M, K)
    constants: dict[str, Any] = {"EVEN": K % _BLOCK == 0 and all(N // G % 16 == 0 for N in sizes), "SPLIT": splits}
    if need.form == "columns":
        data = _six([w.data.view(torch.float8_e4m3fn) for w in weights])
        assert rows.codes_MP is not None
        gpu.launch(
            code_products, (programs,), rows.codes_MP.view(torch.float8_e4m3fn), rows.scale_GM, *data, *scales, *ys,
            *numbers, variant=variant, matrix="fp8", UPCAST=target.interpreted, **constants,
        )  # fmt: skip
    elif need.kind == "f32":
        x = rows.plain_MP if need.form == "plain" else rows.rounded_MP
        gpu.launch(float_products, (programs,), x, *data, *ys, *numbers, G, variant=variant, **constants)
    else:
        if need.kind == "fp8" and target.has_fp8:
            data = _six([w.data.view(torch.float8_e4m3fn) for w in weights])
        x, deep = (rows.parts_3MP, rows.deep_M) if need.form == "parts" else (rows.rounded_MP, None)
        in_order = need.kind != "fp8" or G == 1 or sizes[0] // G % _BLOCK == 0
        gpu.launch(
            value_products, (programs,), x, deep, *data, *scales, *ys, *numbers, G, variant=variant, matrix="bf16",
            KIND=need.kind, PARTS=3 if need.form == "parts" else 1, IN_ORDER=in_order, UPCAST=target.interpreted,
            **constants,
        )  # fmt: skip
    return apart


def _add(apart: list[_Apart]) -> None:
    """Fill each `out` with the sum of its parts."""
    for at in range(0, len(apart), MOST_SUMS):
        now = apart[at : at + MOST_SUMS]
        M, sizes = now[0].out.shape[0], [a.out.shape[1] for a in now]
        parts = _filled([a.parts for a in now], MOST_SUMS, now[0].parts)
        outs = _filled([a.out for a in now], MOST_SUMS, now[0].out)
        numbers = (*_filled(sizes, MOST_SUMS, 0), *_filled([a.segments for a in now], MOST_SUMS, 1), M)
        added = sum(gpu.cdiv(M * N, _SUM.constants["BLOCK"]) for N in sizes)
        even = all(N % 16 == 0 for N in sizes)
        gpu.launch(sums, (added,), *parts, *outs, *numbers, EVEN=even, variant=_SUM)


def _leaves_room(M: int, sizes: tuple[int, ...]) -> bool:
    """Whether programs with all segments of a tile would be too few for a device."""
    tiles = sum(gpu.cdiv(N, 128) for N in sizes)
    return M <= 64 or (M <= _MOST_SPLIT and tiles * gpu.cdiv(M, 128) < _FULL)


def _variant(need: _Need, M: int, sizes: tuple[int, ...], has_one_sum: bool, target: Target) -> Variant:
    rows = next((most for most in (16, 64, 512) if most >= M), 4096)
    key = f"N={'+'.join(map(str, sizes))},K={need.num_inputs},M<={rows}"
    family = target.capability // 10
    # What is summed beside a tile's own sum takes registers: a block's codes, lower parts, a segment before all.
    many = "many" if has_one_sum else "narrow"
    if need.form == "columns":
        many = many if family == 9 else "narrow"
        return gpu.chosen("code_products", key, CODE_VARIANTS, _by_tokens(M, "few", "some", many), target)
    if need.kind == "f32":
        return gpu.chosen("float_products", key, FLOAT_VARIANTS, _by_tokens(M, "few", "many", "many"), target)
    if need.form == "parts" and family not in (9, 10):
        many = "narrow" if has_one_sum else "slim"
    elif target.shared_bytes < 128 << 10:
        many = "narrow"
    few, some = "few", "slim" if family == 10 else "some"
    if need.kind != "bf16":
        few, some = "few-long", some if target.shared_bytes < 128 << 10 else "some-long"
    return gpu.chosen("value_products", key, VALUE_VARIANTS, _by_tokens(M, few, some, many), target)


def _by_tokens(M: int, few: str, some: str, many: str) -> str:
    return few if M <= 16 else some if M <= 64 else many


def _six(given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """As many as kernels have arguments for: the same kinds of arguments for one weight and for several."""
    return _filled(given, MOST, given[0])


def _filled(given: Sequence[Any], length: int, rest: Any) -> tuple[Any, ...]:
    return (*given, *[rest] * (length - len(given)))
