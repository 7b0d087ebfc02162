"""Where the engine runs: a thread or a process, from any thread, through faults, kills and cancellations."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pyrosome import errors
from pyrosome.chat import InvalidRequest
from pyrosome.engine import aio, wire
from pyrosome.engine.aio import EngineProcess
from pyrosome.engine.request import Ended, Request, Reuse, Timeline, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread, Waiting
from pyrosome.errors import CheckpointError, ContextTooLong, DoesNotFit, EngineError, PyrosomeError, RequestError
from pyrosome.options import Constraint, SamplingParams
from tests.engine.fake_engine import FAILS_IN_STEP, HANGS_IN_STEP, KILLS_IN_STEP, FakeEngine, asked, expected

FAKE = "tests.engine.fake_engine:"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bounded():
    """No test waits for ever."""

    def late(*_):
        raise TimeoutError("the test did not come to its end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(monkeypatch, tmp_path_factory):
    """Where temporary files go, and nothing else does; empty at the end."""
    tmp_path_factory.getbasetemp()  # made before temporary files go elsewhere: other tests have theirs in it
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


@contextlib.contextmanager
def process(factory="make", max_restarts=3, window_s=60.0, **options):
    driver = EngineProcess(FAKE + factory, options, max_restarts=max_restarts, window_s=window_s)
    try:
        yield driver
    finally:
        driver.close()
        assert is_gone(driver.pid)


@pytest.fixture(params=["thread", "process"])
def place(request, folder):
    """Makes drivers; closes them."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            if request.param == "process":
                return stack.enter_context(process(**options))
            return stack.enter_context(contextlib.closing(EngineThread(lambda: FakeEngine(**options))))

        make.kind = request.param
        yield make


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

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        act()
    presser.join()


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


# The process


def test_a_process_leaves_nothing_behind(folder):
    with process() as driver:
        assert list(folder.iterdir()) == [], "the folder of the socket goes when the two are connected"
        assert not is_gone(driver.pid)
        assert os.getsid(driver.pid) != os.getsid(0), "Ctrl-C must not reach it"
        sockets = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) < sockets


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_every_request_ends_once_and_it_works_again(folder, seed):
    pick = random.Random(seed)
    seen = []

    def ask(i: int):
        r = asked(f"{seed}.{i}", pick.choice([1, 5, 400, 4000]), 1 + i % 3, ids=(i + 1,))
        events = []
        try:
            for e in driver.submit(r):
                events.append(e)
                seen.append(1)
        except EngineError as error:
            assert not events and "signal 9" in str(error) and f"request {r.id}: " in str(error)  # noqa: PT017
            return "refused"
        tokens, ends = by_completion(events, r.params.n)
        for part, whole, end in zip(tokens, expected(r), ends, strict=True):
            assert whole[: len(part)] == part
            if end.reason == "error":
                assert end.error_type == "EngineError" and end.error.startswith(f"request {r.id}: ")
                assert "signal 9" in end.error and "send it again" in end.error
            else:
                assert end.reason == "length" and part == whole
        return {e.reason for e in ends}

    with process(max_restarts=100, step_s=0.0005) as driver, ThreadPoolExecutor(40) as pool:
        for _ in range(3):
            pid, seen[:] = driver.pid, []
            answers = [pool.submit(ask, i) for i in range(40)]
            goal = pick.randrange(0, 3000)
            until(lambda goal=goal, answers=answers: len(seen) >= goal or all(a.done() for a in answers))
            os.kill(pid, signal.SIGKILL)
            results = [a.result() for a in answers]
            until(lambda pid=pid: driver.pid != pid)
            assert is_gone(pid)
            assert {"error"} in results or "refused" in results or goal > 1000
            assert is_answered(driver, asked("after", 3, 2))
        assert driver.num_restarts == 3


@pytest.mark.parametrize(
    ("first", "how"), [(KILLS_IN_STEP, "signal 9"), (FAILS_IN_STEP, "RuntimeError: a broken step")]
)
def test_a_step_that_ends_the_process_is_told_to_all(folder, first, how):
    with process() as driver:
        streams = [driver.submit(asked(str(i), 10**6)) for i in range(4)]
        with contextlib.suppress(EngineError):
            streams.append(driver.submit(asked("4", ids=(first,))))
        for name, stream in enumerate(streams):
            end = by_completion(stream)[1][0]
            assert end.error.startswith(f"request {name}: the engine process ended (") and how in end.error
        assert is_answered(driver, asked("after"))


