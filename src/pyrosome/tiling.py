"""How large a matrix is once it is held: quantised in tiles, as the CPU's kernels read it.

A tile is 64 outputs (the last of a matrix may have 32) by all inputs, in groups of inputs that share a scale: 32 in
FP4, 128 in FP8.  A group of a strip of 16 outputs is its codes, then a scale byte for each output.  What is laid in
tiles is said in `quant.tiles`; here are the sizes alone, for the loader and the planner.  Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator

TILE, STRIP = 64, 16  # outputs
GROUP = {"fp4": 32, "fp8": 128}  # inputs that share a scale
CODE_BYTES = {"fp4": 16, "fp8": 128}  # of one output's codes in a group


def tiles(num_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, strips of 16) of every tile."""
    for first in range(0, num_rows, TILE):
        count = min(TILE, num_rows - first)
        yield first, count, 4 if count > 32 else 2


def group_bytes(kind: str) -> int:
    """Of one strip's codes and scales."""
    return STRIP * (CODE_BYTES[kind] + 1)


def tiled_bytes(kind: str, num_rows: int, num_inputs: int) -> int:
    """Bytes of a matrix in tiles."""
    return sum(strips * group_bytes(kind) for _, _, strips in tiles(num_rows)) * -(-num_inputs // GROUP[kind])
