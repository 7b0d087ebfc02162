"""Places for drivers to run in, and bounds on how long and with what traces."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from pathlib import Path

import pytest

from pyrosome.engine.worker import EngineThread
from tests.engine.drivers import process
from tests.engine.fake_engine import FakeEngine


@pytest.fixture
def bounded():
    """No test waits for ever."""

    def late(*_):
        raise TimeoutError("the test did not come to its end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(monkeypatch, tmp_path_factory):
    """Where temporary files go, and nothing else does; empty at the end."""
    tmp_path_factory.getbasetemp()  # made before temporary files go elsewhere: other tests have theirs in it
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


@pytest.fixture(params=["thread", "process"])
def place(request, folder):
    """Makes drivers; closes them."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            if request.param == "process":
                return stack.enter_context(process(**options))
            return stack.enter_context(contextlib.closing(EngineThread(lambda: FakeEngine(**options))))

        make.kind = request.param
        yield make
