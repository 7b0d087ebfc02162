"""What tests of many folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pyrosome.testing.make_nano import make_nano

# Where there is no GPU, Triton's kernels run in its interpreter; it looks at this once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run, however long one takes: a run's result is of the code alone.  To look for new ones:
# pytest --hypothesis-profile=searching
settings.register_profile("searching", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory) -> Iterator[None]:
    """What whoever runs the tests has calibrated and predicted decides nothing here, and nothing is added to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def noise_checkpoint(tmp_path_factory) -> Path:
    """Weights of noise and a token for each byte: for what needs an answer that does not end by itself, or long texts.

    Everything else may ask the built-in model, as long as it would hold for any weights it could have.
    """
    path = tmp_path_factory.mktemp("noise")
    make_nano(path)
    return path
