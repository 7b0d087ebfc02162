"""A small checkpoint on a hub of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.files import make_source
from tests.hub.server import loop_hub


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def hub(source: Path):
    with loop_hub(source) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_of_the_user(monkeypatch) -> None:
    """No token or address of whoever runs the tests has a say."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "PYROSOME_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
