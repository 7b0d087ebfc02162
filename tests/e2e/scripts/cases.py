"""A script's cases: each is run by itself, and what became of it is a line of JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

_CASES: list[Callable[[], object]] = []


def case(function: Callable[[], object]) -> Callable[[], object]:
    """Register a case; it fails where it raises."""
    _CASES.append(function)
    return function


def run() -> None:
    """Run all of them, in their order."""
    for function in _CASES:
        found = ""
        try:
            function()
        except Exception:
            found = traceback.format_exc()
        print(json.dumps([function.__name__, found]), flush=True)


URL, *REST = sys.argv[1:]
