"""Clients that speak HTTP by hand, so that they can do what no library would."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.connection import Connection, Limits
from pyrosome.server.run import limits_of
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, Script, ScriptedEngine, running

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "? falcon"}]}


def post(body: Any = BODY, path: str = CHAT, *headers: str) -> bytes:
    """A request with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        head(f"POST {path} HTTP/1.1", "Content-Type: application/json", f"Content-Length: {len(data)}", *headers) + data
    )


def head(line: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    """A head."""
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode()


class Wire:
    """One connection."""

    def __init__(self, port: int, *, receive_bytes: int = 0, tls: ssl.SSLContext | None = None) -> None:
        plain = socket.socket()
        if receive_bytes:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        plain.settimeout(20)
        plain.connect(("127.0.0.1", port))
        self.socket = tls.wrap_socket(plain, server_hostname="localhost") if tls else plain
        self.rest = b""

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer, with its whole body."""
        lines = self.until(b"\r\n\r\n").decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.take(size + 2)[:-2]
            self.take(2)
        else:
            body = self.take(int(headers.get("content-length", 0)))
        return int(lines[0].split()[1]), headers, body

    def until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            self._more()
        found, _, self.rest = self.rest.partition(mark)
        return found

    def take(self, size: int) -> bytes:
        while len(self.rest) < size:
            self._more()
        found, self.rest = self.rest[:size], self.rest[size:]
        return found

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError(f"the server closed; there were {self.rest[:200]!r}")
        self.rest += data

    def is_closed(self) -> bool:
        """Whether the server closes, now or soon; what it still sends is passed over."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wired:
    """A server over a scripted engine, and connections to it."""

    def __init__(self, port: int, engine: ScriptedEngine, service: Service, made: list[Connection]) -> None:
        self.port, self.engine, self.service, self._made = port, engine, service, made
        self._open = contextlib.ExitStack()

    @property
    def connections(self) -> list[Connection]:
        """Those that are open, as the server sees them."""
        return [c for c in self._made if c in c.connections]

    def wire(self, **how: Any) -> Wire:
        """A new connection, closed at the end."""
        return self._open.enter_context(Wire(self.port, **how))

    def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """The answer to what is sent over a connection of its own."""
        with Wire(self.port) as wire:
            return wire.send(data).answer()

    def close(self) -> None:
        self._open.close()


@contextlib.contextmanager
def wired(
    script: Script,
    *,
    options: ServerOptions | None = None,
    engine_options: EngineOptions | None = None,
    limits: Limits | None = None,
    door: Any = None,
    **engine: Any,
) -> Iterator[Wired]:
    """A server over a scripted engine, with limits of its connections."""
    said = ScriptedEngine(script, **engine)
    service = Service(MODEL, options, engine_options, make_driver=lambda: EngineThread(said), door=door)
    connections: list[Connection] = []

    def connection(*args: Any, **kwargs: Any) -> Connection:
        connections.append(Connection(*args, **kwargs, limits=limits or limits_of(service.options, 8)))
        return connections[-1]

    with running(service, http=connection) as url:
        made = Wired(int(url.rpartition(":")[2]), said, service, connections)
        try:
            yield made
        finally:
            said.hold.clear()
            made.close()
