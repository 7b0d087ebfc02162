"""The engine for the tasks of an event loop, in either place: streams, cancellations, loops that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import threading
import warnings

import pytest

from pyrosome.engine.aio import AsyncEngine
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread
from pyrosome.errors import ContextTooLong, EngineError, RequestError
from tests.engine.drivers import by_completion, is_gone, process, until
from tests.engine.fake_engine import FakeEngine, asked, expected, news

pytestmark = pytest.mark.usefixtures("bounded")


@pytest.fixture
def run(caplog):
    """Runs coroutines, each in a loop of its own; nobody complains of what became of their tasks and futures."""
    complaints = []

    def run(main):
        async def watched():
            asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
            return await main

        gc.collect()  # what other tests left
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = asyncio.run(watched())
            gc.collect()
        complaints.extend(map(str, warned))
        return result

    yield run
    gc.collect()
    assert complaints == []
    assert [r.getMessage() for r in caplog.records if r.name in ("asyncio", "concurrent.futures")] == []


async def ends(engine: AsyncEngine, name: str) -> None:
    """Wait until the engine has no such request."""
    while name in (await engine.call("state"))["open"]:
        await asyncio.sleep(0.002)


async def is_answered(engine: AsyncEngine, request) -> bool:
    events = [e async for e in engine.submit(request)]
    return by_completion(events, request.params.n)[0] == expected(request)


@pytest.mark.parametrize(("max_tokens", "n"), [(1, 1), (7, 1), (5, 3)])
def test_a_stream_gives_every_completion_and_ends(place, run, max_tokens, n):
    async def main():
        request = asked("a", max_tokens, n)
        stream = engine.submit(request)
        await stream.accepted()
        tokens, (*_, end) = by_completion([e async for e in stream], n)
        assert tokens == expected(request) and (end.reason, end.output_tokens) == ("length", max_tokens)
        assert [e async for e in stream] == []
        await stream.accepted()

    engine = AsyncEngine(place())
    run(main())


def test_news_of_a_prompt_comes_in_batches_and_is_passed_over_by_who_iterates(place, run):
    async def main():
        r = dataclasses.replace(asked("a", 4, 2, ids=(5, 6, 7)), progress=True)
        r = dataclasses.replace(r, params=dataclasses.replace(r.params, prompt_logprobs=0))
        assert by_completion([e async for e in engine.submit(r)], 2)[0] == expected(r)
        stream, heard = engine.submit(r), []
        while batch := await stream.batch(60.0):
            heard += batch
        assert heard[:3] == news(r) and by_completion(heard[3:], 2)[0] == expected(r)
        assert await stream.batch(60.0) == [], "after its end nothing is waited for"

    engine = AsyncEngine(place())
    run(main())


def test_a_batch_that_does_not_come_in_time_is_empty_and_what_comes_later_is_in_the_next(held, run):
    driver, _, gate = held

    async def main():
        r = asked("a", 2)
        stream = engine.submit(r)
        gate.release()
        await stream.accepted()
        assert await stream.batch(0.001) == await stream.batch(0.0) == []
        gate.release(100)
        heard = []
        while batch := await stream.batch(60.0):
            heard += batch
        assert by_completion(heard)[0] == expected(r)

    engine = AsyncEngine(driver)
    run(main())


def test_many_tasks_at_once_each_get_their_own(place, run):
    async def main():
        requests = [asked(str(i), 1 + i % 9, 1 + i % 3, ids=(i + 1, 5)) for i in range(200)]
        assert all(await asyncio.gather(*(is_answered(engine, r) for r in requests)))

    engine = AsyncEngine(place())
    run(main())


@pytest.mark.parametrize(
    ("ids", "kind", "text"), [((), RequestError, "no ids"), ((1,) * 1001, ContextTooLong, "1001 tokens were asked for")]
)
def test_a_refused_request_raises_what_is_wrong_where_it_is_awaited(place, run, ids, kind, text):
    async def main():
        for ask in ("accepted", "__anext__"):
            stream = engine.submit(asked("a", ids=ids))
            for _ in range(2):
                with pytest.raises(RequestError, match=text) as caught:
                    await getattr(stream, ask)()
                assert type(caught.value) is kind
        engine.submit(asked("nobody asks", ids=ids))
        assert await is_answered(engine, asked("a"))

    engine = AsyncEngine(place())
    run(main())


def test_operations_give_their_result_and_raise_their_own(place, run):
    async def main():
        assert await engine.call("echo", a=[1, "é"]) == {"a": [1, "é"]}
        assert isinstance(await engine.call("stats"), Stats)
        with pytest.raises(ContextTooLong, match="12 tokens were asked for"):
            await engine.call("raise", kind="ContextTooLong")
        with pytest.raises(RequestError, match="there is no operation"):
            await engine.call("nonsense")

    engine = AsyncEngine(place())
    run(main())


def test_cancelling_the_task_that_iterates_ends_its_request_alone(place, run):
    async def main():
        kept = asyncio.create_task(is_answered(engine, asked("kept", 60, 2)))
        seen = asyncio.Event()

        async def listen():
            async for _ in streams[0]:
                seen.set()

        streams = [engine.submit(asked("left", 10**6, 2))]
        task = asyncio.create_task(listen())
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ends(engine, "left")
        assert [e async for e in streams[0]] == []
        assert await kept

    engine = AsyncEngine(place(step_s=0.001))
    run(main())


def test_a_wait_that_takes_too_long_ends_the_request(place, run):
    async def main():
        stream = engine.submit(asked("left", 10**6))

        async def listen():
            async for _ in stream:
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listen(), 0.02)
        await ends(engine, "left")

    engine = AsyncEngine(place(step_s=0.001))
    run(main())


async def close(stream):
    stream.close()


async def leave_a_block(stream):
    async with stream:
        await anext(stream)


async def leave_a_loop(stream):
    async for _ in stream:
        break


async def drop(stream):
    del stream


@pytest.mark.parametrize("leave", [close, leave_a_block, leave_a_loop, drop])
@pytest.mark.parametrize("is_accepted", [False, True])
def test_a_stream_that_is_left_ends_its_request_alone(place, run, leave, is_accepted):
    async def main():
        kept = asyncio.create_task(is_answered(engine, asked("kept", 60, 2)))
        streams = [engine.submit(asked("left", 10**6, 2))]
        if is_accepted:
            await streams[0].accepted()
        await leave(streams.pop())
        gc.collect()
        await ends(engine, "left")
        assert await kept

    engine = AsyncEngine(place(step_s=0.001))
    run(main())


def test_an_abort_ends_the_stream_with_what_was_said(place, run):
    async def main():
        stream = engine.submit(asked("a", 10**6, 2))
        first = [await anext(stream) for _ in range(6)]
        await engine.abort("a")
        await engine.abort("nobody")
        tokens, ended = by_completion([*first, *[e async for e in stream]], 2)
        assert {e.reason for e in ended} == {"abort"} and [e.output_tokens for e in ended] == [len(t) for t in tokens]

    engine = AsyncEngine(place(step_s=0.001))
    run(main())


def test_closing_ends_every_stream_with_an_error(place, run):
    async def main():
        async def listen(name):
            return by_completion([e async for e in engine.submit(asked(name, 10**6, 2))], 2)[1]

        async with engine:
            tasks = [asyncio.create_task(listen(str(i))) for i in range(8)]
            while len((await engine.call("state"))["open"]) < 8:
                await asyncio.sleep(0.002)
        for name, ended in enumerate(await asyncio.gather(*tasks)):
            for end in ended:
                assert (end.reason, end.error_type) == ("error", "EngineError")
                assert end.error.startswith(f"request {name}: ") and "closed" in end.error
        await engine.close()
        for ask in (engine.submit(asked("late")).accepted, lambda: anext(engine.submit(asked("late")))):
            with pytest.raises(EngineError, match="closed; make another"):
                await ask()
        with pytest.raises(EngineError, match="closed; make another"):
            await engine.call("state")

    engine = AsyncEngine(place(step_s=0.002))
    run(main())


def test_requests_of_a_loop_that_was_closed_are_ended_and_the_next_loop_is_served(place, run):
    left = []

    async def first():
        left.extend(engine.submit(asked(f"left {i}", 10**6)) for i in range(3))
        for stream in left:
            await anext(stream)
        assert await is_answered(engine, asked("a", 20))

    async def second():
        assert await is_answered(engine, asked("a", 20))
        for i in range(3):
            await ends(engine, f"left {i}")

    engine = AsyncEngine(place(step_s=0.001))
    run(first())
    run(second())
    assert len(left) == 3, "they were held all the while"


def test_two_loops_at_once_are_both_served(place, run):
    engine, answers = AsyncEngine(place()), []

    async def main(of):
        requests = [asked(f"{of}.{i}", 9, ids=(of + 1, i)) for i in range(30)]
        answers.extend(await asyncio.gather(*(is_answered(engine, r) for r in requests)))

    threads = [threading.Thread(target=lambda of=of: asyncio.run(main(of))) for of in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 60


def test_a_killed_process_is_told_to_every_stream_and_the_next_one_answers(folder, run):
    async def main():
        async def listen(name):
            return by_completion([e async for e in engine.submit(asked(name, 10**6))])[1][0]

        tasks = [asyncio.create_task(listen(str(i))) for i in range(8)]
        while len((await engine.call("state"))["open"]) < 8:
            await asyncio.sleep(0.002)
        pid = driver.pid
        os.kill(pid, signal.SIGKILL)
        for name, end in enumerate(await asyncio.gather(*tasks)):
            assert end.error.startswith(f"request {name}: ") and "signal 9" in end.error
        assert await is_answered(engine, asked("after")) and is_gone(pid)

    with process(step_s=0.001) as driver:
        engine = AsyncEngine(driver)
        run(main())


# A step that takes as long as it is told to


@pytest.fixture
def held():
    """A thread's engine that is in the middle of a step, and what lets it step."""
    gate = threading.Semaphore(0)
    engine = FakeEngine(gate=gate)
    with contextlib.closing(EngineThread(engine)) as driver, driver.submit(asked("busy", 2)):
        yield driver, engine, gate
        gate.release(10**6)


