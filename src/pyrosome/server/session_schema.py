"""Bodies of session requests: what is taken, for the OpenAPI document, and reading it."""

from __future__ import annotations

from typing import Any

import msgspec

from pyrosome.errors import RequestError
from pyrosome.server.problems import Refused
from pyrosome.server.shape import as_json

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
MODE = ("thinking", "enable_thinking", "reasoning_effort", "reasoning", "chat_template_kwargs")
SETTINGS = ("tools", *MODE)  # of a chat completion's body, that a session keeps
MAX_NAME = 200
MAX_DEPTH = 64

_MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"enum": list(ROLES)}, "content": {}},
        "additionalProperties": True,
    },
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_NAME = {"type": "string", "maxLength": MAX_NAME, "description": "For people; sessions are found by their ids."}

_MORE = {
    "messages": {**_MESSAGES, "description": "Of a conversation; a session that is made of them is one."},
    "text": {"type": "string", "description": "Instead of messages: plain text, which is gone on with."},
    "ids": {**_IDS, "description": "Instead of text: its ids."},
}
CREATE = {
    "type": "object",
    "properties": {
        **_MORE,
        "name": _NAME,
        "tools": {"type": "array", "items": {"type": "object"}},
        "thinking": {"description": "As in a chat completion; so are the other ways to ask for a mode."},
        "reasoning_effort": {"type": "string"},
    },
}
EXTEND = {"type": "object", "properties": _MORE}
GENERATE = {
    "type": "object",
    "properties": {
        "messages": {**_MESSAGES, "description": "Only the new ones.  All else is as in a chat completion."},
        "prompt": {"description": "For a session of plain text: more text, or ids.  All else is as in a completion."},
        "stream": {"type": "boolean"},
        "max_tokens": {"type": "integer", "minimum": 1},
    },
    "additionalProperties": True,
}
NAMED = {"type": "object", "properties": {"name": _NAME}}
REWIND = {
    "type": "object",
    "properties": {
        "messages": {"type": "integer", "minimum": 1, "description": "How many of a conversation's last messages go."},
        "tokens": {"type": "integer", "minimum": 1, "description": "How many of a text's last tokens go."},
    },
}
SESSION = {
    "type": "object",
    "required": ["id", "object", "created", "name", "kind", "status", "tokens", "num_messages", "bytes"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "session"},
        "created": {"type": "integer"},
        "name": {"type": "string"},
        "kind": {"enum": ["chat", "text"]},
        "status": {"enum": ["open", "saved", "unusable"]},
        "tokens": {"type": "integer"},
        "num_messages": {"type": "integer"},
        "bytes": {"type": "integer", "description": "Of its file; 0: it is not saved."},
    },
}
LIST = {
    "type": "object",
    "required": ["object", "data", "has_more"],
    "properties": {
        "object": {"const": "list"}, "data": {"type": "array", "items": SESSION}, "has_more": {"type": "boolean"},
    },
}  # fmt: skip


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages, fit to be kept; what else is wrong with them is found when they are rendered.

    Raises:
        Refused: 400.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Refused(400, "messages is a list of objects, each with a role; something else was sent")
    for n, message in enumerate(value):
        if message.get("role") not in ROLES:
            raise Refused(400, f"messages[{n}].role is {message.get('role')!r}; it is one of {', '.join(ROLES)}")
    found: list[dict[str, Any]] = _kept("messages", value)
    return found


def settings_of(body: Any) -> dict[str, Any]:
    """Those fields of a body that a session keeps for every turn.

    Raises:
        Refused: 400.
    """
    if not isinstance(body, dict):
        raise Refused(400, "settings is an object; something else was sent")
    found: dict[str, Any] = _kept("tools", {n: body[n] for n in SETTINGS if body.get(n) is not None})
    return found


def with_settings(body: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A turn's body, with the session's settings where it has none of its own; a mode is one thing, however spelt."""
    if any(body.get(n) is not None for n in MODE):
        settings = {n: v for n, v in settings.items() if n not in MODE}
    return {**settings, **{n: v for n, v in body.items() if v is not None}}


def name_of(value: Any) -> str:
    """A session's name.

    Raises:
        Refused: 400.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise Refused(400, f"name is text of one line, of up to {MAX_NAME} characters; something else was sent")
    return value


def ids_of(value: Any) -> list[int]:
    """Ids of tokens; whether the vocabulary has them is the engine's to say.

    Raises:
        Refused: 400.
    """
    if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise Refused(400, "ids is a list of integers; something else was sent")
    return value


def one_of(body: dict[str, Any], *names: str) -> str:
    """Which of several fields a body has; "": none.

    Raises:
        RequestError: more than one.
    """
    given = [n for n in names if body.get(n) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} were sent together; send one of them")
    return given[0] if given else ""


def _kept(name: str, value: Any) -> Any:
    """JSON that can travel to the engine's process and be read from disk again as it is."""
    if not _is_flat(value, MAX_DEPTH):
        raise Refused(400, f"{name} is nested more than {MAX_DEPTH} deep; make it flatter")
    try:
        try:
            msgspec.msgpack.encode(value)
        except UnicodeEncodeError:  # half of a surrogate pair
            value = msgspec.json.decode(as_json(value))
            msgspec.msgpack.encode(value)
    except OverflowError:
        raise Refused(400, f"{name} holds a number of more than 64 bits, which cannot be kept; send text") from None
    return value


def _is_flat(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    items = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_flat(v, depth - 1) for v in items)
