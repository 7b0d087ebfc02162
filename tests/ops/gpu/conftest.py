"""Where kernels are interpreted, every launch of these tests is watched, but for those marked `unwatched`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.ops.gpu.held import DEVICE
from tests.ops.gpu.watched import launches_watched


@pytest.fixture(autouse=True)
def watched(request) -> Iterator[None]:
    is_watched = DEVICE.type == "cpu" and request.node.get_closest_marker("unwatched") is None
    with launches_watched() if is_watched else contextlib.nullcontext():
        yield
