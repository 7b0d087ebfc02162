"""The real engine in a process of its own: the tokens of a thread, through kills at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyrosome.engine.aio import AsyncEngine, EngineProcess
from pyrosome.engine.request import Ended, Progress, PromptLogprobs, Request, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import Driver
from pyrosome.errors import ContextTooLong, EngineError, RequestError
from pyrosome.llm import LLM
from pyrosome.options import Constraint, SamplingParams
from tests.engine.drivers import is_gone, until

pytestmark = pytest.mark.usefixtures("bounded")

OPEN = "tests.engine.engines:open_eagerly"
OPTIONS = {"cache_bytes": 8 << 20, "max_sequences": 4, "step_tokens": 256, "max_drafts": 2}
IDS = [random.Random(7).randrange(3, 259) for _ in range(600)]
WAIT_S = 100.0  # a process loads torch before it answers, on machines that do five things at once


def asked(name: str, length: int, max_tokens: int, start: int = 0, constraint=None, session="", **params) -> Request:
    chosen = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0, "ignore_eos": constraint is None, **params})
    return Request(name, tuple(IDS[start : start + length]), chosen, constraint=constraint, session=session)


REQUESTS = [
    asked("greedy", 40, 60),
    asked("again", 300, 30, logprobs=2),
    asked("same", 300, 40, logprobs=1),
    asked("twins", 20, 30, 9, n=2, temperature=1.0, seed=5),
    asked("shaped", 10, 40, 3, Constraint("regex", "[a-f]{20,30}"), temperature=1.0, seed=1),
    asked("short", 1, 1),
]


def said(events) -> dict[int, tuple[list[tuple], str]]:
    """By completion: tokens with their log-probabilities, and why it ended."""
    out: dict[int, tuple[list[tuple], list[str]]] = {}
    for e in events:
        tokens, ends = out.setdefault(e.index, ([], []))
        assert not ends, "nothing follows the end"
        if isinstance(e, Ended):
            ends.append(e.reason)
        else:
            tokens.append((e.token, e.logprobs, e.is_end_token))
    assert all(len(ends) == 1 for _, ends in out.values())
    return {index: (tokens, ends[0]) for index, (tokens, ends) in out.items()}


@pytest.fixture(scope="module")
def expected():
    """What an engine in a thread says to each."""
    with LLM("builtin:nano", numerics="exact", **OPTIONS) as llm:
        return {r.id: said(llm.submit(r)) for r in REQUESTS}


@contextlib.contextmanager
def process(**options):
    driver = EngineProcess(OPEN, {"path": "builtin:nano", "numerics": "exact", **OPTIONS, **options}, max_restarts=99)
    try:
        yield driver
    finally:
        driver.close()
        assert is_gone(driver.pid)


def test_a_process_says_what_a_thread_says_and_writes_its_trace_when_it_is_closed(expected, tmp_path):
    with process(trace_path=str(tmp_path / "trace.json")) as driver:
        for _ in range(2):  # the second time prompts are found computed
            streams = {r.id: driver.submit(r) for r in REQUESTS}
            for name, stream in streams.items():
                assert said(stream) == expected[name]
        stats = driver.call("stats")
        assert isinstance(stats, Stats) and stats.ended_by_reason["length"] + stats.ended_by_reason["stop"] == 14
        assert stats.reused_tokens > 0 and sum(stats.accepted) > 0 and stats.errors_by_type == {}

        with pytest.raises(ContextTooLong, match="give the engine a larger max_context"):
            driver.submit(Request("long", (5,) * 10**6))
        with pytest.raises(RequestError, match="vocabulary"):
            driver.submit(Request("outside", (10**6,)))

        session = driver.call("session_open")
        first = said(driver.submit(asked("one", 150, 10, session=session)))
        fork = driver.call("session_fork", session=session)
        path = str(tmp_path / "a.session")
        assert driver.call("session_save", session=session, path=path)
        others = [fork, driver.call("session_restore", path=path), session]
        turns = [said(driver.submit(asked(f"two {s}", 5, 10, 150, session=s))) for s in others]
        assert first and turns[0] == turns[1] == turns[2]
        assert len(driver.call("session_ids", session=fork)) == 150 + 10 + 5 + 10
    events = json.loads((tmp_path / "trace.json").read_text())
    assert {"request greedy.0", "request twins.1"} <= {e["args"]["name"] for e in events if e["name"] == "thread_name"}


def test_a_process_tells_of_prompts_what_a_thread_tells():
    r = dataclasses.replace(asked("a", 500, 3, prompt_logprobs=2, n=2), progress=True)
    others = [asked("b", 300, 9, 200, prompt_logprobs=0), asked("c", 70, 30)]

    async def heard(driver: Driver) -> dict[str, list]:
        """Log probabilities by request, without a gap; who else is in a step decides how they are cut."""
        engine, found = AsyncEngine(driver), {}
        streams = {each.id: engine.submit(each) for each in (r, *others)}
        for name, stream in streams.items():
            found[name], computed = [], 0
            while batch := await stream.batch(WAIT_S):
                for e in batch:
                    if isinstance(e, PromptLogprobs):
                        assert e.start == 1 + len(found[name])
                        found[name] += e.logprobs
                    elif isinstance(e, Progress):
                        assert computed < e.computed_tokens < e.prompt_tokens == 500
                        computed = e.computed_tokens
            assert (computed > 0) == (name == "a")
        return found

    with LLM("builtin:nano", numerics="exact", **OPTIONS) as llm:
        expected = asyncio.run(heard(llm.engine))
    assert {name: len(found) for name, found in expected.items()} == {"a": 499, "b": 299, "c": 0}
    with process() as driver:
        assert asyncio.run(heard(driver)) == expected


def ask(driver: EngineProcess, request: Request, seen: list[int]) -> tuple[dict[int, list[tuple]], list[Ended]]:
    """All it says to a request; one that it was not told to take has no tokens, and ends with what was raised."""
    tokens: dict[int, list[tuple]] = {i: [] for i in range(request.params.n)}
    ends: dict[int, Ended] = {}
    try:
        for e in driver.submit(request):
            assert e.request == request.id and e.index not in ends
            if isinstance(e, TokenEvent):
                tokens[e.index].append((e.token, e.logprobs, e.is_end_token))
                seen.append(1)
            else:
                ends[e.index] = e
    except EngineError as error:
        assert not any(tokens.values()) and not ends
        return tokens, [Ended(request.id, i, "error", error=str(error), error_type="EngineError") for i in tokens]
    assert set(ends) == set(tokens)
    return tokens, [ends[i] for i in tokens]


def test_killed_at_any_moment_it_is_started_again_and_says_the_same(expected):
    pick = random.Random(2)
    with ThreadPoolExecutor(len(REQUESTS)) as pool, process() as driver:
        total = sum(len(tokens) for answer in expected.values() for tokens, _ in answer.values())
        for goal in (0, pick.randrange(1, total // 3), pick.randrange(total // 3, total - 20)):
            pid, seen = driver.pid, []
            endless = driver.submit(asked("endless", 3, 10**5))
            answers = {r.id: pool.submit(ask, driver, r, seen) for r in REQUESTS}
            until(lambda goal=goal, seen=seen: len(seen) >= goal, WAIT_S)
            os.kill(pid, signal.SIGKILL)
            *_, end = endless
            assert end.reason == "error" and end.error.startswith("request endless: ") and "signal 9" in end.error
            for name, answer in answers.items():
                tokens, ends = answer.result()
                for (index, said_so_far), end in zip(tokens.items(), ends, strict=True):
                    whole, reason = expected[name][index]
                    if end.reason == "error":
                        assert end.error_type == "EngineError" and end.error.startswith(f"request {name}: ")
                        assert "signal 9" in end.error and whole[: len(said_so_far)] == said_so_far
                    else:
                        assert (said_so_far, end.reason) == (whole, reason)
            until(lambda pid=pid: driver.pid != pid and is_gone(pid), WAIT_S)
            again = [pool.submit(lambda r: said(driver.submit(r)), r) for r in REQUESTS]
            assert {r.id: a.result() for r, a in zip(REQUESTS, again, strict=True)} == expected
        assert driver.num_restarts == 3
