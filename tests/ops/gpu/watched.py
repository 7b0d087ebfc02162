"""What the interpreter would not notice, and a device would not forgive.

It runs programs one after the other, on memory that mostly is zero and mostly goes on past a tensor's end.  While
launches are watched, programs run in the opposite order, new tensors hold NaN, and a launch fails that reads or writes
outside its tensors, or in which two programs meet at an address that one of them writes without an atomic operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrosome.ops import gpu

POISONED_BYTES = 64 << 20  # larger tensors are there for their size, and are left as the system gives them
LEAST_ADDRESS = 1 << 32  # numbers from here on, in a tensor of int64, are addresses of other tensors
TABLE_BYTES = 1 << 26  # what may lie behind such an address
_allowed: list[str] = []  # kernels whose programs may write to one place


class Poison(TorchFunctionMode):
    """Tensors that are made without values hold NaN, or the greatest number of their kind."""

    makers = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.makers and result.device.type != "meta" and 0 < result.nbytes <= POISONED_BYTES:
            if result.dtype.is_floating_point and result.dtype.itemsize > 1:
                result.fill_(float("nan"))
            elif result.dtype.itemsize == 1:
                result.view(torch.uint8).fill_(0x7F)
            elif not result.dtype.is_complex:
                result.fill_(torch.iinfo(result.dtype).max // 3)
        return result


@dataclasses.dataclass
class Watch:
    """One launch: where it may go, and who has been where."""

    name: str
    low: np.ndarray  # of each region, ascending
    high: np.ndarray
    program: int = -1
    reads: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    writes: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    met: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)  # by atomic operations

    def seen(self, where: list[tuple[int, np.ndarray]], pointers: Any, mask: Any, verb: str) -> None:
        """Note an access, and refuse one outside."""
        size = np.dtype(np.int8).itemsize * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        address = address[np.broadcast_to(mask, address.shape).astype(bool)].astype(np.int64)
        if not address.size:
            return
        address = np.unique(address)
        at = np.searchsorted(self.low, address, side="right") - 1
        outside = (at < 0) | (address + size > self.high[at])
        if outside.any():
            first = int(address[outside][0])
            behind = first - int(self.high[max(0, int(at[outside][0]))])
            raise IndexError(
                f"{self.name} {verb} {int(outside.sum())} elements outside its tensors, the first {behind} bytes "
                f"behind the end of one, in program {self.program}"
            )
        where.append((self.program, address))

    def check(self) -> None:
        """Refuse programs that met."""
        if self.name in _allowed or not self.writes:
            return
        program, address = _flat(self.writes)
        order = np.argsort(address, kind="stable")
        program, address = program[order], address[order]
        same = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        if same.any():
            pair = int(np.flatnonzero(same)[0])
            raise RuntimeError(
                f"programs {program[pair]} and {program[pair + 1]} of {self.name} write to one place, "
                f"{int(same.sum())} such places in all"
            )
        for others, verb in ((self.reads, "reads"), (self.met, "meets")):
            if others:
                reader, where = _flat(others)
                at = np.minimum(np.searchsorted(address, where), len(address) - 1)
                race = (address[at] == where) & (program[at] != reader)
                if race.any():
                    i = int(np.flatnonzero(race)[0])
                    raise RuntimeError(
                        f"program {reader[i]} of {self.name} {verb} what program {program[at[i]]} writes in the same "
                        f"launch, {int(race.sum())} such places in all"
                    )


def _flat(visits: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.full(a.size, p) for p, a in visits]), np.concatenate([a for _, a in visits])


def _regions(arguments: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    regions = set()
    for tensor in (a for a in arguments if isinstance(a, Tensor)):
        storage = tensor.untyped_storage()
        regions.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        if tensor.dtype == torch.int64 and tensor.numel() <= 1 << 20:
            regions |= {(a, a + TABLE_BYTES) for a in tensor.flatten().tolist() if a >= LEAST_ADDRESS}
    low, high = (np.array(side, dtype=np.int64) for side in zip(*sorted(regions), strict=True))
    return low, np.maximum.accumulate(high)


@contextlib.contextmanager
def meeting(*kernels: str) -> Iterator[None]:
    """Programs of these kernels may write to one place in the block: nobody reads it."""
    _allowed.extend(kernels)
    try:
        yield
    finally:
        del _allowed[-len(kernels) :]


@contextlib.contextmanager
def launches_watched() -> Iterator[None]:
    """Watch what is launched in the block."""
    from triton.runtime import interpreter

    builder, current = interpreter.interpreter_builder, []
    kinds = type(builder)
    originals = {
        name: getattr(kinds, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx")
    }

    def load(self, pointers, mask, *rest):
        if current:
            current[-1].seen(current[-1].reads, pointers, mask.data, "reads")
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        if current:
            current[-1].seen(current[-1].writes, pointers, mask.data, "writes")
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        if current:
            current[-1].seen(current[-1].met, pointers, mask.data, "changes")
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def placed(self, x, y, z):
        gx, gy, gz = self.grid_dim
        if current:
            current[-1].program = ((gx - 1 - x) * gy + gy - 1 - y) * gz + gz - 1 - z
        return originals["set_grid_idx"](self, gx - 1 - x, gy - 1 - y, gz - 1 - z)

    start = gpu.launch

    def launch(kernel, grid, *arguments, **options):
        if gpu._traced.get() or 0 in grid:
            return start(kernel, grid, *arguments, **options)
        watch = Watch(kernel.fn.__name__, *_regions(arguments))
        current.append(watch)
        try:
            start(kernel, grid, *arguments, **options)
            watch.check()
        finally:
            current.pop()
        return None

    with pytest.MonkeyPatch.context() as patch, Poison():
        for name, made in zip(originals, (load, store, atomic, placed), strict=True):
            patch.setattr(kinds, name, made)
        patch.setattr(gpu, "launch", launch)
        yield
