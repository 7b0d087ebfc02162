"""Request bodies: bounded, timed, and read as JSON that cannot hurt."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from pyrosome.server.problems import Refused

MOST_VALUES = 4 << 20


async def read_bytes(request: Request, most: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        Refused: 413 where it is larger, 408 where it takes longer.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(int(declared), most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(size, most)
                parts.append(part)
    except TimeoutError:
        raise Refused(
            408, f"{size} bytes of the body came within {seconds:g} s and no end; send it faster, or less of it"
        ) from None
    except ClientDisconnect:
        raise Refused(400, "the connection closed before the body was complete") from None
    return b"".join(parts)


async def read_json(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: 400, 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # A form or plain text is what a foreign page can send from a browser without being asked for leave.
        raise Refused(415, f"the body is {kind or 'of no type'}; send JSON, with Content-Type: application/json")
    return object_of(await read_bytes(request, most, seconds))


def object_of(body: bytes) -> dict[str, Any]:
    """JSON bytes as an object.

    Raises:
        Refused: 400.
    """
    # Each value takes a hundred bytes of memory, whatever it takes to write it.
    if (count := sum(map(body.count, (b",", b"[", b"{")))) > MOST_VALUES:
        raise Refused(400, f"the body has about {count:,} values, and up to {MOST_VALUES:,} are read")
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(400, "the body is nested too deep") from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}; an object was expected")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _too_large(size: int, most: int) -> Refused:
    return Refused(413, f"the body has {size:,} bytes or more and {most:,} are taken; send less")
