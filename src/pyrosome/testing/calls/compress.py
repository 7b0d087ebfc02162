"""Calls of `compress` and `compressed_rows`: CSA, HCA and index rows of decode steps and of prompts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from pyrosome.ops.compress import Emit, compress, compressed_rows
from pyrosome.quant import round_kv, unchanged
from pyrosome.testing.calls import Call
from pyrosome.testing.calls.rope import turns

TOKENS = (1, 4, 16, 64, 512, 4096)
MOST_DECODED = 64  # tokens of a call up to here are of a sequence each; more are of one prompt


class Layer(NamedTuple):
    name: str
    ratio: int
    window: int
    width: int  # channels of a row
    rounds: bool

    @property
    def projected(self) -> int:
        """Channels of a token's kv and gate."""
        return self.width * self.window // self.ratio


CSA, HCA = Layer("CSA", 4, 8, 512, True), Layer("HCA", 128, 128, 512, True)
LAYERS = (CSA, HCA, Layer("index", 4, 8, 128, False))


def calls() -> list[Call]:
    """Every row of a step's static bound is emitted."""
    found = [_call(compressed_rows, layer, M) for layer in LAYERS for M in TOKENS]
    return [*found, _call(compress, HCA, 4096)]


def _call(op: Any, layer: Layer, M: int) -> Call:
    rows = M if M <= MOST_DECODED else M // layer.ratio
    num_bytes = rows * layer.width * 4 * (2 * layer.window + 1)
    return Call(op, layer.name, M, 0, functools.partial(_arguments, op, layer, M), num_bytes)


def _arguments(op: Any, layer: Layer, M: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    E, is_decode = layer.projected, M <= MOST_DECODED
    rows, slots = (M, M) if is_decode else (M // layer.ratio, 1)
    number = torch.arange(rows, device=device)
    if is_decode:  # the window's last token; those before it are in the ring of the token's own slot
        end = number * 0 + layer.window - 1
        emit = Emit(number, end, end, number)
    else:
        end = number * layer.ratio + layer.ratio - 1
        emit = Emit(end, end, end * 0, end * 0)
    kv, gate = torch.randn(2, M, E, device=device)
    tail_kv, tail_gate = torch.randn(2, slots, layer.window + 8, E, device=device)
    given = (kv, gate, tail_kv, tail_gate, torch.randn(layer.ratio, E, device=device), emit, layer.window)
    if op is compress:
        return given, {}
    norm = torch.randn(layer.width, device=device)
    return (*given, norm, turns(rows, device), 1e-6, round_kv if layer.rounds else unchanged), {}
