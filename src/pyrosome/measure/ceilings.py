"""What this machine can do at most: bytes read of memory, of a drive, over the link to a GPU; FLOPs of a product."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyrosome.errors import RequestError
from pyrosome.measure.steps import clock
from pyrosome.ops import native

READ_BYTES, GEMM = 512 << 20, 2048
REPEATS = 5
DISK_BYTES, DISK_PART = 256 << 20, 8 << 20
LINK_BYTES = 256 << 20


def read_rate(threads: int, num_bytes: int = READ_BYTES) -> float:
    """Bytes per second of summing a buffer that no cache holds: the median of several times."""
    # On huge pages, as weights are: else the misses of address translation would lower it.
    values = native.empty_pages(num_bytes).view(torch.int64).fill_(1)
    return values.nbytes / _median(lambda: values.sum(), threads)


def product_rate(threads: int, size: int = GEMM) -> float:
    """FLOPs per second of a square bfloat16 product: the median of several times."""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, size, generator=g).bfloat16() for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, threads)


def _median(run: Callable[[], Any], threads: int) -> float:
    now, before, spent = clock(threads), torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(REPEATS + 1):
            began = now()
            run()
            spent.append(now() - began)
    finally:
        torch.set_num_threads(before)
    return statistics.median(spent[1:])  # the first chooses how


def disk_rate(place: Path, num_bytes: int = DISK_BYTES) -> float:
    """Bytes per second that a file is read at, from a drive and not from memory that remembers it; 0: cannot be told.

    Args:
        place: a file, of which the beginning is read, or a folder, in which one is written first.

    Raises:
        RequestError: it cannot be read, or nothing can be written there.
    """
    if not hasattr(os, "posix_fadvise"):  # what was read or written lately would come from memory
        return 0.0
    try:
        if place.is_file():
            return _read(place, num_bytes)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".pyrosome-read-") as file:
            part = os.urandom(DISK_PART)  # nothing that could be compressed
            for _ in range(max(1, num_bytes // DISK_PART)):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            return _read(Path(file.name), num_bytes)
    except OSError as error:
        raise RequestError(f"{place}: its drive cannot be measured: {error.strerror or error}") from None


def _read(path: Path, num_bytes: int) -> float:
    buffer, found = memoryview(bytearray(DISK_PART)), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while found < num_bytes and (count := file.readinto(buffer)):
            found += count
        return found / (time.perf_counter() - began) if found else 0.0


def link_rate(num_bytes: int = LINK_BYTES) -> float:
    """Bytes per second from pinned host memory to the first GPU; 0: there is none that torch can use."""
    if not torch.cuda.is_available():
        return 0.0
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    spent = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return num_bytes / statistics.median(spent[1:])
