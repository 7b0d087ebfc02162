"""How far an evaluation is, and whether it should go on."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


class Watch:
    """Told of each answer; once `stopped`, an evaluation ends with what it has.  This one shows nothing."""

    def __init__(self) -> None:
        self.stopped = False

    def begin(self, what: str, total: int) -> None:
        """So many answers are to come."""

    def advance(self) -> None:
        """One of them is there."""


def gathered(watch: Watch, what: str, total: int, items: Generator[T, None, None]) -> list[T]:
    """What comes until the end, until the watch is stopped, or until Ctrl-C, which stops the watch."""
    found: list[T] = []
    if watch.stopped:
        return found
    watch.begin(what, total)
    with contextlib.closing(items):
        try:
            for item in items:
                found.append(item)
                watch.advance()
                if watch.stopped:
                    break
        except KeyboardInterrupt:
            watch.stopped = True
    return found
