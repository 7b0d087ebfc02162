"""Giving memory back: a large request must not leave the process as large as it once was."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

GROWN_BYTES = 32 << 20  # what is not worth the time
REST_S = 5.0  # between two times


def resident_bytes() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


class Tidy:
    """Has the allocator give back what was freed, while the process is larger than it was.

    glibc keeps freed memory in the arena of each thread that took it, for as long as the process lives.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, resident: Callable[[], int] = resident_bytes
    ) -> None:
        self._clock, self._resident = clock, resident
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        self._least, self._next = resident(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is worth while."""
        now = self._clock()
        if self._trim is None or now < self._next:
            return False
        self._next = now + REST_S
        return self._resident() > self._least + GROWN_BYTES

    def __call__(self) -> None:
        """Do it; takes milliseconds, in whatever thread."""
        if self._trim is not None:
            self._trim(0)
            self._least = min(self._least, self._resident())
