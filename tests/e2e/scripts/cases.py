"""A script's cases: each is run by itself, and what became of it is a line of JSON.

Scripts are given the URLs of three servers and two keys: of the built-in model, of one that plays a part, and of one
that needs a key, with a key and another that is for one request at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

Raised = TypeVar("Raised", bound=Exception)

URL, AGENT, LOCKED, KEY, NARROW_KEY = sys.argv[1:]
_CASES: list[Callable[[], object]] = []


def case(function: Callable[[], object]) -> Callable[[], object]:
    """Register a case; it fails where it raises."""
    _CASES.append(function)
    return function


def raised(kind: type[Raised], call: Callable[[], object]) -> Raised:
    """The error that a call is to raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def run() -> None:
    """Run all of them, in their order."""
    for function in _CASES:
        found = ""
        try:
            function()
        except Exception:
            found = traceback.format_exc()
        print(json.dumps([function.__name__, found]), flush=True)