def test_the_loop_goes_on_while_a_step_takes_long(held, run):
    driver, _, gate = held

    async def main():
        task = asyncio.create_task(is_answered(engine, asked("a", 3)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        gate.release(100)
        assert await task

    engine = AsyncEngine(driver)
    run(main())


@pytest.mark.parametrize("what", ["accepted", "__anext__"])
def test_cancelled_before_the_engine_took_it_a_request_is_ended_when_it_does(held, run, what):
    driver, fake, gate = held

    async def main():
        stream = engine.submit(asked("a", 10**6))
        task = asyncio.create_task(getattr(stream, what)())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.release(10**6)
        await ends(engine, "a")
        assert fake.aborted == ["a"]
        assert await is_answered(engine, asked("a"))

    engine = AsyncEngine(driver)
    run(main())


@pytest.mark.parametrize("what", ["accepted", "__anext__"])
def test_a_loop_that_is_closed_before_the_engine_took_a_request_hears_no_more_of_it(held, run, what):
    driver, fake, gate = held
    streams = []

    async def main():
        streams.extend(engine.submit(asked(name, 10**6)) for name in "ab")
        for stream in streams:
            task = asyncio.create_task(getattr(stream, what)())
            await asyncio.sleep(0)
        held_back = asyncio.create_task(engine.call("echo"))
        await asyncio.sleep(0)
        return task, held_back

    engine = AsyncEngine(driver)
    tasks = run(main())
    assert all(t.cancelled() for t in tasks)
    gate.release(10**6)
    until(lambda: not driver.call("state")["open"])
    assert sorted(fake.aborted) == ["a", "b"]


def test_a_step_wakes_the_loop_once_for_all_its_streams(held, run):
    driver, _, gate = held

    async def main():
        loop, wakes = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        streams = [engine.submit(asked(str(i), 4, ids=(i + 1,))) for i in range(50)]
        gate.release()
        for stream in streams:
            await stream.accepted()
        loop.call_soon_threadsafe = lambda *args: (wakes.append(1), wake(*args))
        gate.release()
        until(lambda: len(engine._post._events) == 50)  # the loop stands still meanwhile
        first = [await anext(stream) for stream in streams]
        assert [e.token for e in first] == [expected(asked("", 4, ids=(i + 1,)))[0][0] for i in range(50)]
        assert len(wakes) == 1
        gate.release(10**6)

    engine = AsyncEngine(driver)
    run(main())
