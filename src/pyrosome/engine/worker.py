"""The engine in a thread of its own, for callers in any other; `engine.aio` has one in a process of its own.

Both are a `Driver`: requests, operations and cancellations are carried out between two steps.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from pyrosome.engine.request import Ended, Event, News, PromptLogprobs, Request
from pyrosome.errors import EngineError

log = logging.getLogger(__name__)

CLOSED = "the engine was closed; make another"
FORKED = "the engine belongs to the process that this one was forked from; make another here, or start it by `spawn`"

running: weakref.WeakSet[Driver] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Close every driver of this process, those included that are being made.

    A step must not be cut off by an interpreter that takes its libraries down.
    """
    for driver in list(running):
        driver.close()


def _disown_all() -> None:
    """A fork has its parent's drivers and not their threads: whoever asks one there is told, and waits for nothing."""
    for driver in list(running):
        driver.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


class EngineLike(Protocol):
    """What a driver needs of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> Sequence[Event | News]: ...
    def call(self, name: str, /, **arguments: Any) -> Any: ...
    def close(self) -> None: ...


Deliver = Callable[[list[Event | News]], object]


class Driver(abc.ABC):
    """An engine, wherever it runs.  Everything may be called from any thread.

    Of each completion there is exactly one `Ended`, whatever happens to the engine.  In a fork of its process it only
    raises `EngineError`.

    Attributes:
        is_up: it computes; false while an engine that ended is being made again.
        over: why it never will any more; "": it may.
    """

    is_up = True
    over = ""
    _mailbox: Mailbox

    @abc.abstractmethod
    def add(self, request: Request, deliver: Deliver) -> Future[None]:
        """Hand a request over; done once the engine has taken it, or with what it raised.

        `deliver` is given its events, a step's at a time, by a thread it must not hold up.
        """

    @abc.abstractmethod
    def invoke(self, name: str, /, **arguments: Any) -> Future[Any]:
        """Hand an operation over, plain data in and out."""

    @abc.abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request before the next step; does not wait for it, and does not mind if it has ended."""

    @abc.abstractmethod
    def close(self) -> None:
        """End everything.  Whoever waits is told; what is called later raises `EngineError`."""

    def disown(self) -> None:
        """Take nothing any more, by a new mailbox: a thread that is not in this fork may hold the old one's lock."""
        self._mailbox = Mailbox()
        self._mailbox.close(FORKED)

    def submit(self, request: Request) -> EventStream:
        """A request's events.

        Raises:
            RequestError: what is wrong with the request.
            EngineError: the engine has failed or was closed.
        """
        return EventStream(self, request)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """An operation's result.

        Raises:
            RequestError: there is no such operation, or its arguments do not fit.
            EngineError: the engine has failed or was closed.
        """
        future = self.invoke(name, **arguments)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, while waiting
            future.cancel()
            raise

    def end_unwanted(self, request_id: str, adding: Future[None]) -> None:
        """Abort a request nobody waits for, if it was taken, or as soon as it is."""
        adding.add_done_callback(lambda added: None if added.exception() else self.abort(request_id))


