"""How many threads train fastest here: measured, never "all cores"."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

_ROUNDS = 3


def probe(run: Callable[[], None]) -> int:
    """The number of threads with which `run` takes least time: 1, 2, 4, .. up to the cores this process may use.

    Beside other work a second thread that spins can make a step many times slower; so a larger number is taken only if
    its best time is better by a tenth, and none that is larger still is tried after one that was not.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    before, best, least = torch.get_num_threads(), 1, float("inf")
    count = 1
    try:
        while count <= cores:
            torch.set_num_threads(count)
            run()  # the first call builds and warms what it needs
            took = min(_timed(run) for _ in range(_ROUNDS))
            if took > 0.9 * least:
                break
            best, least, count = count, took, 2 * count
    finally:
        torch.set_num_threads(before)
    return best


def _timed(run: Callable[[], None]) -> float:
    at = time.perf_counter()
    run()
    return time.perf_counter() - at
