"""A scripted engine that has sessions, as the real one has them, and files of theirs that are JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.engine.worker import EngineThread
from pyrosome.errors import CheckpointError, RequestError, SessionBusy, UnknownSession
from pyrosome.options import ServerOptions
from pyrosome.server.caller import ANYBODY, Caller, OpenDoor
from pyrosome.server.problems import Refused
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, Script, ScriptedEngine, running

USER = {"role": "user", "content": "What does the falcon on the tower of the town hall eat in winter, and where?"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}]
THOUGHT = "let me see</think>it is 51"


class RememberingEngine(ScriptedEngine):
    """Attributes: sessions: ids by session.  calls: operations that came, in order."""

    def __init__(self, script: Script, **options: Any) -> None:
        super().__init__(script, **options)
        self.sessions: dict[str, list[int]] = {}
        self.salts: dict[str, str] = {}
        self.calls: list[str] = []
        self._before: dict[str, tuple[str, int]] = {}  # by request: its session, and what that held before
        self._notes: dict[str, Any] = {}

    def forget(self) -> None:
        """Be another engine from now on."""
        self.sessions.clear()

    def add(self, request: Request) -> None:
        if not request.session:
            super().add(request)
            return
        ids = self._find(request.session)
        self._before[request.id] = request.session, len(ids)
        ids += request.ids
        super().add(dataclasses.replace(request, ids=request.ids or tuple(ids)))
        self.requests[-1] = request

    def step(self) -> list[Any]:
        events = super().step()
        for event in events:
            session, before = self._before.get(event.request, ("", 0))
            if session in self.sessions and isinstance(event, TokenEvent):
                self.sessions[session].append(event.token)
            elif session in self.sessions and isinstance(event, Ended):
                del self._before[event.request]
                if event.reason == "error":
                    del self.sessions[session][before:]
        return events

    def call(self, name: str, /, **arguments: Any) -> Any:
        operation = getattr(self, f"_{name}", None)
        if operation is None or not name.startswith("session_"):
            return super().call(name, **arguments)
        self.calls.append(name)
        return operation(**arguments)

    def _find(self, session: str) -> list[int]:
        if session not in self.sessions:
            raise UnknownSession(f"there is no session {session!r}")
        if any(s == session for s, _ in self._before.values()):
            raise SessionBusy(f"session {session} is generating")
        return self.sessions[session]

    def _session_open(self, ids: list[int] = [], salt: str = "") -> str:  # noqa: B006 - never changed
        name = uuid.uuid4().hex
        self.sessions[name], self.salts[name] = list(ids), salt
        return name

    def _session_extend(self, session: str, ids: list[int]) -> int:
        if any(not 0 <= i < 4096 for i in ids):
            raise RequestError("an id is outside the vocabulary")
        self._find(session).extend(ids)
        return len(self.sessions[session])

    def _session_ids(self, session: str) -> list[int]:
        return list(self._find(session))

    def _session_length(self, session: str) -> int:
        return len(self._find(session))

    def _session_fork(self, session: str) -> str:
        return self._session_open(self._find(session), self.salts[session])

    def _session_rewind(self, session: str, num_tokens: int) -> int:
        ids = self._find(session)
        if num_tokens > len(ids):
            raise RequestError(f"{num_tokens} tokens were to be taken back and the session has {len(ids)}")
        del ids[len(ids) - num_tokens :]
        return min(1, len(ids))

    def _session_save(self, session: str, path: str, notes: Any) -> int:
        body = json.dumps({"ids": self._find(session), "notes": notes}).encode()
        Path(path).write_bytes(body)
        return len(body)

    def _session_restore(self, path: str, salt: str = "") -> str:
        try:
            found = json.loads(Path(path).read_bytes())
        except (OSError, ValueError):
            raise CheckpointError(f"the header of {path} is damaged") from None
        name = self._session_open(found["ids"], salt)
        self._notes[name] = found["notes"]
        return name

    def _session_notes(self, session: str) -> Any:
        return self._notes[session]

    def _session_close(self, session: str) -> None:
        self._find(session)
        del self.sessions[session]


@contextlib.contextmanager
def remembering(
    script: Script, folder: Path, *, options: ServerOptions | None = None, door: Any = None, **engine: Any
) -> Iterator[tuple[httpx.Client, RememberingEngine, Service]]:
    """A client of a server over such an engine, which saves below `folder`; the engine, and the service."""
    said = RememberingEngine(script, **engine)
    options = options or ServerOptions(state_path=str(folder))
    service = Service(MODEL, options, make_driver=lambda: EngineThread(said), door=door)
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, said, service


def made(client, **body) -> str:
    """A new session's id."""
    reply = client.post("/v1/sessions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


def turn(client, session: str, **body):
    return client.post(f"/v1/sessions/{session}/generate", json=body)


def shown(client, session: str) -> dict:
    reply = client.get(f"/v1/sessions/{session}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]["message"]


def left(engine) -> list[int]:
    """The ids of the only session the engine has."""
    (ids,) = engine.sessions.values()
    return ids


class Doors(OpenDoor):
    """Everybody's key is their name; what it may do comes behind a colon."""

    async def caller(self, presented: str | None) -> Caller:
        if not presented:
            raise Refused(401, "a key is needed")
        account, _, scopes = presented.partition(":")
        scoped = frozenset(scopes.split(",")) if scopes else ANYBODY.scopes
        return dataclasses.replace(ANYBODY, key=account, account=account, scopes=scoped, salt=f"salt of {account}")


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}
