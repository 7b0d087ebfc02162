"""A tool call's arguments as JSON text, written while the values are still coming.

A string value is escaped piece by piece and given out at once; so is a JSON object, list or string, as it stands.
What can only be told apart at its end (a number from a word, a wrapper from a parameter) is held until then.
"""

from __future__ import annotations

import json
from typing import Any

from pyrosome.chat.schema import fits, properties

_WRAPPERS = ("arguments", "input")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Arguments:
    """The arguments of one call of the tool `name`; `schema` is its declared parameters, None where unknown."""

    def __init__(self, name: str, schema: Any, *, known: bool) -> None:
        self.name, self.notes, self.num_values = name, list[str](), 0
        self._schema = schema
        self._declared = properties(schema) if known else None
        self._written: list[str] = []
        self._num_taken = 0
        self._keys: set[str] = set()
        self._key, self._kind = "", ""
        self._value: list[str] = []  # of the value being read, while it is held
        self._wrapper: tuple[str, str, str] | None = None  # key, kind and value of what may be a wrapper

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self._written)

    def take(self) -> str:
        """What was written since the last time."""
        new = self._written[self._num_taken :]
        self._num_taken = len(self._written)
        return "".join(new)

    def begin_value(self, key: str, string: str | None) -> None:
        """A parameter's tag was read; `string` is its attribute, None where it has none."""
        self._settle_wrapper()
        self._key = key
        if string is None:
            declared = (self._declared or {}).get(key)
            string = "true" if isinstance(declared, dict) and declared.get("type") == "string" else None
        self._kind = {"true": "text", "false": "json"}.get(string or "", "either")
        if key in _WRAPPERS and self._declared is not None and key not in self._declared and not self.num_values:
            self._wrapper = (key, self._kind, "")
            self._kind = "wrapper"
        elif self._kind == "text":
            self._write_key(key, '"')
        self.num_values += 1

    def add(self, text: str) -> None:
        """More of the value."""
        if self._kind == "text":
            self._written.append(_escaped(text))
        elif self._kind == "streamed":
            self._value.append(text)
            self._written.append(text)
        else:
            self._value.append(text)
            if self._kind == "json" and (start := text.lstrip()):
                # a list, object or string shows itself at its first character
                self._kind = "streamed" if start[0] in '[{"' else "word"
                if self._kind == "streamed":
                    self._write_key(self._key, "".join(self._value))

    def end_value(self) -> None:
        """The value is complete."""
        value = "".join(self._value)
        if self._kind == "text":
            self._written.append('"')
        elif self._kind == "streamed":
            if not _is_json(value):
                self.notes.append(f"the value of {self._key!r} is not JSON")
        elif self._kind == "wrapper" and self._wrapper:
            self._wrapper = (*self._wrapper[:2], value)
        else:
            self._write_key(self._key, self._as_json(value, self._kind))
        self._value, self._kind = [], ""

    def close(self, body: str = "") -> None:
        """The call is complete; `body` is text that stood in the place of parameters."""
        if self._wrapper and self.num_values == 1 and self._fits(self._wrapper[2]):
            self._written.append(self._wrapper[2].strip())
            return
        self._settle_wrapper()
        if self._written:
            self._written.append("}")
        elif body and _is_json(body):
            self._written.append(body.strip())
        else:
            if body:
                self.notes.append(f"the arguments of {self.name} are not JSON")
            self._written.append("{}")

    def cut(self) -> None:
        """The text ends here: write what was held as it stands, and close nothing."""
        if self._kind == "wrapper" and self._wrapper:
            self._kind, self._wrapper = ("text" if self._wrapper[1] == "text" else "word"), None
            self._write_key(self._key, '"' if self._kind == "text" else "")
            value = "".join(self._value)
            self._written.append(_escaped(value) if self._kind == "text" else value)
        elif self._kind in ("json", "word", "either"):
            self._write_key(self._key, "".join(self._value))
        else:
            self._settle_wrapper()

    def _write_key(self, key: str, value: str) -> None:
        if key in self._keys:
            self.notes.append(f"the parameter {key!r} was given twice")
        separator = ", " if self._keys else "{"
        self._keys.add(key)
        self._written.append(f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}")

    def _settle_wrapper(self) -> None:
        """Not alone, or not fitting: it was a parameter like any other."""
        if self._wrapper:
            key, kind, value = self._wrapper
            self._wrapper = None
            self._write_key(
                key, json.dumps(value, ensure_ascii=False) if kind == "text" else self._as_json(value, kind)
            )

    def _as_json(self, value: str, kind: str) -> str:
        if _is_json(value):
            return value
        if value.strip() in _PYTHON:
            return _PYTHON[value.strip()]
        if kind != "either":
            self.notes.append(f"the value of {self._key!r} is not JSON")
        return json.dumps(value, ensure_ascii=False)

    def _fits(self, value: str) -> bool:
        inner = _loaded(value)
        return isinstance(inner, dict) and fits(inner, self._schema) and set(inner) <= set(self._declared or inner)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are not JSON


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    return _loaded(text) is not None or text.strip() == "null"
