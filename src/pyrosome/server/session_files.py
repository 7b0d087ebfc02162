"""Session files that come and go: streamed to disk and from it, never held in memory, and believed in nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyrosome.errors import EngineError
from pyrosome.server.problems import Refused

TYPE = "application/octet-stream"
CHUNK_BYTES = 1 << 20


async def receive_file(request: Request, path: Path, most: int, seconds: float) -> int:
    """Write the body to a new file; its bytes.

    Args:
        seconds: that may pass between two pieces of it.

    Raises:
        Refused: 400, 408, 413, 415 or 503; the file may be there then.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != TYPE:  # whatever else there is, a foreign page could have a browser send without being asked for leave
        raise Refused(415, f"the body is {kind or 'of no type'}; send the file itself, with Content-Type: {TYPE}")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(int(declared), most)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as f:
            return await _write_all(request, f, most, seconds)
    except OSError as error:
        raise Refused(503, f"the file could not be written: {error.strerror}", headers={"Retry-After": "60"}) from None


async def _write_all(request: Request, f: BinaryIO, most: int, seconds: float) -> int:
    waiting, size, parts = bytearray(), 0, request.stream()
    while True:
        try:
            async with asyncio.timeout(seconds):
                part = await anext(parts, None)
        except TimeoutError:
            raise Refused(408, f"{size} bytes of the file came, and then nothing for {seconds:g} s") from None
        except ClientDisconnect:
            raise Refused(400, "the connection closed before the file was complete") from None
        size += len(part or b"")
        if size > most:
            raise _too_large(size, most)
        waiting += part or b""
        if len(waiting) >= CHUNK_BYTES or part is None:
            await asyncio.to_thread(_write, f, bytes(waiting))
            waiting.clear()
            request.state.let_go()
        if part is None:
            await asyncio.to_thread(os.fsync, f.fileno())
            return size


class Download(Response):
    """A file that is open, sent piece by piece; closed at the end, and `held` with it, whatever that end is."""

    def __init__(self, file: BinaryIO, num_bytes: int, name: str, held: contextlib.ExitStack) -> None:
        headers = {
            "content-length": str(num_bytes),
            "content-disposition": f'attachment; filename="{name}"',
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        super().__init__(status_code=200, headers=headers, media_type=TYPE)
        self._file, self._num_bytes, self._held = file, num_bytes, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._num_bytes
            while left and not gone.done():
                piece = await asyncio.to_thread(self._file.read, min(left, CHUNK_BYTES))
                left -= len(piece)
                if not piece:
                    raise EngineError(f"a session file ends {left} bytes before its end")
                # The last bytes end the answer: their client may send the next request as soon as it has them.
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
        finally:
            gone.cancel()
            self._file.close()
            self._held.close()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _write(f: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[f.write(view) :]


def _too_large(size: int, most: int) -> Refused:
    return Refused(413, f"the file has {size:,} bytes or more and {most:,} are left to this account; delete a session")
