"""Calls of `linear`, `linears`, `grouped_linear` and `scaled`: every product of V4-Flash's attention, and its head."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops.linear import Prepare, grouped_linear, linear, linears, scaled
from pyrosome.quant import QuantTensor, round_activation, unchanged
from pyrosome.testing.calls import Call
from pyrosome.testing.coded import coded

# V4-Flash: hidden size, query latent, heads x head dim, output groups and their width, vocabulary.
D, L, INNER, G, Z, V = 4096, 1024, 32768, 8, 1024, 129280
INDEX, INDEX_HEADS, INDEX_DIM, KV = 8192, 64, 128, 512
DECODE, PREFILL = (1, 4, 16, 64), (512, 4096)

PLAIN = {"bf16": torch.bfloat16, "f32": torch.float32}
Weight = tuple[str, int, int]  # format, N, K
READ: dict[str, list[Weight]] = {  # what reads a layer's input, by the layer's kind
    "window": [("fp8", L, D), ("fp8", KV, D)],
    "HCA": [("fp8", L, D), ("fp8", KV, D), *[("bf16", KV, D)] * 2],
    "CSA": [
        ("fp8", L, D), ("fp8", KV, D), *[("bf16", 2 * KV, D)] * 2, *[("bf16", 2 * INDEX_DIM, D)] * 2,
        ("bf16", INDEX_HEADS, D),
    ],
}  # fmt: skip
LATENT: dict[str, list[Weight]] = {"wq_b": [("fp8", INNER, L)], "wq_b, index": [("fp8", INNER, L), ("fp8", INDEX, L)]}


def calls() -> list[Call]:
    """Decode and prefill of each; what `exact` numerics and unpacked weights launch."""
    made = []
    for M in (*DECODE, *PREFILL):
        made += [_several(f"read by {kind}", M, weights) for kind, weights in READ.items()]
        made += [_several(name, M, weights, has_norm=True) for name, weights in LATENT.items()]
        made += [_grouped("wo_a", M, rounded=True), _single("wo_b", M, ("fp8", D, G * Z))]
        made += [Call(scaled, "index weights", M, 0, functools.partial(_scaled, M), 8 * M * INDEX_HEADS)]
    made += [_several("head", M, [("bf16", V, D)], has_norm=True) for M in DECODE]
    made += [_several("wq_b, exact", M, LATENT["wq_b"], has_norm=True, prepare=unchanged) for M in (1, 4096)]
    made += [_single("wkv, unpacked", M, ("f32", KV, D)) for M in (1, 512)]
    made += [_grouped("wo_a, of any inputs", M, rounded=False) for M in (1, 4096)]
    return made


def _several(
    name: str, M: int, weights: Sequence[Weight], *, has_norm: bool = False, prepare: Prepare = round_activation
) -> Call:
    K = weights[0][2]

    def make(device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # As in the model: only a quantised weight has its inputs rounded.
        given = [(stored(w, device), prepare if w[0] == "fp8" else unchanged) for w in weights]
        norm = (torch.ones(K, device=device), 1e-6) if has_norm else ()
        return (torch.randn(M, K, device=device), given, *norm), {}

    outs = sum(N for _, N, _ in weights)
    size = sum(stored_bytes(w) for w in weights) + 4 * M * (K + outs)
    kinds = {w[0] for w in weights}
    kind = "fp8" if kinds == {"fp8"} and prepare is round_activation else "bf16"
    return Call(linears, name, M, 0, make, size, 2 * M * K * outs, kind)


def _single(name: str, M: int, weight: Weight) -> Call:
    _, N, K = weight

    def make(device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prepare = unchanged if weight[0] == "f32" else round_activation
        return (torch.randn(M, K, device=device), stored(weight, device), prepare), {}

    return Call(linear, name, M, 0, make, stored_bytes(weight) + 4 * M * (N + K), 2 * M * N * K, weight[0])


def _grouped(name: str, M: int, *, rounded: bool) -> Call:
    """`rounded`: inputs are values of bfloat16, as attention's are in `trained`."""
    weight = ("fp8", G * Z, INNER // G)

    def make(device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(M, G, INNER // G, device=device)
        return (x.bfloat16().float() if rounded else x, stored(weight, device)), {}

    size = stored_bytes(weight) + 4 * M * (INNER + G * Z)
    return Call(grouped_linear, name, M, 0, make, size, 2 * M * Z * INNER, "bf16")


def _scaled(M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(M, INDEX_HEADS, device=device), 0.011), {}


def stored(weight: Weight, device: torch.device) -> Tensor | QuantTensor:
    """Some matrix [N, K] in a format, made on `device`."""
    name, N, K = weight
    if name in PLAIN:
        return torch.randn(N, K, device=device, dtype=PLAIN[name])
    return coded(name, (N, K), device, (119, 121))


def stored_bytes(weight: Weight) -> int:
    """Bytes of a weight [N, K]."""
    name, N, K = weight
    return PLAIN[name].itemsize * N * K if name in PLAIN else N * K + -(-N // 128) * -(-K // 128)
