"""Where the engine runs: in either place, from any thread, through faults and cancellations; and in a thread."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import signal
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from pyrosome import errors
from pyrosome.engine.request import Ended, News, Reuse, Timeline, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread, Waiting
from pyrosome.errors import CheckpointError, ContextTooLong, DoesNotFit, EngineError, PyrosomeError, RequestError
from pyrosome.options import SamplingParams
from tests.engine.drivers import by_completion, is_answered, until
from tests.engine.fake_engine import FakeEngine, asked, expected, news

pytestmark = pytest.mark.usefixtures("bounded")

# Either driver


@pytest.mark.parametrize(("max_tokens", "n"), [(1, 1), (7, 1), (1, 4), (5, 3)])
def test_a_stream_gives_every_completion_and_ends(place, max_tokens, n):
    driver, r = place(), asked("a", max_tokens, n)
    stream = driver.submit(r)
    tokens, ends = by_completion(stream, n)
    assert tokens == expected(r)
    assert ends[-1] == Ended(
        "a",
        n - 1,
        "length",
        max_tokens,
        Reuse(3, limit="no common prefix"),
        Timeline(1.5, drafted=(3, 2), accepted=(1, 0)),
    )
    assert list(stream) == []


def test_a_stream_of_who_wants_to_know_of_its_prompt_gives_the_same_and_keeps_its_log_probabilities(place):
    driver = place()
    r = dataclasses.replace(asked("a", 4, 2, ids=(5, 6, 7)), progress=True)
    with driver.submit(r) as stream:
        assert by_completion(stream, 2)[0] == expected(r) and stream.prompt_logprobs == []
    r = dataclasses.replace(r, params=dataclasses.replace(r.params, prompt_logprobs=0))
    stream = driver.submit(r)
    assert isinstance(next(stream), TokenEvent) and stream.prompt_logprobs == [{6: -0.25}, {7: -0.25}]
    stream.close()
    heard, again = [], dataclasses.replace(r, id="b")
    driver.add(again, heard.extend).result()
    until(lambda: sum(isinstance(e, Ended) for e in heard) == 2)
    assert heard[:3] == news(again) and not any(isinstance(e, News) for e in heard[3:])


def test_streams_read_one_after_the_other_lose_nothing(place):
    driver = place()
    requests = [asked(str(i), 1 + i % 9, 1 + i % 3, ids=(i + 1, 5)) for i in range(64)]
    streams = [driver.submit(r) for r in requests]
    for r, stream in reversed(list(zip(requests, streams, strict=True))):
        assert by_completion(stream, r.params.n)[0] == expected(r)


def test_requests_come_from_many_threads(place):
    driver = place()

    def ask(thread: int) -> bool:
        return all(is_answered(driver, asked(f"{thread}.{i}", 1 + i % 5, ids=(thread + 1, i))) for i in range(15))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))


@pytest.mark.parametrize(
    ("ids", "kind", "text"), [((), RequestError, "no ids"), ((1,) * 1001, ContextTooLong, "1001 tokens were asked for")]
)
def test_a_refused_request_raises_where_it_was_submitted(place, ids, kind, text):
    driver = place()
    with pytest.raises(RequestError, match=text) as caught:
        driver.submit(asked("a", ids=ids))
    assert type(caught.value) is kind
    assert is_answered(driver, asked("a"))


@pytest.mark.parametrize(
    "kind", ["RequestError", "DoesNotFit", "ContextTooLong", "EngineError", "CacheInvariantBroken"]
)
def test_what_an_operation_raises_keeps_its_class_and_its_numbers(place, kind):
    with pytest.raises(PyrosomeError) as caught:
        place().call("raise", kind=kind)
    error = caught.value
    assert type(error) is getattr(errors, kind)
    if isinstance(error, DoesNotFit):
        assert (error.part, error.needed_bytes, error.free_bytes) == ("a cache", 3 << 30, 1 << 30)
    elif isinstance(error, ContextTooLong):
        assert (error.asked_tokens, error.max_tokens, error.hint) == (12, 10, "shorten it")
    else:
        assert str(error) == "as asked"


def test_an_operation_returns_plain_data(place):
    driver = place()
    data = {"text": "é\n", "numbers": [1, -2, 2.5, 2**63], "nothing": None, "bytes": b"\0\xff", "yes": True}
    assert driver.call("echo", **data, name=3) == {**data, "name": 3}
    stats = driver.call("stats")
    assert isinstance(stats, Stats) and stats.num_pages == {1: 10, 128: 3}
    assert (stats.drafted, stats.accepted, sum(stats.steps_by_seconds)) == ((1, 1), (1, 0), 1)


def test_a_second_request_of_one_id_is_refused_and_the_first_goes_on(place):
    driver, r = place(step_s=0.002), asked("a", 50)
    first = driver.submit(r)
    with pytest.raises(RequestError, match="in use"):
        driver.submit(asked("a"))
    gc.collect()
    assert by_completion(first)[0] == expected(r)
    assert driver.call("state")["aborted"] == []


def close(stream):
    stream.close()


def leave_a_block(stream):
    with stream:
        next(stream)


def leave_a_generator(stream):
    def generate(held):
        with held:
            yield from held

    for _ in generate(stream):
        break


def drop(stream):
    del stream


@pytest.mark.parametrize("leave", [close, leave_a_block, leave_a_generator, drop])
def test_a_stream_that_is_left_ends_its_request_alone(place, leave):
    driver, kept = place(step_s=0.001), asked("kept", 40, 2)
    stays = driver.submit(kept)
    streams = [driver.submit(asked("left", 10**6, 2))]
    next(streams[0])
    leave(streams.pop())
    gc.collect()
    until(lambda: "left" not in driver.call("state")["open"])
    assert by_completion(stays, 2)[0] == expected(kept)


def test_an_abort_ends_the_stream_with_what_was_said(place):
    driver, r = place(step_s=0.001), asked("a", 10**6, 2)
    stream = driver.submit(r)
    first = [next(stream) for _ in range(6)]
    driver.abort("a")
    tokens, ends = by_completion([*first, *stream], 2)
    assert {e.reason for e in ends} == {"abort"}
    assert [e.output_tokens for e in ends] == [len(t) for t in tokens]
    short = dataclasses.replace(r, params=SamplingParams(max_tokens=len(tokens[0]), n=2))
    assert tokens == expected(short)


def test_an_abort_of_what_has_ended_does_not_hit_the_next_of_that_name(place):
    driver = place()
    for _ in range(3):
        driver.abort("a")
        stream = driver.submit(asked("a"))
        until(lambda: not driver.call("state")["open"])
        driver.abort("a")
        stream.close()
        assert is_answered(driver, asked("a"))
    assert driver.call("state")["aborted"] == []


def test_a_storm_of_aborts_leaves_the_others_alone(place):
    driver = place()
    choose = random.Random(3)
    requests = [asked(str(i), 300 if i % 3 else 20, 1 + i % 2, ids=(i + 1,)) for i in range(150)]
    streams = {r.id: driver.submit(r) for r in requests}

    def storm(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(100):
            driver.abort(str(3 * pick.randrange(50) + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(storm, range(4)))
    for r in choose.sample(requests, len(requests)):
        if int(r.id) % 3 == 2:
            streams[r.id].close()
            continue
        tokens, ends = by_completion(streams[r.id], r.params.n)
        if int(r.id) % 3 == 0:
            assert tokens == expected(r)
        else:
            assert {e.reason for e in ends} <= {"abort", "length"}
            assert all(whole[: len(part)] == part for whole, part in zip(expected(r), tokens, strict=True))
    until(lambda: not driver.call("state")["open"])
    assert is_answered(driver, asked("after"))


def test_closing_tells_whoever_waits(place, tmp_path):
    driver = place(step_s=0.01, closed_path=str(tmp_path / "closed"))
    streams = [driver.submit(asked(str(i), 10**6, 2)) for i in range(8)]
    with ThreadPoolExecutor(10) as pool:  # a thread for each stream and each closer
        answers = [pool.submit(lambda s: by_completion(s, 2), s) for s in streams]
        until(lambda: driver.call("state")["steps"] > 2)
        closers = [pool.submit(driver.close) for _ in range(2)]
        for name, answer in enumerate(answers):
            for end in answer.result()[1]:
                assert (end.reason, end.error_type) == ("error", "EngineError")
                assert end.error.startswith(f"request {name}: ") and "closed" in end.error
        for closer in closers:
            closer.result()
    driver.close()
    assert (tmp_path / "closed").read_text() == "closed\n"
    for ask in (lambda: driver.submit(asked("late")), lambda: driver.call("state")):
        with pytest.raises(EngineError, match="closed; make another"):
            ask()
    driver.abort("late")
    streams[0].close()


def test_whose_events_cannot_be_delivered_is_ended_alone(place):
    driver = place(step_s=0.001)
    calls = []

    def refuse(events):
        calls.append(events)
        raise RuntimeError("the loop is closed")

    stays = driver.submit(asked("stays", 30))
    driver.add(asked("lost", 10**6), refuse).result()
    until(lambda: "lost" not in driver.call("state")["open"])
    assert calls and driver.call("state")["aborted"] == ["lost"]
    assert by_completion(stays)[0] == expected(asked("stays", 30))


def test_closing_amid_requests_of_many_threads_ends_each_of_them_once(place):
    driver, begun = place(), []

    def ask(thread: int) -> int:
        pick, number = random.Random(thread), 0
        while True:
            r = asked(f"{thread}.{number}", pick.choice([1, 5, 400]), 1 + number % 3, ids=(thread + 1, number))
            try:
                stream = driver.submit(r)
            except EngineError as error:
                assert "closed; make another" in str(error)  # noqa: PT017
                return number
            number += 1
            begun.append(1)
            leave = pick.choice([None, None, close, drop, "abort"])
            if leave == "abort":
                driver.abort(r.id)
            elif leave:
                next(stream)
                leave(stream)
                continue
            tokens, ends = by_completion(stream, r.params.n)
            assert all(whole[: len(part)] == part for whole, part in zip(expected(r), tokens, strict=True))
            assert {e.reason for e in ends} <= {"length", "error"} | ({"abort"} if leave else set())

    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(ask, i) for i in range(8)]
        until(lambda: len(begun) > 100)
        driver.close()
        assert sum(t.result() for t in threads) == len(begun)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_is_told_that_the_engine_is_its_parent_s(place):
    driver = place(step_s=0.001)
    stays = driver.submit(asked("stays", 100))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), os.fdopen(writer, "w") as told:
            for ask in (lambda: driver.submit(asked("fork")), lambda: driver.call("state")):
                with contextlib.suppress(EngineError):
                    ask()
                    told.write("answered\n")
                told.write("told\n")
            driver.abort("stays")
            stays.close()
            driver.close()
            told.write("closed\n")
        os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader) as told:
            assert told.read().split() == ["told", "told", "closed"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert by_completion(stays)[0] == expected(asked("stays", 100))
    assert is_answered(driver, asked("a"))


# The thread


def test_one_thread_makes_and_steps_the_engine():
    made = []

    def make():
        made.append(threading.get_ident())
        return FakeEngine()

    driver = EngineThread(make)
    assert is_answered(driver, asked("a"))
    driver.close()
    engine = FakeEngine()
    driver = EngineThread(engine)
    assert is_answered(driver, asked("a"))
    driver.close()
    assert engine.is_closed and len(engine.threads) == 1 and threading.get_ident() not in {*made, *engine.threads}


def test_a_thread_whose_engine_cannot_be_made_says_why():
    def make():
        raise CheckpointError("no weights")

    with pytest.raises(CheckpointError, match="no weights"):
        EngineThread(make)


def test_a_step_is_handed_over_at_once():
    gate, batches = threading.Semaphore(0), []
    engine = FakeEngine(gate=gate)
    with contextlib.closing(EngineThread(engine)) as driver:
        driver.add(asked("a", 4, 8), batches.append).result()
        for _ in range(4):
            gate.release()
        until(lambda: len(batches) == 4)
    assert [len(batch) for batch in batches] == engine.batches == [8, 8, 8, 16]


def test_an_engine_that_fails_ends_every_request_and_takes_no_more():
    gate = threading.Semaphore(0)
    engine = FakeEngine(fault_at=3, gate=gate)
    driver = EngineThread(engine)
    # All are taken before the first step: it is the first that opens the gate.
    streams = [EngineStream(driver, str(i)) for i in range(5)]
    for _ in range(3):
        gate.release()
    for stream in streams:
        tokens, ends = by_completion(stream.events(), 2)
        assert all(len(t) <= 2 for t in tokens)
        for end in ends:
            assert (end.reason, end.error_type) == ("error", "EngineError")
            assert end.error.startswith(f"request {stream.name}: ") and "RuntimeError: a broken step" in end.error
    until(lambda: engine.is_closed)
    for ask in (lambda: driver.submit(asked("late")), lambda: driver.call("state")):
        with pytest.raises(EngineError, match="a broken step"):
            ask()
    driver.close()


class EngineStream:
    """A request that is handed over without waiting until it is taken."""

    def __init__(self, driver, name):
        self.name, self.all, self.driver = name, [], driver
        self.adding = driver.add(asked(name, 100, 2), self.all.extend)

    def events(self):
        until(lambda: self.adding.done())
        if self.adding.exception():  # it came after the end
            assert isinstance(self.adding.exception(), EngineError)
            text = f"request {self.name}: {self.adding.exception()}"
            return [Ended(self.name, i, "error", error=text, error_type="EngineError") for i in range(2)]
        until(lambda: sum(isinstance(e, Ended) for e in self.all) == 2)
        return self.all


def interrupted(act, is_there):
    """Press Ctrl-C while `act` waits."""
    main = threading.main_thread().ident

    def press():
        until(lambda: is_there(sys._current_frames()[main]))
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            act()
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)


def waits_in(function):
    def is_there(frame):
        while frame:
            if frame.f_code is function.__code__:
                return True
            frame = frame.f_back
        return False

    return is_there


def test_ctrl_c_while_tokens_are_awaited_leaves_the_engine_usable():
    gate = threading.Semaphore(0)
    with contextlib.closing(EngineThread(FakeEngine(gate=gate))) as driver:
        stream = driver.submit(asked("a", 3))
        interrupted(lambda: next(stream), waits_in(type(stream).__next__))
        gate.release(100)
        assert by_completion(stream)[0] == expected(asked("a", 3))
        assert is_answered(driver, asked("b"))


def test_ctrl_c_while_a_request_is_handed_over_ends_it():
    gate = threading.Semaphore(0)
    engine = FakeEngine(gate=gate)
    with contextlib.closing(EngineThread(engine)) as driver:
        busy = driver.submit(asked("busy", 2))
        interrupted(lambda: driver.submit(asked("a", 10**6)), waits_in(Future.result))
        interrupted(lambda: driver.call("echo"), waits_in(Future.result))
        gate.release(10**4)
        assert by_completion(busy)[0] == expected(asked("busy", 2))
        until(lambda: not driver.call("state")["open"])
        assert engine.aborted == ["a"]
        assert is_answered(driver, asked("b"))


def test_nothing_follows_an_end_and_there_is_one_of_each():
    waiting, got = Waiting(), []
    waiting.add(asked("a", n=2), got.extend)
    token, end = TokenEvent("a", 0, 5, {}), Ended("a", 0, "stop")
    assert waiting.deliver([token, end, token, end, TokenEvent("b", 0, 1, {}), Ended("a", 7, "stop")]) == []
    assert got == [token, end] and "a" in waiting
    waiting.end_all("it is over")
    waiting.end_all("it is over")
    assert got[2:] == [Ended("a", 1, "error", error="request a: it is over", error_type="EngineError")]
    assert "a" not in waiting
