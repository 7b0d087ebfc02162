"""A request's task is cancelled at each of the moments at which it waits: all it holds is given back, once."""

from __future__ import annotations

import asyncio
import gc
import json
import logging

import pytest

from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.app import make_app
from pyrosome.server.caller import OpenDoor
from pyrosome.server.service import READY, Service
from tests.server.books import Ticket
from tests.server.remembering import RememberingEngine
from tests.server.scripted import MODEL, ScriptedEngine, saying

SAY_HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
ASKED = {
    "chat": ("/v1/chat/completions", SAY_HI),
    "stream": ("/v1/chat/completions", {**SAY_HI, "stream": True}),
    "prompts": ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 5}),
    "messages": ("/v1/messages", {**SAY_HI, "stream": True}),
    "deadline": ("/v1/responses", {"input": "hi", "max_output_tokens": 20}),
    "turn": ("/v1/sessions/{}/generate", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}),
}


class Books(OpenDoor):
    """Counts who came in and who was settled; both take a few turns of the loop."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.settled: list[str] = []

    async def enter(self, caller, request, prompt_tokens, max_tokens):
        await asyncio.sleep(0)
        self.entered.append(request)
        return Ticket(self.settle)

    async def settle(self, entry):
        for _ in range(3):
            await asyncio.sleep(0)
        self.settled.append(entry.request)


async def ask(app, path: str, body: dict, headers=(), pauses: int = 0) -> tuple[int, bytes]:
    """One request, without a socket; each part of the answer takes so many turns of the loop to be sent."""
    data = json.dumps(body).encode()
    came = [{"type": "http.request", "body": data, "more_body": False}]
    sent: list[dict] = []

    async def receive():
        if not came:
            await asyncio.Event().wait()
        return came.pop()

    async def send(message):
        for _ in range(pauses):
            await asyncio.sleep(0)
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "query_string": b"",
        "raw_path": path.encode(), "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                    (b"content-length", str(len(data)).encode()), *headers],
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)


async def cancelled_after(turns: int, app, *asked) -> bool:
    """Whether the request was still going on after so many turns of the loop, and was cancelled then."""
    task = asyncio.create_task(ask(app, *asked, pauses=1))
    for turn in range(turns):
        await asyncio.sleep(0 if turn % 4 else 0.0002)  # threads come to their own
    if task.done():
        assert task.result()[0] == 200, task.result()
        return False
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return True


@pytest.mark.parametrize("name", ASKED)
def test_a_request_cancelled_at_any_moment_holds_nothing(name, tmp_path, caplog):
    path, body = ASKED[name]
    headers = [(b"x-request-deadline", b"60")] if name == "deadline" else []
    said = (
        RememberingEngine(saying("</think>hello, you")) if name == "turn" else ScriptedEngine(saying("</think>hello"))
    )
    options = ServerOptions(state_path=str(tmp_path))
    service = Service(MODEL, options, EngineOptions(), make_driver=lambda: EngineThread(said), door=Books())

    async def run():
        app, at = make_app(service), path
        await service.start()
        assert service.state == READY
        if name == "turn":
            made = await ask(app, "/v1/sessions", {})
            at = path.format(json.loads(made[1])["id"])
        num_cancelled = 0
        for turns in [*range(50)] * 2:
            num_cancelled += await cancelled_after(turns, app, at, body, headers)
            for _ in range(2000):
                if not (service.exchanges or service._kept or said.has_work):
                    break
                await asyncio.sleep(0.001)
            assert service.gate.num_inside == 0 and not service.exchanges and not said.has_work
            assert sorted(service.door.settled) == sorted(service.door.entered) == sorted(set(service.door.entered))
        assert num_cancelled >= 6
        status, answer = await ask(app, at, body, headers)
        assert status == 200, answer
        await service.close()

    caplog.set_level(logging.WARNING)
    asyncio.run(asyncio.wait_for(run(), 100))
    gc.collect()  # tasks that were forgotten are told of then
    assert caplog.text == ""
