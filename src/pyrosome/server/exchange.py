"""One generating request, from its admission to its line in the usage ledger.

Whatever happens to it (it ends, fails, its client leaves, the server shuts down) the engine stops working on it within
a step, its place and its ticket are given back, and exactly one line is written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pyrosome.answer import Reader, TokenLog
from pyrosome.chat.events import Done, Event, Message, ReasoningDelta, Usage
from pyrosome.engine.aio import AsyncEventStream
from pyrosome.engine.request import Ended, Progress, PromptLogprobs, Request, Reuse, Timeline, TokenEvent
from pyrosome.errors import PyrosomeError
from pyrosome.output import fault_of
from pyrosome.server import arrival
from pyrosome.server.caller import Caller, Entry, Ticket
from pyrosome.server.problems import Problem, Refused, shape_of, where
from pyrosome.server.service import Service

log = logging.getLogger(__name__)

GOODBYE_S = 1.0  # what a client may take to read that the server ends


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """A part of one of the answers, with the tokens it is made of where their log probabilities were asked for."""

    index: int
    event: Event
    tokens: Sequence[TokenLog] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StillHere:
    """Nothing was said for a while: how far the prompt is, if that is known."""

    progress: Progress | None
    waited_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A request as its route understood it.  `request.id` is the exchange's."""

    request: Request
    readers: tuple[Reader, ...]  # one for each completion
    caller: Caller
    path: str
    protocol: str
    model: str  # its name in the answer
    mode: str
    body: dict[str, Any]


@dataclasses.dataclass
class Outcome:
    """All that came of it."""

    asked: Asked
    created: int  # seconds since 1970
    fingerprint: str
    dones: list[Done | None]
    status: str = ""
    error: PyrosomeError | None = None
    progress: Progress | None = None  # with its prompt, where it was told last
    reuse: Reuse = dataclasses.field(default_factory=Reuse)
    timelines: list[Timeline] = dataclasses.field(default_factory=list)
    logs: list[list[tuple[str, TokenLog]]] = dataclasses.field(default_factory=list)  # ("content"|"reasoning", token)
    prompt_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    arrived: float = 0.0  # of time.monotonic
    first_token: float | None = None
    first_token_estimate_s: float = 0.0  # from its opening, made where there is a deadline; 0: not known
    ended: float = 0.0
    explains: bool = False  # its client wants to know how the cache was used

    @property
    def id(self) -> str:
        """The request's id."""
        return self.asked.request.id

    @property
    def seed(self) -> int | None:
        """The seed it ran with."""
        return self.asked.request.params.seed

    @property
    def messages(self) -> list[Message]:
        """The answers, once all have ended."""
        return [d.message for d in self.dones if d]

    @property
    def usage(self) -> Usage:
        """Of all completions together, whose prompt was computed once."""
        each = [d.usage for d in self.dones if d]
        prompt = len(self.asked.request.ids)
        return Usage(
            each[0].prompt_tokens if each else prompt,
            sum(u.completion_tokens for u in each),
            sum(u.reasoning_tokens for u in each),
            self.reuse.reused_tokens,
        )


