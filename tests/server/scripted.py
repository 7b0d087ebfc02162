"""A server over an engine that says what it is told to: for everything about protocols, and nothing about the model.

The engine follows a script: a function of the request that gives the ids of each completion, so that answers with
thoughts, tool calls or broken markup are to be had at once, token by token, with the built-in model's tokenizer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2 as httpx

from pyrosome.chat import Chat, Tokenizer
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.request import Ended, Progress, PromptLogprobs, Request, Reuse, Timeline, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.engine.worker import EngineThread
from pyrosome.errors import EngineError, RequestError
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.run import Server, config_of
from pyrosome.server.service import READY, Service

MODEL = "builtin:nano"
TOKENIZER = Tokenizer.from_dir(open_checkpoint(MODEL).path)
EOS = TOKENIZER.id_of("<｜end▁of▁sentence｜>")

Script = Callable[[Request], Sequence[Sequence[int]]]


def written(text: str) -> list[int]:
    """The ids of an answer, control tokens spelled out, with its end."""
    return [*TOKENIZER.encode(text, allow_special=True), EOS]


def saying(*texts: str) -> Script:
    """A script: these texts, one for each completion, the last for all others."""
    return lambda request: [written(texts[min(i, len(texts) - 1)]) for i in range(request.params.n)]


class ScriptedEngine:
    """One token of each completion in a step.

    Attributes:
        script: what is said; may be changed between requests.
        requests: all that came.
        aborted: ids of those ended from outside.
        steps: so many were done.
        at_once: tokens of each completion in a step.
        prompt_steps: steps that a prompt takes before its first token; each tells its progress where that is wanted.
        hold: while it is set, no step is done.
        fail: raises in the next step's request with this message, once.
    """

    def __init__(self, script: Script, *, step_s: float = 0.0, prompt_steps: int = 0) -> None:
        self.script, self.step_s, self.prompt_steps = script, step_s, prompt_steps
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.steps = 0
        self.fail = ""
        self.at_once = 1
        self.hold = threading.Event()
        self._open: dict[str, dict[str, Any]] = {}
        self._aborting: set[str] = set()

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def add(self, request: Request) -> None:
        if not request.ids:
            raise RequestError("the prompt is empty")
        self.requests.append(request)
        said = [list(ids) for ids in self.script(request)]
        self._open[request.id] = {"request": request, "said": said, "at": 0, "prompt": self.prompt_steps,
                                  "open": set(range(request.params.n)), "began": time.monotonic()}  # fmt: skip

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._aborting.add(request_id)

    def step(self) -> list[Any]:
        while self.hold.is_set() and not self._aborting:
            time.sleep(0.001)
        if self.step_s:
            time.sleep(self.step_s)
        self.steps += 1
        events: list[Any] = []
        for name, state in list(self._open.items()):
            for _ in range(self.at_once):
                events += self._advance(name, state) if state["open"] else []
            if not state["open"]:
                del self._open[name]
        self._aborting.clear()
        return events

    def _advance(self, name: str, state: dict[str, Any]) -> list[Any]:
        request: Request = state["request"]
        if name in self._aborting:
            return self._end(state, set(state["open"]), "abort")
        if self.fail:
            message, self.fail = self.fail, ""
            return self._end(state, set(state["open"]), "error", message)
        if state["prompt"]:
            state["prompt"] -= 1
            done = len(request.ids) * (self.prompt_steps - state["prompt"]) // self.prompt_steps
            return [Progress(name, done, len(request.ids))] if request.progress else []
        at, events = state["at"], []
        if at == 0 and request.params.prompt_logprobs is not None:
            events += _prompt_logprobs(request)
        state["at"] += 1
        reuse = Reuse(len(request.ids), reused_tokens=min(3, len(request.ids) - 1)) if at == 0 else None
        for index in sorted(state["open"]):
            said = state["said"][index]
            if at >= request.params.max_tokens or at >= len(said):
                events += self._end(state, {index}, "length" if at >= request.params.max_tokens else "stop")
                continue
            token = said[at]
            logprobs = {} if request.params.logprobs is None else {token: -0.25, 5: -1.5}
            events.append(TokenEvent(name, index, token, logprobs, token == EOS, reuse))
            if token == EOS:
                events += self._end(state, {index}, "stop")
            elif at + 1 >= request.params.max_tokens:
                events += self._end(state, {index}, "length")
        return events

    def _end(self, state: dict[str, Any], indexes: set[int], reason: str, error: str = "") -> list[Any]:
        request: Request = state["request"]
        state["open"] -= indexes
        kind = EngineError.__name__ if error else ""
        reuse = Reuse(len(request.ids), reused_tokens=min(3, len(request.ids) - 1))
        line = Timeline(state["began"], state["began"], state["began"], time.monotonic())
        return [Ended(request.id, i, reason, state["at"], reuse, line, error, kind) for i in sorted(indexes)]

    def call(self, name: str, /, **arguments: Any) -> Any:
        if name == "about":
            return {"fingerprint": "f" * 64, "max_context": 1 << 20, "max_sequences": 8, "drafter": "NoDrafts",
                    "kv_format": "fp8", "numerics": "trained"}  # fmt: skip
        if name == "stats":
            return Stats(num_pages={4: 8, 128: 2}, free_pages={4: 8, 128: 2}, running=len(self._open))
        raise RequestError(f"there is no operation {name!r}")

    def close(self) -> None:
        pass


def _prompt_logprobs(request: Request) -> list[PromptLogprobs]:
    """In two pieces: of the token at position p -p/8, and one other."""
    each = [{t: -p / 8} | ({5: -2.0} if request.params.prompt_logprobs else {}) for p, t in enumerate(request.ids)][1:]
    half = len(each) // 2
    return [PromptLogprobs(request.id, 1, each[:half]), PromptLogprobs(request.id, 1 + half, each[half:])]


@contextlib.contextmanager
def running(service: Service, **uvicorn_options: Any) -> Iterator[str]:
    """The service behind a real socket; its base URL, once it is ready."""
    config = config_of(service, host="127.0.0.1", port=0, **uvicorn_options)
    server = Server(config, service, owns_process=False)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started and service.state == READY)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def scripted(
    script: Script, *, options: ServerOptions | None = None, engine_options: EngineOptions | None = None,
    chat: Chat | None = None, **engine: Any,
) -> Iterator[tuple[httpx.Client, ScriptedEngine, Service]]:
    """A client of a server over a scripted engine, the engine, and the service."""
    said = ScriptedEngine(script, **engine)
    service = Service(MODEL, options, engine_options, make_driver=lambda: EngineThread(said), chat=chat)
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, said, service


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.002)


def events_of(text: str) -> list[tuple[str, str]]:
    """Server-sent events: (name, data), comments left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        name = next((line[7:] for line in lines if line.startswith("event: ")), "")
        data = "\n".join(line[6:] for line in lines if line.startswith("data: "))
        if lines:
            found.append((name, data))
    return found