class EventStream:
    """One request's events, as an iterator for one thread; closing or dropping it before the end aborts the request.

    Attributes:
        prompt_logprobs: those of its prompt's tokens that have come, from the second on; all, once it says something.
    """

    def __init__(self, driver: Driver, request: Request) -> None:
        self._driver, self._id, self._open = driver, request.id, request.params.n
        self._events: deque[Event] = deque()
        self.prompt_logprobs: list[dict[int, float]] = []
        # The driver knows the queue alone, so that a stream nobody holds any more is collected.
        self._arrived: queue.SimpleQueue[list[Event | News]] = queue.SimpleQueue()
        self._adding = driver.add(request, self._arrived.put)
        try:
            self._adding.result()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._events:
            if self._open <= 0:
                raise StopIteration
            self._take(self._arrived.get())
        event = self._events.popleft()
        if isinstance(event, Ended):
            self._open -= 1
        return event

    def close(self) -> None:
        """Take no more events; the request is ended if it goes on."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._arrived.get_nowait())
        if self._open > sum(isinstance(e, Ended) for e in self._events):
            self._driver.end_unwanted(self._id, self._adding)
        self._open = 0
        self._events.clear()

    def _take(self, events: list[Event | News]) -> None:
        for e in events:
            if isinstance(e, PromptLogprobs):
                self.prompt_logprobs += e.logprobs
            elif not isinstance(e, News):
                self._events.append(e)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # an interpreter that is ending has taken things down already
            self.close()


class EngineThread(Driver):
    """An engine and the thread that steps it.

    Args:
        engine: an engine, or what makes one, which is then called in that thread.
    """

    def __init__(self, engine: EngineLike | Callable[[], EngineLike]) -> None:
        self._mailbox, self._waiting = Mailbox(), Waiting()
        made: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(engine, made), name="pyrosome-engine", daemon=True)
        self._thread.start()
        try:
            made.result()
        except BaseException:
            self._mailbox.put(None)
            raise
        running.add(self)

    def add(self, request: Request, deliver: Deliver) -> Future[None]:
        def run(engine: EngineLike) -> None:
            engine.add(request)
            self._waiting.add(request, deliver)

        return self._mailbox.put(Job(run))

    def invoke(self, name: str, /, **arguments: Any) -> Future[Any]:
        return self._mailbox.put(Job(lambda engine: engine.call(name, **arguments)))

    def abort(self, request_id: str) -> None:
        def run(engine: EngineLike) -> None:
            if request_id in self._waiting:
                engine.abort(request_id)

        self._mailbox.put(Job(run))

    def close(self) -> None:
        self._mailbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, make: EngineLike | Callable[[], EngineLike], made: Future[None]) -> None:
        try:
            engine = make() if callable(make) else make
        except BaseException as error:
            self._mailbox.close(CLOSED)
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            self._serve(engine)
            reason = CLOSED
        except BaseException as error:  # a step handles its requests' faults itself: this is one of the engine
            log.exception("the engine failed; every request that waits is ended")
            reason = f"the engine failed ({type(error).__name__}: {error}); make another, and report this"
        self.is_up, self.over = False, reason
        self._mailbox.close(reason)
        self._waiting.end_all(reason)
        close_engine(engine)

    def _serve(self, engine: EngineLike) -> None:
        while True:
            for command in self._mailbox.take(wait=not engine.has_work):
                if command is None:
                    return
                command.carry_out(engine)
            if engine.has_work:
                for request_id in self._waiting.deliver(engine.step()):
                    engine.abort(request_id)


def close_engine(engine: EngineLike) -> None:
    """Close an engine that will do nothing more; what goes wrong there is told to the log alone."""
    try:
        engine.close()
    except Exception:
        log.exception("the engine has ended and could not tidy up")


class Job:
    """Something to do in the driver's thread."""

    def __init__(self, run: Callable[[Any], Any], done: Future[Any] | None = None) -> None:
        self.run = run
        self.done: Future[Any] = done or Future()

    def carry_out(self, engine: EngineLike) -> None:
        """Do it and say what came of it."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self.run(engine))
        except BaseException as error:
            self.done.set_exception(error)


def settle(done: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Give a future its result or its error, unless it was cancelled."""
    if not done.set_running_or_notify_cancel():
        return  # nobody waits any more
    if error:
        done.set_exception(error)
    else:
        done.set_result(result)


class Mailbox:
    """Commands on their way to a driver's thread; None asks it to close.  May be used while an object is destroyed."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock, self._reason, self._wake = threading.RLock(), "", wake

    def put(self, command: Job | None) -> Future[Any]:
        """Hand a command over; its future fails if nobody takes commands any more."""
        with self._lock:
            if not self._reason:
                self._queue.put(command)
                self._wake()
            elif command:
                settle(command.done, error=EngineError(self._reason))
        return command.done if command else Future()

    def take(self, *, wait: bool) -> Iterator[Job | None]:
        """The commands there are; with `wait`, at least one."""
        for _ in range(max(wait, self._queue.qsize())):  # no more: a step must come about
            yield self._queue.get()

    def close(self, reason: str) -> None:
        """Take no more; what is left fails."""
        with self._lock:
            self._reason = self._reason or reason
            for command in self.take(wait=False):
                if command:
                    settle(command.done, error=EngineError(self._reason))


class Waiting:
    """Who waits for which completions.  For one thread."""

    def __init__(self) -> None:
        self._requests: dict[str, tuple[Deliver, set[int]]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request, deliver: Deliver) -> None:
        """From now on its events are delivered."""
        self._requests[request.id] = deliver, set(range(request.params.n))

    def deliver(self, events: Sequence[Event | News]) -> list[str]:
        """Hand a step's events out, nothing after a completion's end; returns whose events nobody takes."""
        batches: dict[str, list[Event | News]] = {}
        for event in events:
            known = self._requests.get(event.request)
            if known and (isinstance(event, News) or event.index in known[1]):
                batches.setdefault(event.request, []).append(event)
                if isinstance(event, Ended):
                    known[1].remove(event.index)
        unwanted = []
        for request_id, batch in batches.items():
            deliver, left = self._requests[request_id]
            if not left:
                del self._requests[request_id]
            try:
                deliver(batch)
            except Exception as error:  # a loop that was closed under its tasks
                log.warning("events of request %s could not be delivered (%s)", request_id, error)
                if self._requests.pop(request_id, None):  # else it has ended
                    unwanted.append(request_id)
        return unwanted

    def end_all(self, reason: str) -> None:
        """End every completion with an error."""
        requests, self._requests = self._requests, {}
        for request_id, (deliver, left) in requests.items():
            text = f"request {request_id}: {reason}"
            with contextlib.suppress(Exception):
                deliver([Ended(request_id, i, "error", error=text, error_type="EngineError") for i in sorted(left)])
