"""What a server needs: an engine in a process of its own, and the face of any driver for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn

import zmq

from pyrosome.engine import wire
from pyrosome.engine.request import Ended, Event, News, Request
from pyrosome.engine.worker import (
    CLOSED,
    Deliver,
    Driver,
    EngineLike,
    Job,
    Mailbox,
    Waiting,
    close_engine,
    running,
    settle,
)
from pyrosome.errors import EngineError, PyrosomeError, RequestError
from pyrosome.log import configure

log = logging.getLogger(__name__)

CLOSE_S = 30.0  # what a process may take to write its trace; then it is killed
LOOK_MS = 1000  # between two looks at whether a process lives whose end was not heard
BATCH = 256  # events of one request that are handed over at once
MOST = 64  # commands between two steps, and reports between two looks for commands: neither may hold the other up


class AsyncEngine:
    """A driver's engine for the tasks of an event loop, which it never holds up."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._post: _Post | None = None

    def submit(self, request: Request) -> AsyncEventStream:
        """A request's events, for `async for`; the request is on its way already.

        Cancelling the task that iterates, or closing or dropping the stream, aborts the request.
        """
        loop, post = asyncio.get_running_loop(), self._post
        if post is None or post.loop is not loop:
            post = self._post = _Post(loop)
        return AsyncEventStream(self._driver, request, post)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """An operation's result.

        Raises:
            RequestError: there is no such operation, or its arguments do not fit.
            EngineError: the engine has failed or was closed.
        """
        return await asyncio.wrap_future(self._driver.invoke(name, **arguments))

    async def abort(self, request_id: str) -> None:
        """End a request before the next step, if it is there; its stream ends with "abort"."""
        self._driver.abort(request_id)

    async def close(self) -> None:
        """End everything; every stream ends with an error."""
        await asyncio.to_thread(self._driver.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncEventStream:
    """One request's events, for one task; made by `AsyncEngine.submit`."""

    def __init__(self, driver: Driver, request: Request, post: _Post) -> None:
        self._driver, self._id, self._open = driver, request.id, request.params.n
        # The driver knows the inbox alone, so that a stream nobody holds any more is collected.
        self._inbox = _Inbox()
        self._adding = driver.add(request, functools.partial(post.send, self._inbox))
        self._adding.add_done_callback(functools.partial(post.wake, self._inbox))

    async def accepted(self) -> None:
        """Wait until the engine has taken the request; a server answers 200 only then.

        Raises:
            RequestError: what is wrong with the request.
            EngineError: the engine has failed or was closed.
        """
        await self._until(self._adding.done)
        self._adding.result()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._open <= 0:
            raise StopAsyncIteration
        await self.accepted()
        event: Event | News | None = None
        while event is None or isinstance(event, News):  # who wants to know of prompts takes a `batch`
            await self._until(lambda: bool(self._inbox.events))
            event = self._inbox.events.popleft()
        if isinstance(event, Ended):
            self._open -= 1
        return event

    async def batch(self, wait_s: float) -> list[Event | News]:
        """Events that are there, up to `BATCH`; none if none comes within so long, or if none will come any more.

        Where there are more, others have had their turn before it returns: a client that was not read for long may
        find very many.

        Raises:
            RequestError, EngineError: as `accepted`.
        """
        if self._open <= 0:
            return []
        await self.accepted()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if self._inbox.events else wait_s):
                while not self._inbox.events:
                    await self._inbox.arrival()
        events = [self._inbox.events.popleft() for _ in range(min(BATCH, len(self._inbox.events)))]
        if self._inbox.events:
            await asyncio.sleep(0)
        self._open -= sum(isinstance(e, Ended) for e in events)
        return events

    def close(self) -> None:
        """Take no more events; the request is ended if it goes on."""
        if self._open > sum(isinstance(e, Ended) for e in self._inbox.events):
            self._driver.end_unwanted(self._id, self._adding)
        self._open = 0
        self._inbox.events.clear()

    async def _until(self, is_there: Callable[[], bool]) -> None:
        try:
            while not is_there():
                await self._inbox.arrival()
        except BaseException:  # the task was cancelled
            self.close()
            raise

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class _Inbox:
    """Events that have arrived in the loop."""

    def __init__(self) -> None:
        self.events: deque[Event | News] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def arrival(self) -> None:
        """Wait for events, or for word that the request was taken or refused."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def put(self, events: list[Event | News]) -> None:
        self.events += events
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class _Post:
    """Events on their way from a driver's thread into a loop, which is woken once for all that a step gives."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: deque[tuple[_Inbox, list[Event | News]]] = deque()
        self._is_due = False

    def send(self, inbox: _Inbox, events: list[Event | News]) -> None:
        """Events for an inbox.

        Raises:
            RuntimeError: the loop was closed; also where it was closed before it came to what is on its way.
        """
        if self.loop.is_closed():
            raise RuntimeError("the event loop was closed")
        self._events.append((inbox, events))
        if not self._is_due:
            self._is_due = True
            self.loop.call_soon_threadsafe(self._arrive)

    def wake(self, inbox: _Inbox, _: Future[None]) -> None:
        """Have whoever waits at an inbox look again."""
        with contextlib.suppress(RuntimeError):  # nobody waits there any more
            self.send(inbox, [])

    def _arrive(self) -> None:
        self._is_due = False  # before the look: what comes after it wakes the loop again
        while self._events:
            inbox, events = self._events.popleft()
            inbox.put(events)


