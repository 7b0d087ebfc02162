"""What all routes share: the model's card, its template, the engine in a process of its own, who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyrosome.chat import Chat
from pyrosome.chat.prompt import Prompt
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.aio import AsyncEngine, EngineProcess
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import Driver
from pyrosome.errors import PyrosomeError
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.caller import Door, OpenDoor
from pyrosome.server.gate import Gate, Pace
from pyrosome.server.problems import Problem, Refused
from pyrosome.server.replay import Replay

if TYPE_CHECKING:
    from pyrosome.server.exchange import Exchange, Outcome

LOADING, READY, RESTARTING, DRAINING, FAILED = "loading", "ready", "restarting", "draining", "failed"
SOON = {"Retry-After": "2"}
LOOK_S = 0.02
GOODBYE_S = 2.5  # at the end, what clients may take to read that it is one
MAX_NAME_CHARS = 256  # of a model's name: each part of an answer repeats it


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The model as clients see it."""

    name: str
    names: tuple[str, ...]
    path: Path
    context_tokens: int  # as the engine can hold
    end_token: int
    begin_token: int
    vocab_size: int
    dialect: str
    mode: str  # of a request that asks for none
    fingerprint: str  # of weights, numerics and row format; "": not known before the engine is there
    created: int


class Watcher(Protocol):
    """Is told what happens; for metrics and logs.  Holds nothing up and raises nothing."""

    def taken(self, exchange: Exchange) -> None:
        """A request was admitted."""

    def waited(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of one completion came together, so long after those before them."""

    def ended(self, outcome: Outcome) -> None:
        """It has ended, whatever became of it."""

    def refused(self, path: str, problem: Problem) -> None:
        """A request got an error for an answer."""


class Service:
    """A model to serve.

    Args:
        model: a directory, or a built-in name.
        make_driver: makes the engine's driver; it is called in a thread, and may take minutes.
        door: who is let in; None: everybody.

    Raises:
        CheckpointError: there is no such model, or it has no usable tokenizer.
    """

    def __init__(
        self,
        model: str,
        options: ServerOptions | None = None,
        engine_options: EngineOptions | None = None,
        *,
        make_driver: Callable[[], Driver],
        door: Door | None = None,
        chat: Chat | None = None,
    ) -> None:
        self.options, self.engine_options = options or ServerOptions(), engine_options or EngineOptions()
        index = open_checkpoint(model)
        self.chat = chat or Chat(index.path, compat=self.options.compat or None, default_thinking=self.options.thinking)
        self.config = config = index.config
        own = self.options.names or (model if model.startswith("builtin:") else Path(model).resolve().name,)
        self.card = ModelCard(
            own[0], own, index.path, config.max_position_embeddings, config.eos_token_id, config.bos_token_id,
            config.vocab_size, self.chat.dialect, self.options.effort if self.options.thinking else "off", "",
            int(time.time()),
        )  # fmt: skip
        self.door: Door = door or OpenDoor()
        self.gate = Gate(self.engine_options.max_sequences, self.options.max_queue)
        self.pace = Pace()
        # The official manner's prompts are the official ones to the last id.
        self.replay = None if self.chat.compat else Replay(self.chat)
        self.watchers: list[Watcher] = [self.replay] if self.replay else []
        self._state, self._reason = LOADING, ""
        self.exchanges: dict[str, Exchange] = {}  # those that run
        # Of what else is open, called at the end.
        self.closers: list[Callable[[], object]] = [self.replay.close] if self.replay else []
        self.hurry = asyncio.Event()  # set: what runs is ended at once when the server closes
        self.driver: Driver | None = None  # of the engine, once it is there
        self.final_stats: Stats | None = None  # what the engine had done, once the server has ended
        self._make_driver = make_driver
        self._engine: AsyncEngine | None = None
        self._kept: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count()
        self._mark = secrets.token_hex(4)  # so that ids are not given again after a restart

    # The engine's life

    async def start(self) -> None:
        """Load the model.  Until it is there, `engine` refuses with 503."""
        try:
            driver = await asyncio.to_thread(self._make_driver)
            engine = AsyncEngine(driver)
            about = await engine.call("about")
            self.card = dataclasses.replace(
                self.card, context_tokens=about["max_context"], fingerprint=about["fingerprint"]
            )
            self.chat.context_tokens = about["max_context"]
            self._engine, self.driver = engine, driver
            self._state = READY if self._state == LOADING else self._state
        except Exception as error:
            self._state, self._reason = FAILED, str(error) or type(error).__name__
            raise

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            Refused: 503 while it is not there.
        """
        if self.state == FAILED:
            raise Refused(503, f"there is no engine: {self.reason}")
        if self.state == RESTARTING:
            raise Refused(503, "the engine ended and is started again; try again in a moment", headers=SOON)
        if self._engine is None:
            raise Refused(503, "the model is being loaded; try again in a moment", headers=SOON)
        return self._engine

    @property
    def state(self) -> str:
        """What the service is doing now."""
        if self.driver and self._state == READY:
            return FAILED if self.driver.over else READY if self.driver.is_up else RESTARTING
        return self._state

    @property
    def reason(self) -> str:
        """Why it has failed, where it has."""
        return self._reason or (self.driver.over if self.driver else "")

    async def drain(self) -> None:
        """Take nothing new, wait for what runs as long as the options say or until there is a `hurry`, then end it.

        Whoever is still being answered is told, if they read it soon.
        """
        self._state = DRAINING
        self.gate.is_closing = True
        until = time.monotonic() + self.options.drain_s
        while self.exchanges and time.monotonic() < until and not self.hurry.is_set():
            await asyncio.sleep(LOOK_S)
        for exchange in list(self.exchanges.values()):
            exchange.cancel()
        until = time.monotonic() + GOODBYE_S
        while (self.exchanges or self._kept) and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)

    async def last_numbers(self) -> None:
        """Have the engine's numbers once more before it ends; without them where it does not tell them soon."""
        if self._engine is None or self.state == FAILED:
            return
        with contextlib.suppress(PyrosomeError, TimeoutError):
            self.final_stats = await asyncio.wait_for(self._engine.call("stats"), GOODBYE_S)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a task that goes on by itself, until it has ended."""
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    async def close(self) -> None:
        """End the engine; its saved state is on disk."""
        if self._engine:
            await self._engine.close()
        self.door.close()
        for close in self.closers:
            close()

    # What routes ask

    def new_id(self, prefix: str) -> str:
        """An id nobody else has."""
        return f"{prefix}{self._mark}{next(self._numbers):08x}{secrets.token_hex(4)}"

    async def render(self, body: dict[str, Any], protocol: str, salt: str) -> Prompt:
        """A request's prompt; rendering a long one holds nobody up.

        Args:
            salt: of whom what the model wrote is put back as it was written; see `Replay`.

        Raises:
            RequestError: what is wrong with the body.
        """
        return await asyncio.to_thread(self._rendered, self._with_default_effort(body, protocol), protocol, salt)

    def _rendered(self, body: dict[str, Any], protocol: str, salt: str) -> Prompt:
        prompt = self.chat.render(body, protocol)
        return self.replay.put_back(salt, prompt) if self.replay else prompt

    def name_for(self, asked: object) -> str:
        """The model's name in an answer.

        Raises:
            Refused: 404 where only this model's own names are answered, and another was asked for.
        """
        if asked is None or asked == "":
            return self.card.name
        if not isinstance(asked, str):
            raise Refused(400, f"model is {json.dumps(asked)[:80]}; a name was expected")
        if len(asked) > MAX_NAME_CHARS:
            raise Refused(400, f"model has {len(asked):,} characters; a name of up to {MAX_NAME_CHARS} was expected")
        if not self.options.any_name and asked not in self.card.names:
            raise Refused(
                404, f"there is no model {asked!r} here; there is {', '.join(self.card.names)}", code="model_not_found"
            )
        return asked

    def _with_default_effort(self, body: dict[str, Any], protocol: str) -> dict[str, Any]:
        """The body with this server's effort, where it is thought about and the client names none."""
        if self.options.effort == "high" or self.chat.compat:
            return body  # the template's own default
        thinking = body.get("thinking")
        kind = thinking.get("type") if isinstance(thinking, dict) else thinking
        is_on = self.options.thinking if kind is None else kind not in (False, "disabled")
        if not is_on:
            return body
        name = {"messages": "output_config", "responses": "reasoning"}.get(protocol)
        if name:
            given = body.get(name)
            if given is None or (isinstance(given, dict) and given.get("effort") is None):
                return {**body, name: {**(given or {}), "effort": self.options.effort}}
        elif not any(body.get(n) for n in ("reasoning_effort", "reasoning", "chat_template_kwargs")):
            return {**body, "reasoning_effort": self.options.effort}
        return body

    @contextlib.contextmanager
    def running(self, exchange: Exchange) -> Iterator[None]:
        """While it runs it is known."""
        self.exchanges[exchange.id] = exchange
        try:
            yield
        finally:
            del self.exchanges[exchange.id]


def engine_process(model: str, engine_options: EngineOptions, **load: Any) -> Callable[[], Driver]:
    """Makes an engine in a process of its own, which shares no Python thread with the server."""
    changed = {
        f.name: value
        for f in dataclasses.fields(engine_options)
        if (value := getattr(engine_options, f.name)) != f.default
    }

    def make() -> Driver:
        return EngineProcess("pyrosome.engine.loaded:open_engine", {"path": model, **load, **changed})

    return make
