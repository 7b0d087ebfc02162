"""Memory of large intermediate results, kept from one step to the next.

A step of many tokens makes tensors of many megabytes and drops them a moment later.  The C library maps memory for
each and unmaps it again, and the system clears every page anew: a twelfth of a prefill's time at V4-Flash's widths.
Here what a tensor leaves behind is lent to the next one of about its size.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops import native

LEAST_BYTES = 4 << 20  # of a tensor that memory is kept for
KEPT_S = 10.0  # how long, unused

_free: dict[int, list[tuple[float, Tensor]]] = {}  # (when it was given back, a block), by size; the latest last


def empty(*shape: int, like: Tensor) -> Tensor:
    """A tensor of `like`'s kind with anything in it; a large one on the CPU in memory that was used before."""
    size = math.prod(shape) * like.element_size()
    if size < LEAST_BYTES or like.device.type != "cpu":
        return like.new_empty(shape)
    block = _take(size)
    lease = _lease_of(block.nbytes).from_address(block.data_ptr())
    lease.block = block
    return torch.frombuffer(lease, dtype=like.dtype, count=math.prod(shape)).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """`empty` of a tensor's own shape."""
    return empty(*x.shape, like=x)


def give_back(unused_s: float = 0.0) -> None:
    """Return to the system what nobody has used for so many seconds."""
    if not _free:
        return
    before = time.monotonic() - unused_s
    for room in list(_free):
        kept = [entry for entry in _free[room] if entry[0] > before]
        if kept:
            _free[room] = kept
        else:
            del _free[room]


def kept_bytes() -> int:
    """What is held and not in use, in bytes."""
    return sum(room * len(blocks) for room, blocks in _free.items())


def _take(size: int) -> Tensor:
    for room in sorted(r for r, blocks in list(_free.items()) if blocks and size <= r <= size * 3 // 2):
        try:
            return _free[room].pop()[1]
        except (KeyError, IndexError):  # another thread was faster
            continue
    give_back(KEPT_S)
    step = 1 << (size.bit_length() - 4)  # an eighth to a sixteenth of it
    return native.empty_pages(-(-size // step) * step)


@functools.cache
def _lease_of(room: int) -> Any:
    """The kind of buffer that gives a block of so many bytes back when its last tensor is gone."""

    def give(self: Any, free: dict[int, list[tuple[float, Tensor]]] = _free) -> None:
        free.setdefault(room, []).append((time.monotonic(), self.block))

    return type("Lease", (ctypes.c_uint8 * room,), {"__del__": give})
