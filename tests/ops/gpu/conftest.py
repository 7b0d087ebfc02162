"""Where kernels are interpreted, every launch of these tests is watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.ops.gpu.held import DEVICE
from tests.ops.gpu.watched import launches_watched


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with launches_watched() if DEVICE.type == "cpu" else contextlib.nullcontext():
        yield
