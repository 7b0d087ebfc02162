"""How many bytes of tensors are alive while something runs, and at most: what a planned workspace is held to.

Storages are counted from the operation that makes them until the last tensor that views them is gone.  Memory that the
native library takes for itself is the C library's, and is told by `heap_bytes`.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts, inside a `with` block, the storages that operations of torch make.

    Attributes:
        now: bytes alive that were made in the block.
        peak: the most there were at once.
        made: bytes made in all, one after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._ends: dict[int, int] = {}  # where each live storage begins, and ends

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = func is torch.ops.aten.lift_fresh.default  # made of numbers of Python, by no operation before this one
        given = set() if fresh else {_place(t.untyped_storage()) for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.nbytes() and _place(storage) not in given and not self._is_known(_place(storage)):
                self._count(storage)
        return out

    def _is_known(self, address: int) -> bool:
        """A tensor over memory that another one owns (`ops.workspace`) makes no memory."""
        return any(begin <= address < end for begin, end in self._ends.items())

    def _count(self, storage: torch.UntypedStorage) -> None:
        begin, size = _place(storage), storage.nbytes()
        self._ends[begin] = begin + (size if storage.device.type != "meta" else 1)
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, begin, size).atexit = False

    def _forget(self, begin: int, size: int) -> None:
        del self._ends[begin]
        self.now -= size


def _place(storage: torch.UntypedStorage) -> int:
    """Where a storage begins; one without bytes (on the meta device) has the number of its own that torch gives it."""
    return storage.data_ptr() if storage.device.type != "meta" else storage._cdata


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for x in value for t in _tensors(x)] if isinstance(value, list | tuple) else []


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each counted once; on the meta device those they would take."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def heap_bytes() -> int | None:
    """Bytes that the C library has given out and not got back; None where it does not tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.hblkhd + found.uordblks)
