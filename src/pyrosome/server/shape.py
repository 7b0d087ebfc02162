"""How a protocol writes an answer: what `openai_chat`, `openai_text`, `responses` and `anthropic` implement."""

from __future__ import annotations

import abc
import json
import math
from typing import Any

import msgspec

from pyrosome.server.exchange import Exchange, Outcome, Said, StillHere
from pyrosome.server.explain import beside
from pyrosome.server.problems import Problem

DONE = b"data: [DONE]\n\n"  # the end of OpenAI's streams, but for responses
KEEP_ALIVE = b": keep-alive\n\n"
_encoder = msgspec.json.Encoder()


def as_json(value: Any) -> bytes:
    """JSON bytes; a lone surrogate, which has no UTF-8 form, becomes a question mark."""
    try:
        return _encoder.encode(value)
    except (UnicodeEncodeError, OverflowError):  # the encoder writes no integer of more than 64 bits
        return json.dumps(_clean(value), ensure_ascii=False, separators=(",", ":")).encode()


def frame(value: Any, event: str = "") -> bytes:
    """One server-sent event with JSON data."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + as_json(value) + b"\n\n"


class Shape(abc.ABC):
    """One answer in one protocol; streamed (`begin`, `said`..., `end`) or whole.  Knows no sockets.

    Frames are bytes of `text/event-stream`.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.asked, self.outcome = exchange, exchange.asked, exchange.outcome

    def begin(self) -> list[bytes]:
        """Once the engine has taken the request."""
        return []

    @abc.abstractmethod
    def said(self, said: Said) -> list[bytes]:
        """A part of an answer, `Done` included."""

    def still_here(self, here: StillHere) -> list[bytes]:
        """A sign of life while nothing is said."""
        return [KEEP_ALIVE]

    @abc.abstractmethod
    def end(self) -> list[bytes]:
        """After the last part: what closes the stream."""

    @abc.abstractmethod
    def failed(self, problem: Problem) -> list[bytes]:
        """The answer breaks off; the status was 200 already."""

    @abc.abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""

    def told(self) -> dict[str, Any]:
        """What is told beside the protocol's own words: the effective mode and seed, and the cache to who asked."""
        return {"pyrosome": {"mode": self.asked.mode, "seed": self.outcome.seed, **beside(self.outcome)}}


def progress_of(here: StillHere) -> bytes:
    """How far the prompt is, as a comment for people; nothing where that is not known."""
    progress = here.progress
    return f": {progress.computed_tokens} of {progress.prompt_tokens} prompt tokens\n\n".encode() if progress else b""


def fingerprint(outcome: Outcome) -> str:
    """The `system_fingerprint` of an answer: weights, numerics and cache format."""
    return f"fp_{outcome.fingerprint[:16]}"


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
