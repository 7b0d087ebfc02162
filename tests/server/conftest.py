"""One real server on the built-in model for all tests that need the model and not a script."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from pyrosome.engine.loaded import open_engine
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, running


@pytest.fixture(scope="session")
def nano():
    """A client of a server on the built-in model, whose engine runs in a thread here."""
    engine = EngineOptions(cache_bytes=64 << 20)
    service = Service(
        MODEL, None, engine, make_driver=lambda: EngineThread(lambda: open_engine(MODEL, cache_bytes=64 << 20))
    )
    with running(service) as url, httpx.Client(base_url=url, timeout=120) as client:
        client.service = service
        yield client
