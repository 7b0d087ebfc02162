"""An engine in a process of its own: kills, restarts, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pyrosome.engine import aio, wire
from pyrosome.engine.aio import EngineProcess
from pyrosome.engine.request import Request
from pyrosome.errors import CheckpointError, EngineError, PyrosomeError, RequestError
from tests.engine.drivers import FAKE, ROOT, by_completion, is_answered, is_gone, process, until
from tests.engine.fake_engine import FAILS_IN_STEP, HANGS_IN_STEP, KILLS_IN_STEP, FakeEngine, asked, expected

pytestmark = pytest.mark.usefixtures("bounded")


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

    with ThreadPoolExecutor(40) as pool, process(max_restarts=100, step_s=0.0005) as driver:
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
    with ThreadPoolExecutor(2) as pool, process("make_slowly", path=str(there)) as driver:
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


def test_an_owner_that_goes_before_the_two_are_connected_leaves_no_socket(folder):
    script = (
        "import os, signal, subprocess\n"
        "from pyrosome.engine import aio, wire\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "wire.subprocess.Popen = Popen\n"
        f"aio.EngineProcess({FAKE + 'make'!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "TMPDIR": str(folder)}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=50).returncode == -signal.SIGKILL
    until(lambda: not list(folder.iterdir()))


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
        with pytest.raises(EngineError, match=r"a result .* cannot be read"):
            driver.call("misshapen")
        assert by_completion(stays)[0] == expected(asked("stays", 100))
        assert driver.num_restarts == 0


def test_closing_does_not_wait_for_whoever_cannot_keep_up(folder):
    with process() as driver:
        batches = []

        def slowly(events):
            batches.append(events)
            time.sleep(0.001)

        driver.add(asked("a", 10**6), slowly).result()
        until(lambda: len(batches) > 100)
        driver.close()
        events = [e for batch in batches for e in batch]
        assert "closed" in by_completion(events)[1][0].error


class BusyOwner:
    """An owner that always has another operation to ask for."""

    def __init__(self):
        self.commands = iter(
            [
                wire.Add(0, msgspec.Raw(msgspec.msgpack.encode(asked("a", 5)))),
                *(wire.Call(i, "echo", {}) for i in range(1, 10**4)),
                wire.Close(),
            ]
        )
        self.sent = []

    def receive(self, *, wait=True):
        return next(self.commands)

    def send(self, message):
        self.sent.append(message)


def test_a_flood_of_operations_does_not_hold_up_steps():
    owner = BusyOwner()
    aio._answer(owner, FakeEngine())
    events = [e for message in owner.sent if isinstance(message, wire.Events) for e in wire.events_of(message)]
    assert by_completion(events)[0] == expected(asked("a", 5))
    assert [m.number for m in owner.sent if isinstance(m, wire.Done)] == list(range(10**4))


@pytest.mark.parametrize("seed", range(2))
def test_killed_amid_long_messages_it_works_again(folder, seed):
    pick = random.Random(seed)
    data = pick.randbytes(1 << 20) * 8
    with ThreadPoolExecutor(4) as pool, process(max_restarts=100) as driver:
        for _ in range(3):
            pid = driver.pid
            answers = [pool.submit(driver.call, "echo", data=data) for _ in range(4)]
            time.sleep(pick.random() * 0.05)  # wherever it is then
            os.kill(pid, signal.SIGKILL)
            for answer in answers:
                if answer.exception():
                    assert isinstance(answer.exception(), EngineError) and "signal 9" in str(answer.exception())
                else:
                    assert answer.result() == {"data": data}
            until(lambda pid=pid: driver.pid != pid)
        assert driver.call("echo", data=data) == {"data": data}


def test_a_process_that_cannot_be_started_leaves_nothing_behind(folder, monkeypatch):
    make, made = socket.socketpair, []

    def second_time_not():
        made.append(1)
        if len(made) > 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return make()

    monkeypatch.setattr(socket, "socketpair", second_time_not)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineError, match=r"could not be started .*Too many open files"):
        EngineProcess(FAKE + "make")
    assert len(made) == 2 and len(os.listdir("/proc/self/fd")) == before


def test_a_temporary_folder_with_a_long_name_is_refused_with_advice(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(EngineError, match="set TMPDIR to a folder with a short name"):
        EngineProcess(FAKE + "make")
    assert list(long.iterdir()) == []
