"""Questions of which none is asked twice: greedy answers to the same question would count as evidence twice."""

from __future__ import annotations

from collections.abc import Callable

from pyrosome.errors import RequestError
from pyrosome.tasks.sample import Sample

_MISSES = 10_000  # draws in a row that bring nothing new: then there is no more


def distinct(n: int, draw: Callable[[], Sample], what: str) -> list[Sample]:
    """The first `n` samples drawn whose questions differ.

    Raises:
        RequestError: there are not so many; `what` says of what.
    """
    found: dict[str, Sample] = {}
    misses = 0
    while len(found) < n and misses < _MISSES:
        sample = draw()
        misses += 1
        if found.setdefault(sample.messages[0]["content"], sample) is sample:
            misses = 0
    if len(found) < n:
        raise RequestError(f"{n} {what} were asked for and there are {len(found)} held out; ask for fewer")
    return list(found.values())
