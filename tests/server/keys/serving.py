"""A server with keys over an engine that says what it is told to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx

from pyrosome.engine.worker import EngineThread
from pyrosome.options import ServerOptions
from pyrosome.server.caller import SCOPES
from pyrosome.server.keys import book
from pyrosome.server.keys.door import KeyDoor
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.store import Store
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, Script, ScriptedEngine, running, saying

BODY = {"messages": [{"role": "user", "content": "? falcon"}], "max_tokens": 50}
TALK = "/v1/chat/completions"


class Guarded:
    """A running server, its store, and clients of it.

    Attributes:
        url: where it is.
        engine: the scripted engine.
        store: its keys and usage.
    """

    def __init__(self, url: str, engine: ScriptedEngine, store: Store, door: KeyDoor) -> None:
        self.url, self.engine, self.store, self.door = url, engine, store, door

    def account(self, name: str = "acc", **terms: Any) -> str:
        """A new account's id."""
        return self.store.write(lambda c: book.create_account(c, time.time(), name, **terms)).id

    def key(
        self, account: str | None = None, scopes: Any = SCOPES, *, name: str = "k", **terms: Any
    ) -> tuple[str, str]:
        """A new key's id and text."""
        of = account or self.account()
        made = self.store.write(lambda c: book.create_key(c, time.time(), of, name, frozenset(scopes), **terms))
        return made[0].id, made[1].text

    def client(self, text: str = "") -> httpx.Client:
        """A client with that key, or with none."""
        headers = {"Authorization": f"Bearer {text}"} if text else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


@contextlib.contextmanager
def guarded(
    store: Store,
    script: Script | None = None,
    *,
    is_needed: bool = True,
    price: Price | None = None,
    **options: Any,
) -> Iterator[Guarded]:
    """Such a server; the store is closed with it."""
    engine = ScriptedEngine(script or saying("let me see</think>it is 51"))
    door = KeyDoor(store, is_needed=is_needed, price=price)
    service = Service(MODEL, ServerOptions(**options), make_driver=lambda: EngineThread(engine), door=door)
    with running(service) as url:
        yield Guarded(url, engine, store, door)
