"""Clients of a server under load: some read, some leave, some send what is no request, some hardly read at all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

LONGEST_S = 240.0  # a request that takes longer is stuck
WORDS = (
    "falcon",
    "river",
    "stone",
    "seven",
    "engine",
    "quiet",
    "harbour",
    "lamp",
    "nine",
    "copper",
    "window",
    "letter",
)
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
ENDS = {
    CHAT: b"data: [DONE]", COMPLETIONS: b"data: [DONE]", MESSAGES: b"message_stop",
    RESPONSES: b"event: response.completed", "": b"event: response.incomplete",
}  # fmt: skip
KINDS = {"stream": 30, "leave": 30, "whole": 10, "malformed": 15, "slow": 7, "look": 8}


@dataclasses.dataclass
class Tally:
    """What came of all requests."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)  # what must not be
    first_byte_s: list[float] = dataclasses.field(default_factory=list)

    def answer(self, kind: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """Count an answer; what a server under load may not say is written down."""
        self.counts[f"{kind} {status}"] += 1
        if status in (429, 503):
            told = _json(body).get("error", {}).get("message")
            if not told or not headers.get("retry-after"):
                self.wrong.append(f"{kind}: {status} without a reason or Retry-After: {body[:200]!r}")
        elif status >= 500 or (kind == "malformed" and status < 400):
            self.wrong.append(f"{kind}: {status} {body[:200]!r}")

    def stream(self, kind: str, path: str, text: bytes) -> None:
        """Count a stream that was read to its end."""
        ends = (ENDS[path], ENDS[""]) if path == RESPONSES else (ENDS[path],)
        is_whole = any(end in text[-4000:] for end in ends)
        self.counts[f"{kind} {'whole' if is_whole else 'cut'}"] += 1
        if not is_whole or b'"error":{' in text:
            self.wrong.append(f"{kind} {path}: the stream ended with {text[-200:]!r}")


async def client(port: int, until: float, seed: int, tally: Tally) -> None:
    """One client: request after request until that moment of the loop's clock."""
    rng, loop = random.Random(seed), asyncio.get_running_loop()
    await asyncio.sleep(rng.random() * 2)
    while loop.time() < until:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        try:
            async with asyncio.timeout(LONGEST_S):
                await _do(kind, port, rng, tally)
        except TimeoutError:
            tally.wrong.append(f"{kind}: not ended after {LONGEST_S:.0f} s")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            tally.counts[f"{kind} {type(error).__name__}"] += 1
            if kind not in ("malformed", "leave", "slow"):
                tally.wrong.append(f"{kind}: the connection ended ({error})")


async def _do(kind: str, port: int, rng: random.Random, tally: Tally) -> None:
    reader, writer = await _connected(port, small=kind == "slow")
    try:
        if kind == "malformed":
            writer.write(rng.choice(MALFORMED)(rng))
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # it may be closed without a word
                tally.answer(kind, *await _answer(reader))
            return
        if kind == "look":
            path = rng.choice(["/health", "/v1/models", "/metrics", "/nowhere"])
            writer.write(head(f"GET {path} HTTP/1.1"))
            tally.answer(kind, *await _answer(reader))
            return
        path, body = a_request(rng, stream=kind != "whole")
        began = asyncio.get_running_loop().time()
        writer.write(post(path, body))
        if kind == "leave" and rng.random() < 0.5:
            await asyncio.sleep(rng.expovariate(2))
            tally.counts["left before the answer"] += 1
            return
        status, headers = await _head(reader)
        tally.first_byte_s.append(asyncio.get_running_loop().time() - began)
        if status != 200 or kind == "whole":
            tally.answer(kind, status, headers, await _body(reader, headers))
        elif kind == "leave":
            for _ in range(rng.randrange(6)):
                await reader.read(200)
            tally.counts["left in the answer"] += 1
        elif kind == "slow":
            for _ in range(rng.randrange(1, 30)):
                await reader.read(16)
                await asyncio.sleep(0.2)
            tally.counts["read slowly and left"] += 1
        else:
            tally.stream(kind, path, await _body(reader, headers))
    finally:
        if rng.random() < 0.3:  # without a goodbye
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort() if rng.random() < 0.3 else writer.close()


def a_request(rng: random.Random, *, stream: bool) -> tuple[str, dict[str, Any]]:
    """A request in one of the protocols: some begin as others do, some are of their own."""
    shared = random.Random(rng.randrange(8))
    text = " ".join(shared.choice(WORDS) for _ in range(shared.randrange(200)))
    text += " " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 40)))
    most, path = rng.randrange(1, 24), rng.choice([CHAT, COMPLETIONS, MESSAGES, RESPONSES])
    turns = [{"role": "user", "content": text}]
    if path == COMPLETIONS:
        return path, {"prompt": text, "max_tokens": most, "stream": stream}
    if path == RESPONSES:
        return path, {"input": text, "max_output_tokens": most, "stream": stream}
    body: dict[str, Any] = {"messages": turns, "max_tokens": most, "stream": stream}
    if path == CHAT and rng.random() < 0.2:
        body |= {"response_format": {"type": "json_object"}, "thinking": {"type": "disabled"}, "n": 2}
        body["messages"] = [{"role": "user", "content": "json " + text}]
    return path, body