def test_bytes_that_mean_nothing_end_the_process_that_sent_them(folder):
    with process("make_garbled") as driver:
        end = by_completion(driver.submit(asked("a")))[1][0]
        assert end.error_type == "EngineError" and "cannot be read" in end.error
        assert driver.call("echo", a=1) == {"a": 1}
        assert driver.num_restarts == 1


def test_a_process_that_keeps_dying_is_given_up(folder):
    with process(max_restarts=2) as driver:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"signal 9.* is started again"):
                driver.call("kill")
        stream = driver.submit(asked("a", 10**9))
        with pytest.raises(EngineError, match="3 times within 60 s: it is not started again"):
            driver.call("kill")
        assert "not started again" in by_completion(stream)[1][0].error
        for ask in (lambda: driver.submit(asked("late")), lambda: driver.call("state")):
            with pytest.raises(EngineError, match=r"3 times within 60 s.*make another"):
                ask()
        assert driver.num_restarts == 2


def test_old_deaths_are_forgotten(folder):
    with process(max_restarts=1, window_s=0.0) as driver:
        for _ in range(3):
            with pytest.raises(EngineError, match="is started again"):
                driver.call("kill")
        assert is_answered(driver, asked("a"))


@pytest.mark.parametrize(
    ("factory", "arguments", "kind", "text"),
    [
        (FAKE + "make_none", {"kind": "CheckpointError"}, CheckpointError, "^no engine today$"),
        (FAKE + "make_none", {"kind": "DoesNotExist"}, EngineError, "ValueError: no engine today"),
        (FAKE + "make_none", {"kind": "SIGKILL"}, EngineError, "signal 9.*before the engine was made"),
        (FAKE + "make", {"no_such_option": 1}, EngineError, "TypeError.*no_such_option"),
        ("tests.engine.no_such_module:make", {}, EngineError, "ModuleNotFoundError.*no_such_module"),
        (FAKE + "make", {"gate": object()}, RequestError, "cannot go to another process"),
    ],
)
def test_a_process_whose_engine_cannot_be_made_says_why(folder, factory, arguments, kind, text):
    with pytest.raises(PyrosomeError, match=text) as caught:
        EngineProcess(factory, arguments)
    assert type(caught.value) is kind


def test_a_restart_that_cannot_make_the_engine_is_given_up_and_says_why(folder, tmp_path):
    with process("make_once", max_restarts=2, path=str(tmp_path / "made")) as driver:
        with pytest.raises(EngineError, match="signal 9"):
            driver.call("kill")
        until(lambda: driver.num_restarts == 2)
        for _ in range(2):  # the first may still be answered by the last process's end
            with pytest.raises(EngineError, match="the files are gone"):
                driver.submit(asked("a"))


def test_requests_wait_for_a_restart_and_are_told_if_it_dies_too(folder, tmp_path):
    there = tmp_path / "there"
    there.touch()
    with process("make_slowly", path=str(there)) as driver, ThreadPoolExecutor(2) as pool:
        there.unlink()
        first = driver.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: driver.pid != first)
        waiting = pool.submit(driver.submit, asked("a"))
        until(lambda: driver._asked)
        os.kill(driver.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"request a: .*signal 9"):
            waiting.result()
        until(lambda: driver.num_restarts == 2)
        waiting = pool.submit(is_answered, driver, asked("b"))
        until(lambda: driver._asked)
        assert not waiting.done()
        there.touch()
        assert waiting.result()


def test_a_process_that_does_not_end_is_killed(folder, monkeypatch):
    monkeypatch.setattr(aio, "CLOSE_S", 0.1)
    with process() as driver:
        stream = driver.submit(asked("a", ids=(HANGS_IN_STEP,)))
        driver.close()
        assert "closed" in by_completion(stream)[1][0].error