class Exchange:
    """A request that was admitted; `open` it, take its `batches`, and `close` it whatever happens."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service, self.asked = service, asked
        self.id = asked.request.id
        self.outcome = Outcome(
            asked, int(time.time()), service.card.fingerprint, [None] * len(asked.readers),
            logs=[[] for _ in asked.readers], arrived=time.monotonic(),
        )  # fmt: skip
        self._left = set(range(len(asked.readers)))
        self._num_tokens = [0] * len(asked.readers)
        self._stream: AsyncEventStream | None = None
        self._ticket: Ticket | None = None
        self._running: Any = None
        self._task: asyncio.Task[Any] | None = None
        self._last_token: dict[int, float] = {}  # when each completion's came, of time.monotonic
        self._started = time.time()
        self._is_inside = self.is_shutting_down = False
        self._settling: asyncio.Task[None] | None = None
        self._submitted = 0.0  # of time.monotonic
        self._arrival = arrival.of_this_request()
        self.outcome.explains = self._arrival.explains
        self._deadline, self._deadline_s = self._arrival.until(service.options.deadline_s)
        self._write_s, self.keep_alive_s = service.options.write_s, service.options.keep_alive_s
        self.error_shape = shape_of(asked.path)

    async def open(self) -> None:
        """Have it admitted and taken by the engine.

        Raises:
            Refused: 402, 429, 503, or 504 where it cannot be in time.
            RequestError: what the engine finds wrong with it.
        """
        engine, asked = self._service.engine, self.asked
        self._service.gate.enter(asked.caller.account)
        self._is_inside = True
        self._running = self._service.running(self)
        self._running.__enter__()
        try:
            if await self._arrival.is_gone():  # while its body was read, or a long prompt rendered
                raise Refused(400, "the connection closed before the request was begun")
            await self._be_in_time()
            self._ticket = await self._service.door.enter(
                asked.caller, self.id, len(asked.request.ids), asked.request.params.max_tokens * len(self._left)
            )
            self._stream, self._submitted = engine.submit(await self.prepared()), time.monotonic()
            await self._accepted(self._stream)
        except BaseException as error:
            self.outcome.status = "abort" if isinstance(error, asyncio.CancelledError) else "error"
            self.outcome.error = error if isinstance(error, PyrosomeError) else None
            await self.close()
            raise
        for watcher in self._service.watchers:
            watcher.taken(self)

    async def prepared(self) -> Request:
        """The request as the engine gets it, once it is admitted."""
        return self.asked.request

    @property
    def limit_headers(self) -> dict[str, str]:
        """What its ticket says of the limits it runs under."""
        return dict(self._ticket.headers) if self._ticket else {}

    async def batches(self) -> AsyncIterator[list[Said] | StillHere]:
        """What is said, as it comes; `Done` of every answer last, when the ledger has its line.

        Raises:
            EngineError: it failed on the way.
            Refused: 504, its deadline has passed.
        """
        assert self._stream
        self._task = asyncio.current_task()
        if self.is_shutting_down:
            raise asyncio.CancelledError
        began, keep_alive_s = time.monotonic(), self.keep_alive_s
        while self._left:
            events = await self._stream.batch(max(0.0, min(keep_alive_s, self._deadline - time.monotonic())))
            said = self._read(events)
            if self._left and time.monotonic() >= self._deadline:
                self.outcome.status = "abort"  # what was said counts, as it does where a client leaves
                raise self._too_late("it is ended where it is")
            if said:
                began = time.monotonic()
                yield said
            elif time.monotonic() - began >= keep_alive_s and self._left:
                yield StillHere(self.outcome.progress, time.monotonic() - self.outcome.arrived)
                began = time.monotonic()
        self._stream.close()  # a stop string, or complete calls, may have come before the engine's end
        done = [Said(i, self._done(i)) for i in range(len(self.asked.readers))]
        await self._settled(self.outcome.messages[0].finish_reason)
        yield done

    def cancel(self) -> None:
        """End it because the server shuts down; its client is told."""
        self.is_shutting_down = True
        if self._task:
            self._task.cancel()

    def refused(self, problem: Problem) -> None:
        """Tell the watchers that it was answered with an error."""
        for watcher in self._service.watchers:
            watcher.refused(self.asked.path, problem)

    async def close(self) -> None:
        """Give back all it holds; to be called at its end, again or not."""
        if self._stream:
            self._stream.close()
        if self._is_inside:
            self._is_inside = False
            took = time.monotonic() - self.outcome.arrived if self.has_begun else None
            self._service.gate.leave(took, self.asked.caller.account)
            self._running.__exit__(None, None, None)
        if self._ticket:
            for i in range(len(self.asked.readers)):
                self._cut_off(i)
            try:
                await self._settled(self.outcome.status or "abort")
            except Exception as error:  # its client was told, or is gone
                log.error("request %s: its line was not written (%s)", self.id, type(error).__name__)

    @property
    def write_s(self) -> float:
        """How long its client may not read what is sent; a server that closes is less patient."""
        return min(GOODBYE_S, self._write_s) if self.is_shutting_down else self._write_s

    @property
    def has_begun(self) -> bool:
        """Whether its first token has come."""
        return self.outcome.first_token is not None

    @property
    def num_logprobs(self) -> int:
        """Tokens whose log probabilities are part of the answer."""
        return len(self.outcome.prompt_logprobs) + sum(map(len, self.outcome.logs))

    @property
    def tokens_to_come(self) -> float:
        """How many tokens of its prompt will probably still be computed."""
        if self.has_begun:
            return 0.0
        progress, prompt = self.outcome.progress, len(self.asked.request.ids)
        if progress:
            return progress.prompt_tokens - progress.computed_tokens
        return self._service.pace.uncached(prompt)

    async def _be_in_time(self) -> None:
        if self._deadline == math.inf:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_late("it had not begun")
        self.outcome.first_token_estimate_s = await arrival.first_token_s(self._service, self.asked.request, left)

    async def _accepted(self, stream: AsyncEventStream) -> None:
        try:
            left = None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())
            async with asyncio.timeout(left):
                await stream.accepted()
        except TimeoutError:
            raise self._too_late("it had not begun") from None

    def _too_late(self, where: str) -> Refused:
        return Refused(504, f"the {self._deadline_s:g} s this request may take are over; {where}")

    def _read(self, events: Sequence[Any]) -> list[Said]:
        self._note_arrivals(events)
        said: list[Said] = []
        for event in events:
            if isinstance(event, Progress):
                self.outcome.progress = event
            elif isinstance(event, PromptLogprobs):
                self.outcome.prompt_logprobs += event.logprobs
            elif isinstance(event, TokenEvent):
                said += self._token(event)
            elif isinstance(event, Ended):
                said += self._ended(event)
        return said

    def _note_arrivals(self, events: Sequence[Any]) -> None:
        now, came = time.monotonic(), dict[int, int]()
        for event in events:
            if isinstance(event, TokenEvent):
                came[event.index] = came.get(event.index, 0) + 1
        for index, num in came.items():
            before = self._last_token.get(index)
            self._last_token[index] = now
            if before is None:  # nobody waited for the first by what came before it
                num, before = num - 1, now
            if num:
                for watcher in self._service.watchers:
                    watcher.waited(num, now - before)

    def _token(self, event: TokenEvent) -> list[Said]:
        if self.outcome.first_token is None:
            self.outcome.first_token = time.monotonic()
        if event.reuse:
            self.outcome.reuse = event.reuse
            self._service.pace.computed(
                event.reuse.prompt_tokens,
                event.reuse.reused_tokens,
                time.monotonic() - self._submitted - event.reuse.waited_s,
            )
        reader = self.asked.readers[event.index]
        if reader.is_over:
            return []
        self._num_tokens[event.index] += not event.is_end_token
        said = self._note(event.index, reader.feed(event))
        if reader.is_over:
            said += self._end(event.index, "stop")
        return said

    def _ended(self, event: Ended) -> list[Said]:
        self.outcome.timelines.append(event.timeline)
        if event.reason == "error":
            self.outcome.status = "error"
            self.outcome.error = fault_of(event)
            raise self.outcome.error
        if not self.outcome.reuse.prompt_tokens:
            self.outcome.reuse = event.reuse
        return self._end(event.index, event.reason)

    def _end(self, index: int, reason: str) -> list[Said]:
        if index not in self._left:
            return []
        self._left.remove(index)
        return self._note(index, self.asked.readers[index].end(reason))

    def _note(self, index: int, read: list[tuple[Event, list[TokenLog]]]) -> list[Said]:
        for event, tokens in read:
            kind = "reasoning" if isinstance(event, ReasoningDelta) else "content"
            self.outcome.logs[index] += [(kind, t) for t in tokens]
        return [Said(index, event, tokens) for event, tokens in read]

    def _done(self, index: int) -> Done:
        done = self.outcome.dones[index]
        if done is None:
            done = self.outcome.dones[index] = self.asked.readers[index].done()
        return done

    def _cut_off(self, index: int) -> None:
        """Take an answer as it is; also where its reader failed, so that what was computed is written down."""
        try:
            self._end(index, "abort")
            self._done(index)
        except Exception as error:
            log.error(
                "request %s: its answer could not be read to the end: %s at\n%s", self.id, type(error).__name__,
                where(error),
            )  # fmt: skip
            usage = Usage(len(self.asked.request.ids), self._num_tokens[index], 0, self.outcome.reuse.reused_tokens)
            self.outcome.dones[index] = Done(Message("", "", (), "abort"), usage)

    async def _settled(self, status: str) -> None:
        """Have it settled, once; that goes on even if whoever waits for it is cancelled."""
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle(status))
            self._service.keep(self._settling)
        await asyncio.shield(self._settling)

    async def _settle(self, status: str) -> None:
        o = self.outcome
        o.status, o.ended = status, time.monotonic()
        first = None if o.first_token is None else (o.first_token - o.arrived) * 1000
        entry = Entry(
            self.id, self.asked.path, self.asked.model, self.asked.mode, status, self._started, o.usage, first,
            (o.ended - o.arrived) * 1000,
        )  # fmt: skip
        try:
            if self._ticket:
                await self._ticket.settle(entry)
        finally:
            for watcher in self._service.watchers:
                watcher.ended(o)
