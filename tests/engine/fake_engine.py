"""An engine without a network: what it says follows from a request's ids, and it fails when told to."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from pyrosome import errors
from pyrosome.engine.request import Ended, Event, News, Progress, PromptLogprobs, Request, Reuse, Timeline, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.errors import ContextTooLong, DoesNotFit, RequestError
from pyrosome.options import SamplingParams

FAILS_IN_STEP, KILLS_IN_STEP, HANGS_IN_STEP = 666, 667, 668  # ids that do


def token_at(ids: tuple[int, ...], index: int, position: int) -> int:
    """What the fake says there."""
    return (sum(ids) * 31 + index * 7 + position) % 1000


def expected(request: Request) -> list[list[int]]:
    """All it says to a request, by completion."""
    p = request.params
    return [[token_at(request.ids, i, at) for at in range(p.max_tokens)] for i in range(p.n)]


def news(request: Request) -> list[News]:
    """What it tells of a prompt first, in a step of its own."""
    ids, found = request.ids, list[News]()
    if request.progress:
        found += [Progress(request.id, n, len(ids)) for n in range(1, len(ids))]
    if request.params.prompt_logprobs is not None:
        found.append(PromptLogprobs(request.id, 1, [{token: -0.25} for token in ids[1:]]))
    return found


def asked(name: str, max_tokens: int = 5, n: int = 1, ids: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(name, ids, SamplingParams(max_tokens=max_tokens, n=n))


class FakeEngine:
    """One token for each completion in each step, after one of news if a request wants to know of its prompt.

    Args:
        step_s: what a step takes.
        fault_at: the step that raises; 0: none.
        kill_at: the step in which the process kills itself; 0: none.
        gate: let through for each step, if there is one.
    """

    def __init__(
        self,
        step_s: float = 0.0,
        fault_at: int = 0,
        kill_at: int = 0,
        closed_path: str = "",
        gate: threading.Semaphore | None = None,
    ) -> None:
        self.step_s, self.fault_at, self.kill_at, self.closed_path, self.gate = (
            step_s,
            fault_at,
            kill_at,
            closed_path,
            gate,
        )
        self.open: dict[str, tuple[Request, set[int]]] = {}
        self.said: dict[str, int] = {}
        self.aborted: list[str] = []  # every abort that came
        self.marked: set[str] = set()
        self.threads: set[int] = set()
        self.steps, self.batches, self.is_closed = 0, [], False

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        if request.id in self.open:
            raise RequestError(f"request id {request.id!r} is in use")
        if not request.ids:
            raise RequestError("no ids")
        if len(request.ids) > 1000:
            raise ContextTooLong(len(request.ids), 1000, "shorten it")
        if request.ids[0] == 404:
            raise KeyError("no such thing")
        self.open[request.id] = request, set(range(request.params.n))
        self.said[request.id] = -1 if request.progress or request.params.prompt_logprobs is not None else 0

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.marked.add(request_id)  # also what is not there: a later request of that id would be hit

    def step(self) -> list[Event | News]:
        self.threads.add(threading.get_ident())
        if self.gate:
            self.gate.acquire()
        self.steps += 1
        if self.steps == self.fault_at:
            raise RuntimeError("a broken step")
        if self.steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step_s:
            time.sleep(self.step_s)
        events: list[Event | News] = []
        for name, (request, left) in list(self.open.items()):
            if request.ids[0] == FAILS_IN_STEP:
                raise RuntimeError("a broken step")
            if request.ids[0] == KILLS_IN_STEP:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.ids[0] == HANGS_IN_STEP:
                time.sleep(600)
            at = self.said[name]
            self.said[name] += 1
            if at < 0 and name not in self.marked:
                events += news(request)
                continue
            at = max(at, 0)
            for index in sorted(left):
                if name in self.marked:
                    events.append(self._end(request, index, "abort", at))
                    continue
                token = token_at(request.ids, index, at)
                events.append(TokenEvent(name, index, token, {token: -0.5}, False))
                if at + 1 == request.params.max_tokens:
                    events.append(self._end(request, index, "length", at + 1))
            if name in self.marked or at + 1 == request.params.max_tokens:
                del self.open[name]
        self.marked.clear()
        self.batches.append(len(events))
        return events

    def _end(self, request: Request, index: int, reason: str, tokens: int) -> Ended:
        reuse = Reuse(len(request.ids), limit="no common prefix")
        return Ended(request.id, index, reason, tokens, reuse, Timeline(arrived=1.5, drafted=(3, 2), accepted=(1, 0)))

    def call(self, name: str, /, **arguments: Any) -> Any:
        if name == "echo":
            return arguments
        if name == "stats":
            stats = Stats(running=len(self.open), num_pages={1: 10, 128: 3})
            stats.step_done(0.3, 4)
            stats.drafts_checked(2, 1)
            return stats
        if name == "state":
            return {"pid": os.getpid(), "open": sorted(self.open), "steps": self.steps, "aborted": self.aborted}
        if name == "raise":
            if arguments["kind"] == "DoesNotFit":
                raise DoesNotFit("a cache", 3 << 30, 1 << 30, "cpu", "take less")
            if arguments["kind"] == "ContextTooLong":
                raise ContextTooLong(12, 10, "shorten it")
            raise getattr(errors, arguments["kind"], ValueError)("as asked")
        if name == "unspeakable":
            return object()
        if name == "misshapen":
            return Stats(requests="many")
        if name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RequestError(f"there is no operation {name!r}")

    def close(self) -> None:
        self.is_closed = True
        if self.closed_path:
            with open(self.closed_path, "a") as f:
                f.write("closed\n")


def make(**options: Any) -> FakeEngine:
    """What a process begins with."""
    return FakeEngine(**options)


def make_none(kind: str) -> FakeEngine:
    """A factory that fails."""
    if kind == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    raise getattr(errors, kind, ValueError)("no engine today")


def make_slowly(path: str, **options: Any) -> FakeEngine:
    """A factory that takes until the file is there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return FakeEngine(**options)


def make_once(path: str, **options: Any) -> FakeEngine:
    """A factory that works the first time alone."""
    with open(path, "a") as f:
        f.write("x")
        if f.tell() > 1:
            raise errors.CheckpointError("the files are gone")
    return FakeEngine(**options)


def make_garbled(**options: Any) -> FakeEngine:
    """A factory after which events leave the process as bytes that mean nothing."""
    from pyrosome.engine import wire

    encode = wire.encode
    wire.encode = lambda message: b"\xc1?" if isinstance(message, wire.Events) else encode(message)
    return FakeEngine(**options)
