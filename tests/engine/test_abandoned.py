"""Requests of the built-in model that nobody waits for any more: they stop, harm nobody, and leave what they did."""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import Future

import pytest

from pyrosome.engine.loaded import load_model
from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, SamplingParams

pytestmark = pytest.mark.usefixtures("bounded")

IDS = [random.Random(9).randrange(3, 250) for _ in range(3000)]
STEP_TOKENS = 128


@pytest.fixture(scope="module")
def model():
    return load_model("builtin:nano", numerics="exact")


class Held:
    """An engine in a thread whose forwards wait to be let through."""

    def __init__(self, model, **options) -> None:
        chosen = {"cache_bytes": 16 << 20, "max_sequences": 2, "step_tokens": STEP_TOKENS, "drafter": "off", **options}
        self.engine = model.engine(EngineOptions(**chosen))
        self.begun, self._let = threading.Semaphore(0), threading.Semaphore(0)
        forward = self.engine.runner.forward

        def held(*args, **kwargs):
            self.begun.release()
            self._let.acquire()
            return forward(*args, **kwargs)

        self.engine.runner.forward = held
        self.driver = EngineThread(self.engine)
        self.adding: dict[str, Future] = {}

    def ask(self, request: Request) -> list:
        """Hand a request over while a forward is held; what is said to it comes into the list."""
        heard: list = []
        self.adding[request.id] = self.driver.add(request, heard.extend)
        return heard

    def leave(self, name: str) -> None:
        """What a stream does that is closed."""
        self.driver.end_unwanted(name, self.adding[name])

    def come_to(self, number: int) -> None:
        """Let forwards through until so many more have begun; the last of them is held."""
        for at in range(number):
            self.begun.acquire()
            if at < number - 1:
                self._let.release()

    def go_on(self) -> None:
        """Hold nothing any more."""
        self._let.release(10**6)

    def idle(self) -> Stats:
        """What the engine says of itself once nothing is left to do."""
        while (stats := self.driver.call("stats")).running + stats.waiting:
            pass
        return stats


@pytest.fixture
def held(model):
    with contextlib.ExitStack() as stack:

        def make(**options) -> Held:
            made = Held(model, **options)
            stack.callback(made.driver.close)
            stack.callback(made.go_on)
            return made

        yield make


def asked(name: str, length: int, max_tokens: int = 6, start: int = 0, **params) -> Request:
    chosen = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **params}
    return Request(name, tuple(IDS[start : start + length]), SamplingParams(**chosen))


def tokens(events) -> list[int]:
    return [e.token for e in events if isinstance(e, TokenEvent)]


def alone(model, request: Request) -> list[int]:
    engine = model.engine(EngineOptions(cache_bytes=16 << 20, drafter="off"))
    engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
    return tokens(events)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_long_prompt_that_is_left_stops_within_a_step_and_who_comes_back_goes_on_from_there(model, held, steps):
    one, r = held(), asked("r", 2500)
    stream = one.driver.submit(r)
    one.come_to(steps)
    stream.close()
    one.go_on()
    stats = one.idle()
    assert stats.computed_tokens == steps * STEP_TOKENS, "the step that ran when it was left was the last"
    assert stats.ended_by_reason == {"abort": 1} and stats.free_slots == stats.num_slots

    *said, end = one.driver.submit(r)
    assert tokens(said) == alone(model, r) and isinstance(end, Ended)
    assert end.reuse.matched_tokens == steps * STEP_TOKENS == end.reuse.reused_tokens + end.reuse.replayed_tokens
    assert one.idle().computed_tokens == 2500 + 6 - 1, "nothing was computed twice"


def test_who_leaves_while_waiting_is_never_brought_in_and_who_runs_says_what_it_says_alone(model, held):
    one = held(max_sequences=1)
    a, b, c = asked("a", 300, 20), asked("b", 1500, 20, 300), asked("c", 50, 5, 2000)
    heard = [one.ask(r) for r in (a, b, c)]
    one.come_to(6)
    one.leave("b")
    one.go_on()
    stats = one.idle()
    assert [tokens(events) for events in heard] == [alone(model, a), [], alone(model, c)]
    assert stats.ended_by_reason == {"length": 2, "abort": 1}
    assert stats.prompt_tokens == 300 + 50 and stats.computed_tokens == 300 + 19 + 50 + 4
    assert sum(stats.lookups_by_limit.values()) == 2


@pytest.mark.parametrize("left_at", [1, 3, 6, 40])
def test_who_leaves_in_the_same_steps_changes_nothing_for_the_other(model, held, left_at):
    one = held(drafter="mtp")
    a, b = asked("a", 200, 30, temperature=1.0, seed=4), asked("b", 900, 200, 500, n=2)
    heard, left = one.ask(a), one.ask(b)
    one.come_to(left_at)
    one.leave("b")
    one.go_on()
    assert one.idle().ended_by_reason == {"length": 1, "abort": 2}
    assert tokens(heard) == alone(model, a) and bool(tokens(left)) == (left_at == 40)


def test_once_all_have_ended_all_that_is_in_use_is_the_prefix_tree_s(model):
    engine = model.engine(EngineOptions(cache_bytes=4 << 20, max_sequences=3, step_tokens=64, drafter="mtp"))
    choose = random.Random(3)
    for i in range(24):
        engine.add(
            asked(str(i), choose.randrange(1, 500), choose.randrange(1, 12), choose.randrange(2000), n=1 + i % 2)
        )
        for _ in range(choose.randrange(4)):
            engine.step()
        engine.abort(str(choose.randrange(i + 1)))
    while engine.has_work:
        engine.step()
    stats = engine.current_stats()
    assert stats.ended_by_reason["abort"] > 3 < stats.ended_by_reason["length"]
    assert stats.free_slots == stats.num_slots and (stats.running, stats.waiting) == (0, 0)
    assert {r: n - stats.free_pages[r] for r, n in stats.num_pages.items()} == stats.tree_pages
    assert stats.tree_blocks and all(stats.tree_pages.values())
    engine.tree.forget()
    assert all(used == 0 for used, _ in engine.current_stats().pool_bytes.values())
