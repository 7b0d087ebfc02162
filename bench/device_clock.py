"""Times of calls on a device, from memory and not from its caches, and what the device can do at most."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrosome.cli import accelerators

Run = Callable[[], Any]
WARM = 3
FP8_CAPABILITY = 89


class Clock(Protocol):
    """How long calls take on one device."""

    exact: bool  # whether the device's own bits are seen

    def captured(self, run: Run) -> Run:
        """The call, as it is repeated without the host's part where the device can do so."""

    def seconds(self, run: Run, count: int) -> list[float]:
        """Of each of so many calls, which find nothing in a cache."""


class CudaClock:
    """By events on the device; calls are replayed as graphs, as an engine's steps are."""

    exact = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)  # graphs are captured on the current one
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written, between calls: lines that were written would have to be stored while the call is timed.
        self._flush = torch.zeros(2 * cache // 4, dtype=torch.int32, device=device)

    def captured(self, run: Run) -> Run:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # first calls compile, and allocate what must not be within a graph
            for _ in range(WARM):
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay(_alive: Run = run) -> None:  # what it reads is known to the graph by address alone
            graph.replay()

        return replay

    def seconds(self, run: Run, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            self._flush.sum()  # also gives the host the time to queue what follows
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1000 for begin, end in events]


class CpuClock:
    """By the host's clock: for the interpreter, whose times mean nothing."""

    exact = False

    def captured(self, run: Run) -> Run:
        run()
        return run

    def seconds(self, run: Run, count: int) -> list[float]:
        spent = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            spent.append(time.perf_counter() - began)
        return spent


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def median(clock: Clock, run: Run, least: int, seconds: float) -> tuple[float, list[float]]:
    """The median time of a call and the range, over `least` calls or as many as take `seconds` (ten times as many)."""
    for _ in range(WARM):
        run()
    (once,) = clock.seconds(run, 1)
    count = min(max(least, int(seconds / max(once, 1e-7))), 10 * least)
    spent = clock.seconds(run, count)
    return statistics.median(spent), [min(spent), max(spent)]


def ceilings(device: torch.device, clock: Clock, num_bytes: int, side: int, capability: int) -> dict[str, float]:
    """What torch itself reaches on the device: bytes per second of memory, FLOPs per second of square products.

    Args:
        num_bytes: of the buffer that is read and copied.
        side: rows, columns and inputs of the products.
    """
    found = {}
    values, room = (torch.ones(num_bytes // 4, device=device) for _ in range(2))
    found["read"] = num_bytes / median(clock, values.sum, 10, 0.1)[0]
    found["copy"] = 2 * num_bytes / median(clock, functools.partial(room.copy_, values), 10, 0.1)[0]
    found["memory"] = max(found["read"], found["copy"])
    del values, room
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    products: dict[str, Run] = {"f32": lambda: a @ b}
    a16, b16 = a.bfloat16(), b.bfloat16()
    products["bf16"] = lambda: a16 @ b16
    if capability >= FP8_CAPABILITY:
        products["fp8"] = _fp8_product(a, b)
    for kind, run in products.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):  # one that torch has not got there
            found[kind] = 2 * side**3 / median(clock, run, 10, 0.1)[0]
    # Without a unit for them, codes are multiplied as bfloat16.
    found.setdefault("fp8", found["bf16"])
    return found


def _fp8_product(a: Tensor, b: Tensor) -> Run:
    left, right = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def about(device: torch.device) -> dict[str, Any]:
    """The device and the versions that figures taken on it depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    driver = accelerators.driver()["version"]
    return {
        "device": device_name(device),
        "versions": {**versions, "cuda": torch.version.cuda or "", "driver": driver},
    }