def test_a_process_that_is_still_loading_is_closed_at_once(folder, tmp_path):
    there = tmp_path / "there"
    there.touch()
    with process("make_slowly", path=str(there)) as driver:
        there.unlink()
        first = driver.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: driver.pid != first)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_ends_with_its_owner(folder, hangs):
    ids = (HANGS_IN_STEP,) if hangs else (1,)
    script = (
        "import sys, time\n"
        "from pyrosome.engine.aio import EngineProcess\n"
        "from tests.engine.fake_engine import asked\n"
        f"driver = EngineProcess({FAKE + 'make'!r})\n"
        f"stream = driver.submit(asked('a', 10**9, ids={ids}))\n"
        "print(driver.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([*sys.path, str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env, text=True)
    try:
        pid = int(owner.stdout.readline())
        owner.kill()
        until(lambda: is_gone(pid) or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


def test_a_script_without_a_guard_may_start_a_process(folder, tmp_path):
    """And a driver nobody closes ends with the interpreter."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pyrosome.engine.aio import EngineProcess\n"
        f"driver = EngineProcess({FAKE + 'make'!r})\n"
        "print(driver.call('echo', a=1), driver.pid)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, env=env, text=True, timeout=50)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("{'a': 1} ")
    until(lambda: is_gone(int(done.stdout.split()[-1])))


def test_what_cannot_travel_is_refused_and_nothing_else_is_harmed(folder):
    with process(step_s=0.001) as driver:
        stays = driver.submit(asked("stays", 100))
        with pytest.raises(RequestError, match="'a' holds what cannot go to another process"):
            driver.submit(Request("a", (object(),)))
        with pytest.raises(RequestError, match="ids"):
            driver.submit(Request("a", ("one",)))
        with pytest.raises(RequestError, match="Call holds what cannot go"):
            driver.call("echo", thing=object())
        with pytest.raises(EngineError, match="Done holds what cannot go"):
            driver.call("unspeakable")
        with pytest.raises(EngineError, match="KeyError: 'no such thing'"):
            driver.submit(asked("a", ids=(404,)))
        with pytest.raises(EngineError, match="ValueError: as asked"):
            driver.call("raise", kind="NoneOfOurs")
        assert by_completion(stays)[0] == expected(asked("stays", 100))
        assert driver.num_restarts == 0


def test_a_temporary_folder_with_a_long_name_is_refused_with_advice(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(EngineError, match="set TMPDIR to a folder with a short name"):
        EngineProcess(FAKE + "make")
    assert list(long.iterdir()) == []


# The wire

WHOLE = Request(
    "r-1",
    (0, 1, 127, 128, 129279),
    SamplingParams(
        max_tokens=7, temperature=0.25, top_p=0.5, top_k=3, min_p=0.125, presence_penalty=-1.0, frequency_penalty=2.0,
        repetition_penalty=1.5, seed=2**64 - 1, stop_token_ids=(1, 2), stop=("\n", "é"), logprobs=5, ignore_eos=True,
        n=3, max_thinking_tokens=9, max_repeats=4,
    ),
    priority=-2,
    salt="tenant",
    stable=4,
    think_end=128799,
    constraint=Constraint("json", '{"type": "object"}', True, False),
    session="s",
)  # fmt: skip
EVENTS = [
    TokenEvent("a", 0, 5, {5: -0.125, 7: -float("inf")}),
    TokenEvent("b", 2, 1, {}, True),
    Ended(
        "b", 2, "stop", 9, Reuse(9, 8, 7, 1, "evicted", "csa_kv", "why"), Timeline(0.1, 0.2, 0.3, 0.4, 1, 2, (3,), (1,))
    ),
    Ended("c", 0, "error", error="request c: no", error_type="EngineError"),
    TokenEvent("a", 0, 6, {6: 0.0}),
    Ended("a", 0, "length", 2),
]
STATS = Stats(requests=3, ended_by_reason={"stop": 2}, drafted=(4, 2), free_pages={128: 7}, step_seconds=0.1)
FRAMES = [
    wire.encode_add(7, WHOLE),
    *(wire.encode(m) for m in (wire.Start("a:b", {"x": 1}, True), wire.Call(3, "echo", {"x": [1]}), wire.Abort("é"))),
    *(
        wire.encode(m)
        for m in (wire.Close(), wire.Hello(), wire.Ready(), wire.done(1, STATS), wire.events_message(EVENTS))
    ),
    wire.encode(wire.Failed(2, wire.failure_of(ContextTooLong(12, 10, "shorten it")))),
]


@pytest.mark.parametrize("request_", [WHOLE, Request("", ())])
def test_a_request_travels_whole(request_):
    message = wire.decode_command(wire.encode_add(7, request_))
    assert message.number == 7 and wire.request_of(message) == request_


@pytest.mark.parametrize("events", [[], EVENTS, EVENTS[::-1], EVENTS[2:3], EVENTS[:1], EVENTS[2:]])
def test_events_travel_whole_and_in_order(events):
    assert wire.events_of(wire.decode_report(wire.encode(wire.events_message(events)))) == events


@pytest.mark.parametrize("result", [None, 3, [1, [2.5]], {"a": {1: 2}}, STATS, EVENTS[2].reuse, EVENTS[2].timeline])
def test_results_travel_whole(result):
    message = wire.decode_report(wire.encode(wire.done(1, result)))
    assert wire.result_of(message) == result and type(wire.result_of(message)) is type(result)


def test_bytes_are_what_they_were():
    assert wire.encode(wire.Abort("a")) == b"\x92\xa5Abort\xa1a"
    assert wire.encode(wire.events_message([TokenEvent("a", 1, 5, {5: -0.5}), Ended("a", 1, "stop")])).hex() == (
        "92a64576656e747391929185a772657175657374a161a5696e64657801a5746f6b656e05a86c6f6770726f62738105cbbfe0000000000000"
        "ac69735f656e645f746f6b656ec29188a772657175657374a161a5696e64657801a6726561736f6ea473746f70ad6f75747075745f746f6b"
        "656e7300a5726575736587ad70726f6d70745f746f6b656e7300ae6d6174636865645f746f6b656e7300ad7265757365645f746f6b656e73"
        "00af7265706c617965645f746f6b656e7300a56c696d6974a0a673747265616da0a6726561736f6ea0a874696d656c696e6588a761727269"
        "766564cb0000000000000000a861646d6974746564cb0000000000000000ab66697273745f746f6b656ecb0000000000000000a5656e6465"
        "64cb0000000000000000a96e756d5f7061726b7300a96e756d5f737465707300a76472616674656490a8616363657074656490a56572726f"
        "72a0aa6572726f725f74797065a0"
    )


@pytest.mark.parametrize("decode", [wire.decode_command, wire.decode_report])
def test_bytes_that_are_no_message_are_an_engine_error(decode):
    choose, num_refused = random.Random(1), 0
    for frame in FRAMES:
        broken = [frame[:n] for n in range(len(frame))] + [frame + b"\0"]
        for _ in range(200):
            at = choose.randrange(len(frame))
            broken.append(frame[:at] + bytes([choose.randrange(256)]) + frame[at + 1 :])
        for each in [*broken, b"\x92\xa7Unknown\x01", b"\x93\xa5Abort\xa1a\xa1b", b"\x91" * 5000, b"\xc0"]:
            try:
                decode(each)
            except EngineError as error:
                num_refused += 1
                assert "cannot be read" in str(error)  # noqa: PT017
    assert num_refused > 2000


def test_a_result_of_a_class_that_does_not_travel_is_an_engine_error():
    for message in (wire.Done(1, {}, "Thread"), wire.Done(1, {"requests": "many"}, "Stats")):
        with pytest.raises(EngineError, match="cannot be read"):
            wire.result_of(message)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RequestError("n is 0"), RequestError, "n is 0"),
        (EngineError(), EngineError, ""),
        (InvalidRequest("a body"), InvalidRequest, "a body"),
        (RequestError("two", object()), RequestError, "('two', <object"),
        (ValueError("bad"), EngineError, "ValueError: bad"),
        (KeyboardInterrupt(), EngineError, "KeyboardInterrupt: "),
    ],
)
def test_exceptions_travel(error, kind, text):
    failed = wire.decode_report(wire.encode(wire.Failed(1, wire.failure_of(error))))
    again = wire.error_of(failed.failure)
    assert type(again) is kind and str(again).startswith(text)


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        (["elsewhere.Strange", "pyrosome.errors.RequestError", "pyrosome.errors.PyrosomeError"], RequestError),
        (["elsewhere.Longer", "pyrosome.errors.ContextTooLong", "pyrosome.errors.RequestError"], RequestError),
        (["builtins.SystemExit"], EngineError),
        ([], EngineError),
    ],
)
def test_an_exception_of_an_unknown_class_is_the_nearest_one_known(classes, kind):
    error = wire.error_of(wire.Failure(classes, [1, 2], "what it said"))
    assert type(error) is kind and str(error) == "what it said"


def test_drivers_need_no_torch_and_a_thread_needs_no_wire():
    check = (
        "import sys\n"
        "import pyrosome.engine.worker, pyrosome.engine.stats, pyrosome.engine.trace\n"
        "assert not {'torch', 'numpy', 'zmq', 'msgspec', 'asyncio'} & set(sys.modules)\n"
        "import pyrosome.engine.aio, pyrosome.engine.wire\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", check], check=True, env=env, timeout=50)
