"""torch.cuda as a benchmark uses it, on a machine without a GPU: every line runs, on the host, and is counted."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch


class Event:
    """Ten microseconds apart, by the order in which they are recorded."""

    count = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.count += 1
        self.at = Event.count

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 0.01


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waits.append(other)


class CUDAGraph:
    def replay(self) -> None:
        Event.count += 0


@pytest.fixture
def fake_cuda(monkeypatch):
    """The names of torch.cuda that are used; `no_graphs` has graphs refuse."""
    state = SimpleNamespace(captures=0, no_graphs=False)

    @contextlib.contextmanager
    def graph(_):
        state.captures += 1
        if state.no_graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    properties = SimpleNamespace(L2_cache_size=1 << 16)
    values = {
        "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph,
        "get_device_properties": lambda device: properties, "current_stream": lambda device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        "get_device_name": lambda device: "Some GPU", "empty_cache": lambda: None,
        "set_device": lambda device: None, "is_available": lambda: True,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state
