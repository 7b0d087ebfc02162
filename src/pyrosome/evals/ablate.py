"""A network with a part of its reach taken away for a while, to see what that part does.

Shape letters: T tokens in step, N compressed rows, K rows chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrosome.config import CSA_RATIO
from pyrosome.errors import RequestError
from pyrosome.model.deepseek_v4 import Attention, Choice, DeepseekV4, Indexer
from pyrosome.model.step import Step

ABLATIONS = ("none", "dense", "half", "random", "window")
_TILE_ELEMENTS = 1 << 20  # keys held at once while rows are drawn


@contextlib.contextmanager
def ablated(network: DeepseekV4, kind: str, seed: int = 0) -> Iterator[None]:
    """Within, the network reads other compressed rows than it would.

    "dense" reads all of them, "half" the better half of what it reads, "random" as many as it reads, drawn by `seed`
    from those there are, "window" none: then layers attend to their window alone.  Rows are computed from what was
    read before, so a cache filled within is of no use outside, and the reverse: open the engine within, and close it
    there.  With "window", layers write no history and no tails: what a cache has there is never read.

    Raises:
        RequestError: there is no such ablation, or no indexer that could choose otherwise.
    """
    if kind not in ABLATIONS:
        raise RequestError(f"the ablation {kind!r} was asked for; there are {', '.join(ABLATIONS)}")
    if kind == "none":
        yield
        return
    indexers = [m for m in network.modules() if isinstance(m, Indexer)]
    if kind != "window" and not indexers:
        raise RequestError(f"the ablation {kind!r} was asked for and this network has no indexer; only window is left")
    with contextlib.ExitStack() as undo:

        def change(module: Any, name: str, value: Any) -> None:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        # A step that was captured runs no Python, and of a hooked network no step is captured or run as such.
        undo.callback(network.register_forward_pre_hook(lambda *_: None).remove)
        if kind == "dense":
            for indexer in indexers:
                change(indexer, "topk", network.config.max_position_embeddings // CSA_RATIO)
        elif kind == "half":
            for indexer in indexers:
                change(indexer, "topk", max(1, indexer.topk // 2))
        elif kind == "random":
            for number, indexer in enumerate(indexers):
                undo.callback(indexer.register_forward_hook(_drawing(_mixed_number(seed, number))).remove)
        else:
            for module in network.modules():
                if isinstance(module, Attention):
                    change(module, "ratio", 0)  # the block keeps its own, by which it turns queries and rows
        yield


def _drawing(seed: int) -> Callable[[Any, tuple[Any, ...], Choice], Choice]:
    def draw(_: Any, given: tuple[Any, ...], chosen: Choice) -> Choice:
        step = next(x for x in given if isinstance(x, Step))
        score_TK, rows_TK = chosen[0], random_rows(step, chosen[1].shape[1], seed)
        return Choice(torch.zeros_like(score_TK).masked_fill_(rows_TK < 0, float("-inf")), rows_TK)

    return draw


def random_rows(step: Step, num: int, seed: int) -> Tensor:
    """`num` rows of those each token sees, or all if they are fewer: int64 [T, K], ascending, -1 past the last.

    They depend on the seed, the token and its position, and on nothing else of the step.
    """
    visible_T, N = step.visible_T(CSA_RATIO), step.num_rows(CSA_RATIO)
    row_N = torch.arange(N, device=step.device)
    stream_T = _mixed(_mixed(step.position_T + seed) + step.ids_T)
    tile = max(1, _TILE_ELEMENTS // max(1, N))
    parts = []
    for t in range(0, len(visible_T), tile):
        key_TN = _mixed(stream_T[t : t + tile, None] + _mixed(row_N)).bitwise_and_(torch.iinfo(torch.int64).max)
        key_TN.masked_fill_(row_N >= visible_T[t : t + tile, None], -1)
        key_TK, rows_TK = key_TN.topk(num, dim=1, sorted=False)
        parts.append(rows_TK.masked_fill(key_TK < 0, N).sort(dim=1).values)
    rows_TK = torch.cat(parts) if parts else visible_T.new_empty(0, num)
    return rows_TK.masked_fill(rows_TK == N, -1)


_64 = (1 << 64) - 1
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # the finaliser of splitmix64


def _mixed(x: Tensor) -> Tensor:
    """Numbers in which every bit of `x` has stirred every other."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in _STEPS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


def _mixed_number(seed: int, number: int) -> int:
    """A seed of its own for each layer, from any whole number."""
    return int(_mixed(torch.tensor(_signed((seed * 0x9E3779B97F4A7C15 + number) & _64))))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