class EngineProcess(Driver):
    """An engine in a process of its own: it shares no Python thread with its owner, and its crash stays outside.

    When it dies, every waiting request ends with an error, and another is started, without what the first one had
    computed.  It ends with its owner, however that ends.  Needs a POSIX system.

    Args:
        factory: "module:function", what makes the engine there.
        arguments: of that function, plain data.
        max_restarts: in `window_s` seconds; if it dies once more, the last one is not replaced.

    Raises:
        PyrosomeError: what the factory raised; anything else it raises is an `EngineError`.
    """

    def __init__(
        self, factory: str, arguments: Mapping[str, Any] | None = None, *, max_restarts: int = 3, window_s: float = 60.0
    ) -> None:
        has_log = bool(logging.getLogger("pyrosome").handlers)
        self._start = wire.encode(wire.Start(factory, dict(arguments or {}), has_log))
        self._max_restarts, self._window_s = max_restarts, window_s
        self.pid = 0
        self.num_restarts = 0
        self.is_up = False
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._mailbox, self._waiting = Mailbox(self._wake), Waiting()
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}  # what is not answered yet
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="pyrosome-engine-process", daemon=True)
        self._thread.start()
        running.add(self)
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def add(self, request: Request, deliver: Deliver) -> Future[None]:
        number = next(self._numbers)
        return self._ask(number, lambda: wire.encode_add(number, request), request, deliver)

    def invoke(self, name: str, /, **arguments: Any) -> Future[Any]:
        number = next(self._numbers)
        return self._ask(number, lambda: wire.encode(wire.Call(number, name, arguments)))

    def abort(self, request_id: str) -> None:
        frame = wire.encode(wire.Abort(request_id))
        self._mailbox.put(Job(lambda child: child.send(frame)))

    def close(self) -> None:
        self._mailbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask(
        self, number: int, encode: Callable[[], bytes], request: Request | None = None, deliver: Deliver | None = None
    ) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            frame = encode()  # here, where it holds up nobody else
        except RequestError as error:
            done.set_exception(error)
            return done

        def run(child: wire.Child) -> None:
            self._asked[number] = _Asked(done, request, deliver)
            child.send(frame)

        return self._mailbox.put(Job(run, done))

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            self._waker.send(b"\0")

    # In the driver's thread

    def _run(self) -> None:
        try:
            reason = self._keep_running()
        except EngineError as error:
            reason = str(error)
        except BaseException as error:
            log.exception("the driver of the engine's process failed; every request that waits is ended")
            reason = f"the engine's driver failed ({type(error).__name__}: {error}); make another, and report this"
        self._give_up(reason)
        self._waker.close()
        self._woken.close()

    def _keep_running(self) -> str:
        """Have a process, and another when it dies; returns why there is none any more."""
        died: deque[float] = deque()
        while True:
            with wire.Child(self._start) as child:
                self.pid = child.pid
                try:
                    is_closing = self._attend(child)
                except EngineError as error:  # it cannot be understood: it is of no use
                    child.last_words, is_closing = error, False
                    child.kill()
                if is_closing:
                    self._give_up(CLOSED)
                    child.send(wire.encode(wire.Close()))
                    child.wait(CLOSE_S if child.is_ready else 0)
                    return CLOSED
                self.is_up = False
                how = child.wait(LOOK_MS / 1000)
            now = time.monotonic()
            died.append(now)
            while died[0] < now - self._window_s:
                died.popleft()
            if not self._ready.done():
                if child.last_words:
                    self._ready.set_exception(child.last_words)
                return f"the engine's process ended ({how}) before the engine was made; see its log"
            if len(died) > self._max_restarts:
                return (
                    f"the engine process ended ({how}), and {len(died)} times within {self._window_s:.0f} s: it is not "
                    "started again; see its log, and make another engine"
                )
            log.error("the engine process ended (%s); it is started again", how)
            self.num_restarts += 1
            self._fail_all(f"the engine process ended ({how}) and is started again; send it again")

    def _attend(self, child: wire.Child) -> bool:
        """Pass commands and reports on: until there are no more (True), or the process ends (False)."""
        poller = zmq.Poller()
        for source in (child.socket, child.lifeline, self._woken):
            poller.register(source, zmq.POLLIN)
        while True:
            poller.poll(LOOK_MS)
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            for command in self._mailbox.take(wait=False):
                if command is None:
                    return True
                command.run(child)
            for report in itertools.islice(child.receive(), MOST):
                self._take(child, report)
            if child.has_ended():
                for report in child.receive(wire.LATE_MS):
                    self._take(child, report)
                return False

    def _take(self, child: wire.Child, report: wire.Report) -> None:
        if isinstance(report, wire.Events):
            for request_id in self._waiting.deliver(wire.events_of(report)):
                child.send(wire.encode(wire.Abort(request_id)))
        elif isinstance(report, wire.Done):
            done, request, deliver = self._answered(report.number)
            if request and deliver:
                self._waiting.add(request, deliver)
            try:
                result = wire.result_of(report)
            except EngineError as error:  # the message could be read: nobody else is concerned
                settle(done, error=error)
            else:
                settle(done, result)
        elif isinstance(report, wire.Failed):
            settle(self._answered(report.number).done, error=wire.error_of(report.failure))
        elif isinstance(report, wire.Ready):
            self.is_up = True
            if not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(report, wire.Broken):
            child.last_words = wire.error_of(report.failure)
            child.send(wire.encode(wire.Close()))

    def _answered(self, number: int) -> _Asked:
        if number not in self._asked:
            raise EngineError(f"the engine process answered command {number}, which nobody gave; report this")
        return self._asked.pop(number)

    def _give_up(self, reason: str) -> None:
        self.is_up, self.over = False, reason
        self._mailbox.close(reason)
        self._fail_all(reason)
        if not self._ready.done():
            self._ready.set_exception(EngineError(reason))

    def _fail_all(self, reason: str) -> None:
        asked, self._asked = self._asked, {}
        for done, request, _ in asked.values():
            settle(done, error=EngineError(f"request {request.id}: {reason}" if request else reason))
        self._waiting.end_all(reason)


