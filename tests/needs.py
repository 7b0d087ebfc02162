"""Programs that some tests need and a machine may lack."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

ALL = "PYROSOME_CLIENTS"


def lacking(what: str, how: str) -> NoReturn:
    """Leave a test out for want of a program, and say so; where everything is to be tested, fail.

    `.ci/run` sets the variable, so that nothing is left out there.
    """
    text = f"{what} is not on this machine; {how}"
    if os.environ.get(ALL) == "1":
        pytest.fail(f"{text} ({ALL}=1: nothing may be left out)", pytrace=False)
    pytest.skip(text)
