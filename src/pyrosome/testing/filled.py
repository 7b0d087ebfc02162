"""Sequences that hold random rows, as if so many tokens had been read: a million-token cache in seconds.

The rows of a stream are a function of (seed, layer, stream, row) alone, so that what a cache should hold can be
said without asking it.  Shape letters: N rows, C row width, E projected channels, T tokens.
"""

from __future__ import annotations

import dataclasses
import zlib

import torch
from torch import Tensor

from pyrosome.cache.streams import layer_streams
from pyrosome.engine.runner import Runner, Sequence
from pyrosome.model.step import Span, Step
from pyrosome.ops.compress import Emit

BLOCK_ROWS = 4096  # rows drawn from one generator


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """Seeded rows of unit variance: the size that normalised KV rows, rotated keys and raw tails have."""

    seed: int

    def rows(self, layer: int, stream: str, low: int, high: int, width: int) -> Tensor:
        """Rows low..high of a stream, float32 [N, C]; the same whatever range they are asked in."""
        parts = [
            self._block(layer, stream, block, width)[max(low - block * BLOCK_ROWS, 0) : high - block * BLOCK_ROWS]
            for block in range(low // BLOCK_ROWS, -(-high // BLOCK_ROWS))
        ]
        return torch.cat([torch.empty(0, width), *parts])

    def _block(self, layer: int, stream: str, block: int, width: int) -> Tensor:
        name = f"{self.seed}/{layer}/{stream}/{block}"
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(BLOCK_ROWS, width, generator=g)


@torch.inference_mode()
def fill(runner: Runner, sequence: Sequence, length: int, rows: RandomRows) -> None:
    """Give an empty sequence the rows of `length` tokens: its histories whole, its windows and tails to the ring.

    Rows enter by the view through which the network writes its own, in the pool's formats and pages.

    Raises:
        ContextTooLong: the pool was opened for fewer tokens.
    """
    if sequence.length:
        raise ValueError(f"an empty sequence can be filled; this one has {sequence.length} tokens")
    config, pool = runner.model.config, runner.pool
    pool.prepare(sequence.holding, 0, length)
    specs = [layer_streams(config, ratio, pool.kv_format) for ratio in config.layer_ratios]
    kept = min(length, max(s.keep for layer in specs for s in layer if s.keep is not None))
    last = Step.of([Span(sequence.slot, length - kept, [0] * kept)], runner.device)
    for layer, cache in enumerate(pool.layers(last)):
        for spec in specs[layer]:
            if spec.is_history:
                for low in range(0, length // spec.per_tokens, BLOCK_ROWS):
                    high = min(low + BLOCK_ROWS, length // spec.per_tokens)
                    row_N = torch.arange(low, high, device=runner.device)
                    row_NC = rows.rows(layer, spec.name, low, high, spec.width).to(runner.device)
                    cache.history(spec.name, row_NC, emitted(row_N, spec.per_tokens, sequence.slot), spec.per_tokens)
                continue
            row_TC = rows.rows(layer, spec.name, length - kept, length, spec.width).to(runner.device)
            if spec.name.endswith("tail"):
                cache.keep_tail(spec.name, *row_TC.chunk(2, dim=1))
            else:
                cache.keep_window(row_TC)
    sequence.length = sequence.written = length


def emitted(row_N: Tensor, ratio: int, slot: int) -> Emit:
    """The emit plan of rows written outside any step: which row of which sequence, and nothing of its tokens."""
    nothing = torch.zeros_like(row_N)
    return Emit(nothing, row_N * ratio + ratio - 1, nothing, torch.full_like(row_N, slot))
