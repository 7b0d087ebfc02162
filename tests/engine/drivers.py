"""Drivers of the fake engine, and what is asked of any of them."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from pyrosome.engine.aio import EngineProcess
from pyrosome.engine.request import Ended, Request, TokenEvent
from tests.engine.fake_engine import expected

FAKE = "tests.engine.fake_engine:"
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def process(factory="make", max_restarts=3, window_s=60.0, **options):
    driver = EngineProcess(FAKE + factory, options, max_restarts=max_restarts, window_s=window_s)
    try:
        yield driver
    finally:
        driver.close()
        assert is_gone(driver.pid)


def is_gone(pid: int) -> bool:
    """Whether there is no such process, and no zombie of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.002)


def by_completion(events, n=1):
    """Tokens and ends of each completion, nothing after an end."""
    tokens, ends = [[] for _ in range(n)], [[] for _ in range(n)]
    for e in events:
        assert not ends[e.index]
        (ends if isinstance(e, Ended) else tokens)[e.index].append(e.token if isinstance(e, TokenEvent) else e)
    assert [len(each) for each in ends] == [1] * n
    return tokens, [each[0] for each in ends]


def is_answered(driver, request: Request) -> bool:
    tokens, ends = by_completion(driver.submit(request), request.params.n)
    return tokens == expected(request) and {e.reason for e in ends} == {"length"}
