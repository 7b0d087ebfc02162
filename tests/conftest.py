"""What tests of many folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyrosome.testing.make_nano import make_nano


@pytest.fixture(scope="session")
def noise_checkpoint(tmp_path_factory) -> Path:
    """Weights of noise and a token for each byte: for what needs an answer that does not end by itself, or long texts.

    Everything else may ask the built-in model, as long as it would hold for any weights it could have.
    """
    path = tmp_path_factory.mktemp("noise")
    make_nano(path)
    return path