def serve(endpoint: str) -> NoReturn:
    """What the process of an `EngineProcess` does."""
    owner = wire.Owner(endpoint)
    try:
        start = owner.start()
        if start.has_log:
            configure()
        module, _, function = start.factory.partition(":")
        engine = getattr(importlib.import_module(module), function)(**start.arguments)
        owner.send(wire.Ready())
        try:
            _answer(owner, engine)
        finally:
            close_engine(engine)
    except BaseException as error:
        if not isinstance(error, PyrosomeError):  # the owner tells of those
            log.exception("the engine failed")
        owner.send(wire.Broken(wire.failure_of(error)))
        while not isinstance(owner.receive(), wire.Close):
            pass
        owner.leave(1)
    owner.leave(0)


def _answer(owner: wire.Owner, engine: EngineLike) -> None:
    """Carry out commands and step, in one thread, until told to close."""
    waiting = Waiting()
    events: list[Event | News] = []
    while True:
        wait = not engine.has_work
        for _ in range(MOST):
            if (command := owner.receive(wait=wait)) is None:
                break
            wait = False
            if isinstance(command, wire.Close):
                return
            if isinstance(command, wire.Abort):
                if command.request in waiting:
                    engine.abort(command.request)
                continue
            try:
                if isinstance(command, wire.Add):
                    request = wire.request_of(command)
                    engine.add(request)
                    waiting.add(request, events.extend)
                    result = None
                else:
                    result = engine.call(command.name, **command.arguments)
            except Exception as error:
                owner.send(wire.Failed(command.number, wire.failure_of(error)))
                continue
            try:
                owner.send(wire.done(command.number, result))
            except RequestError as error:
                owner.send(wire.Failed(command.number, wire.failure_of(EngineError(str(error)))))
        if engine.has_work:
            waiting.deliver(engine.step())
            if events:
                owner.send(wire.events_message(events))
                events.clear()


class _Asked(NamedTuple):
    done: Future[Any]
    request: Request | None
    deliver: Deliver | None