def head(line: str, *headers: str) -> bytes:
    """A head."""
    return "\r\n".join([line, "Host: 127.0.0.1", *headers, "", ""]).encode()


def post(path: str, body: Any, *headers: str) -> bytes:
    """A request with a JSON body, or with these bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    about = "Content-Type: application/json", f"Content-Length: {len(data)}"
    return head(f"POST {path} HTTP/1.1", *about, *headers) + data


def _cut(rng: random.Random) -> bytes:
    path, body = a_request(rng, stream=True)
    data = json.dumps(body).encode()
    return post(path, data[: rng.randrange(1, len(data) - 1)])


def _flipped(rng: random.Random) -> bytes:
    path, body = a_request(rng, stream=True)
    field = {COMPLETIONS: "prompt", RESPONSES: "input"}.get(path, "messages")
    return post(path, {**body, field: rng.choice([5, [[]], {"a": 1}])})


MALFORMED: tuple[Callable[[random.Random], bytes], ...] = (
    _cut,
    _flipped,
    lambda rng: post(CHAT, rng.randbytes(300)),
    lambda rng: post(CHAT, b"[" * 20_000),
    lambda rng: post(CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": -rng.randrange(9)}),
    lambda rng: post(CHAT, {"messages": [{"role": "user", "content": "a" * 2_000_000}]}),
    lambda rng: head(f"POST {CHAT} HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked") + b"abc",
    lambda rng: head(f"GET /{'a' * 100_000} HTTP/1.1"),
    lambda rng: rng.randbytes(100) + b"\r\n\r\n",
    lambda rng: b"\x16\x03\x01" + rng.randbytes(50) + b"\r\n\r\n",
)


async def _connected(port: int, *, small: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    made = socket.socket()
    if small:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=made, limit=2048 if small else 1 << 20)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    status, headers = await _head(reader)
    return status, headers, await _body(reader, headers)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = bytearray()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return bytes(body)


async def asked(port: int, path: str) -> dict[str, Any]:
    """A JSON answer to a GET."""
    reader, writer = await _connected(port, small=False)
    try:
        writer.write(head(f"GET {path} HTTP/1.1"))
        return _json((await _answer(reader))[2])
    finally:
        writer.close()


class Caller:
    """A connection that is kept, for one request after the other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None

    async def first_byte_s(self, path: str, body: dict[str, Any]) -> float:
        """Seconds from sending to the first part of an answer's text; the rest is read too."""
        if self._reader is None:
            self._reader, self._writer = await _connected(self._port, small=False)
        loop = asyncio.get_running_loop()
        began, first = loop.time(), 0.0
        self._writer.write(post(path, body))
        status, _ = await _head(self._reader)
        if status != 200:
            raise RuntimeError(f"{path} was answered {status}")
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunk = await self._reader.readexactly(size + 2)
            first = first or (loop.time() - began if b'"text":"' in chunk else 0.0)
        await self._reader.readexactly(2)
        return first

    def close(self) -> None:
        """End the connection."""
        if self._reader:
            self._writer.close()


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
