"""Log probabilities that somebody stored, read from a file: `docs/verify-checks.md` says in which forms.

What is wrong with a file is said with its line.  No tokenizer is needed here: tokens stay as they are written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyrosome.errors import RequestError

Token = int | bytes  # an id, or what a token stands for
_LEAST = -9999.0  # stands for the log of nothing where JSON cannot write it
_ABOVE_ZERO = 1e-4  # of a log probability, and of a sum of probabilities: rounding
_OWN = ("ids", "prompt", "tokens", "logprobs", "top_logprobs", "choices", "usage", "request", "response")
_PLAIN_FORM = '{"ids" or "prompt" or "messages", "tokens", "logprobs", "top_logprobs"}'
_API_FORM = '{"request": a request, "response": its answer with log probabilities}'


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of an answer: what was said of it, and of others in its place.

    Attributes:
        logprob: None of a token that is only there to be gone on from.
        tops: other tokens, or this one again, with their log probabilities; ids where the file has ids.
    """

    token: Token
    logprob: float | None
    tops: tuple[tuple[Token, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Vector:
    """One answer to one prompt; of `ids`, `text` and `body` one is there.

    Attributes:
        where: "line 3" of its file.
        ids, text, body: the prompt, as ids, as text after which the answer goes on, or as a chat request's body.
        reasoning: steps of the thoughts before the answer.
        prompt_tokens: of the prompt as whoever answered counted them; 0: not told.
    """

    where: str
    ids: tuple[int, ...] | None
    text: str | None
    body: dict[str, Any] | None
    steps: tuple[Step, ...]
    reasoning: tuple[Step, ...] = ()
    prompt_tokens: int = 0


def read_vectors(path: Path) -> list[Vector]:
    """The vectors of a file: of .json one object or a list of them, of any other name an object on each line.

    Raises:
        RequestError: the file cannot be read, or is none; the message names it and the line (or the record).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"log probabilities were to be read from {path}, which cannot be read ({error})") from None
    found: list[Vector] = []
    for where, record in _records(path, text):
        try:
            found += _vectors(where, record)
        except _Malformed as error:
            raise RequestError(f"{path}, {where}: {error}") from None
    if not found:
        raise RequestError(f"{path} holds no log probabilities; each line is {_PLAIN_FORM}, or {_API_FORM}")
    return found


class _Malformed(ValueError):
    """What is wrong with one record."""


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json":
        value = _json(path, "the file", text)
        yield from ((f"record {n}", v) for n, v in enumerate(value, 1)) if isinstance(value, list) else [("", value)]
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number}", _json(path, f"line {number}", line)


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}, {where}: no JSON ({error}); a file of several lines as one object is .json"
        ) from None


def _vectors(where: str, record: Any) -> Iterator[Vector]:
    if not isinstance(record, dict):
        raise _Malformed(f"{_shown(record)} where an object was expected: {_PLAIN_FORM}, or {_API_FORM}")
    request, response = record.get("request", record), record.get("response", record)
    for name, value in (("request", request), ("response", response)):
        if not isinstance(value, dict):
            raise _Malformed(f"{name} is {_shown(value)}; an object was expected")
    prompt = _prompt(request)
    if "choices" in response:
        choices = response["choices"]
        if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
            raise _Malformed(f"choices is {_shown(choices)}; a list of answers was expected")
        for choice in choices:
            steps, reasoning = _of_choice(choice)
            yield Vector(where, *prompt, steps, reasoning, _count(response.get("usage")))
        return
    steps = _steps(_list(record, "tokens"), _list(record, "logprobs"), record.get("top_logprobs"))
    yield Vector(where, *prompt, steps)


def _prompt(request: dict[str, Any]) -> tuple[tuple[int, ...] | None, str | None, dict[str, Any] | None]:
    given = [name for name in ("ids", "prompt", "messages") if name in request]
    if len(given) != 1:
        raise _Malformed(f"it has {' and '.join(given) or 'no prompt'}; one of ids, prompt and messages was expected")
    value = request[given[0]]
    if given[0] == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
            raise _Malformed(f"messages is {_shown(value)}; a list of messages was expected")
        return None, None, {k: v for k, v in request.items() if k not in _OWN}
    if given[0] == "prompt" and isinstance(value, str):
        return None, value, None
    if not isinstance(value, list) or not value or not all(_is_id(i) for i in value):
        raise _Malformed(f"{given[0]} is {_shown(value)}; a list of token ids, at least one, was expected")
    return tuple(value), None, None


def _of_choice(choice: dict[str, Any]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """(answer, thoughts) of one choice of a chat completion or of a completion."""
    logs = choice.get("logprobs")
    if not isinstance(logs, dict):
        raise _Malformed(f"a choice's logprobs is {_shown(logs)}; ask for logprobs when recording")
    if "tokens" in logs:
        return _steps(_list(logs, "tokens"), _list(logs, "token_logprobs"), logs.get("top_logprobs")), ()
    reasoning = logs.get("reasoning_content") or []
    content = logs.get("content") or []
    if not isinstance(reasoning, list) or not isinstance(content, list) or not (reasoning or content):
        raise _Malformed("a choice's logprobs has no list content, nor tokens; ask for logprobs when recording")
    return tuple(map(_entry, content)), tuple(map(_entry, reasoning))


def _entry(entry: Any) -> Step:
    """{"token", "logprob", "bytes", "top_logprobs"} of a chat completion."""
    tops = entry.get("top_logprobs") if isinstance(entry, dict) else None
    if tops is not None and not isinstance(tops, list):
        raise _Malformed(f"top_logprobs is {_shown(tops)}; a list was expected")
    return _checked(Step(*_pair(entry), tuple(map(_pair, tops or []))))


def _pair(entry: Any) -> tuple[Token, float]:
    if not isinstance(entry, dict) or "token" not in entry or "logprob" not in entry:
        raise _Malformed(f"{_shown(entry)} where a token with its logprob was expected")
    raw = entry.get("bytes")
    if raw is not None:
        if not isinstance(raw, list) or not all(_is_id(b) and b < 256 for b in raw):
            raise _Malformed(f"bytes is {_shown(raw)}; a list of numbers from 0 to 255 was expected")
        return bytes(raw), _logprob(entry["logprob"])
    return _token(entry["token"]), _logprob(entry["logprob"])


def _steps(tokens: list[Any], logprobs: list[Any], tops: Any) -> tuple[Step, ...]:
    """Of parallel lists, as in a completion."""
    if not tokens or len(tokens) != len(logprobs):
        raise _Malformed(
            f"{len(tokens)} tokens and {len(logprobs)} logprobs; as many of both, at least one, were expected"
        )
    if tops is None:
        tops = [None] * len(tokens)
    if not isinstance(tops, list) or len(tops) != len(tokens):
        raise _Malformed(
            f"top_logprobs is {_shown(tops)}; a list with an item for each of {len(tokens)} tokens was expected"
        )
    return tuple(
        _checked(Step(_token(t), None if p is None else _logprob(p), _tops(top, by_id=_is_id(t))))
        for t, p, top in zip(tokens, logprobs, tops, strict=True)
    )


def _tops(tops: Any, *, by_id: bool) -> tuple[tuple[Token, float], ...]:
    """Others of one step: an object, of ids as text where tokens are ids, or a list of pairs or of entries."""
    if tops is None:
        return ()
    if isinstance(tops, dict):
        return tuple((int(t) if by_id and t.isdecimal() else _token(t), _logprob(p)) for t, p in tops.items())
    if not isinstance(tops, list):
        raise _Malformed(f"{_shown(tops)} among top_logprobs; tokens with their logprobs were expected")
    if all(isinstance(t, list) and len(t) == 2 for t in tops):
        return tuple((_token(t), _logprob(p)) for t, p in tops)
    return tuple(map(_pair, tops))


def _checked(step: Step) -> Step:
    total = math.fsum(math.exp(p) for p in dict(step.tops).values())
    if total > 1 + _ABOVE_ZERO:
        raise _Malformed(
            f"the probabilities beside {_shown(step.token)} sum to {total:.4f}; logarithms to base e were expected"
        )
    return step


def _token(token: Any) -> Token:
    """An id, or a token's text; one that is no text by itself is spelled by its bytes."""
    if _is_id(token):
        return int(token)
    if not isinstance(token, str):
        raise _Malformed(f"a token is {_shown(token)}; an id or its text was expected")
    text = token.removeprefix("bytes:")
    if re.fullmatch(r"(\\x[0-9a-f]{2})+", text):
        return bytes.fromhex(text.replace("\\x", ""))
    return token.encode("utf-8", "replace")


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > _ABOVE_ZERO:
        raise _Malformed(f"a logprob is {_shown(value)}; a number of 0 or less was expected")
    return max(float(value), _LEAST)


def _count(usage: Any) -> int:
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return int(tokens) if _is_id(tokens) else 0  # type: ignore[arg-type]


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise _Malformed(f"{name} is {_shown(value)}; a list was expected")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
