"""Frozen dataclasses from TOML tables, strictly: a key or value that is not meant is an error that names it.

A field says what it allows in its metadata (`value`); `read` checks a table against the fields, and `to_toml` writes
plain data so that it reads back the same.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from pyrosome.errors import RequestError

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one field takes.  Bounds `low` and `high` are inclusive, `above` and `below` are not."""

    kind: type
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.one_of:
            return " or ".join(map(repr, self.one_of))
        marks = (("from", self.low), ("above", self.above), ("to", self.high), ("below", self.below))
        return " ".join([_NAMES[self.kind], *(f"{word} {bound:g}" for word, bound in marks if bound is not None)])

    def holds(self, found: Any) -> bool:
        """Whether `found` is of the type and within the bounds."""
        if type(found) not in ((int, float) if self.kind is float else (self.kind,)):
            return False
        if self.one_of:
            return found in self.one_of
        if self.kind in (str, bool):
            return True
        return math.isfinite(found) and not (
            (self.low is not None and found < self.low)
            or (self.high is not None and found > self.high)
            or (self.above is not None and found <= self.above)
            or (self.below is not None and found >= self.below)
        )


def value(kind: type, default: Any = MISSING, **bounds: Any) -> Any:
    """A dataclass field that `read` checks; without a default the key must be there."""
    return field(default=default, metadata={"allowed": Allowed(kind, **bounds)})


class Table:
    """One table of a file, with its place in it, so that an error can say where it was found.

    Args:
        found: the table's keys and values.
        path: dotted keys that lead to it, "" for the whole file.
        origin: from a dotted key to what said it: the file, or the override that replaced its value.
    """

    def __init__(self, found: Any, path: str, origin: Callable[[str], str]) -> None:
        self.path, self.origin = path, origin
        if not isinstance(found, Mapping):
            raise self.error("", f"is {found!r}; a table of keys and values is expected")
        self.found = dict(found)

    def key(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def error(self, name: str, problem: str) -> RequestError:
        key = self.key(name)
        return RequestError(f"{self.origin(key)}: {key or 'the recipe'} {problem}")

    def table(self, name: str) -> Table:
        """The table under `name`; an empty one where it is left out."""
        return Table(self.found.get(name, {}), self.key(name), self.origin)

    def tables(self, name: str) -> list[Table]:
        """The array of tables under `name`, which must hold at least one."""
        rows = self.found.get(name)
        if not isinstance(rows, list) or not rows:
            what = "is missing" if rows is None else f"is {rows!r}"
            raise self.error(name, f"{what}; write at least one [[{re.sub(r'[.][0-9]+', '', self.key(name))}]]")
        return [Table(row, f"{self.key(name)}.{at}", self.origin) for at, row in enumerate(rows)]

    def only(self, known: Iterable[str]) -> None:
        """Refuse every key that is not in `known`."""
        known = sorted(known)
        for name in self.found:
            if name not in known:
                raise self.error(name, f"is not known; {nearest(name, known)}")

    def one(self, name: str, allowed: Allowed, default: Any = MISSING) -> Any:
        """The value under `name`, checked; whole numbers become floats where a number is meant."""
        if name not in self.found:
            if default is MISSING:
                raise self.error(name, f"is missing; it is {allowed}")
            return default
        found = self.found[name]
        if not allowed.holds(found):
            raise self.error(name, f"is {found!r}; allowed: {allowed}")
        return float(found) if allowed.kind is float else found


def read(cls: type, table: Table) -> dict[str, Any]:
    """Constructor arguments for those fields of `cls` that were made by `value`."""
    return {f.name: table.one(f.name, f.metadata["allowed"], f.default) for f in fields(cls) if "allowed" in f.metadata}


def nearest(name: str, known: Sequence[str]) -> str:
    """Advice for a name that is not among those known: the one it most resembles, and all of them."""
    close = difflib.get_close_matches(name, known, 1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(known)}"


def plain(found: Any, refuse: Callable[[str], RequestError]) -> Any:
    """Data that JSON, TOML and a generator's arguments can all hold; arrays become tuples."""
    if isinstance(found, list | tuple):
        return tuple(plain(x, refuse) for x in found)
    if isinstance(found, Mapping):
        return {k: plain(x, refuse) for k, x in found.items()}
    if type(found) in (bool, int, str) or (type(found) is float and math.isfinite(found)):
        return found
    raise refuse(f"holds {found!r}; finite numbers, strings, true, false, arrays and tables are allowed")


def listed(found: Any) -> Any:
    """The same data with lists for tuples, as JSON and TOML give it."""
    if isinstance(found, Mapping):
        return {k: listed(x) for k, x in found.items()}
    return [listed(x) for x in found] if isinstance(found, list | tuple) else found


def override(found: dict[str, Any], text: str) -> str:
    """Put "dotted.key=value" into nested tables, in place; returns the dotted key.

    The value is TOML; a bare word is a string.  Numbers in a key count an array's entries from 0.

    Raises:
        RequestError: no "=", a value that looks like TOML and is not, or a key that leads nowhere.
    """
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise RequestError(f"{text!r} was given as an override; write it as key=value, such as optimizer.muon_lr=0.01")
    *path, last = key.split(".")
    at: Any = found
    for depth, name in enumerate(path):
        at = at.setdefault(name, {}) if isinstance(at, dict) else _entry(at, name, path[:depth], text)
    if isinstance(at, dict):
        at[last] = _toml_value(raw.strip(), text)
    else:
        _entry(at, last, path, text)
        at[int(last)] = _toml_value(raw.strip(), text)
    return key


def _entry(array: Any, name: str, path: Sequence[str], text: str) -> Any:
    where = ".".join(path)
    if not isinstance(array, list):
        raise RequestError(f"override {text!r}: {where} is {array!r} and has no keys below it")
    if not name.isascii() or not name.isdigit() or int(name) >= len(array):
        raise RequestError(f"override {text!r}: {where} has entries 0 to {len(array) - 1} and {name!r} was asked for")
    return array[int(name)]


def _toml_value(raw: str, text: str) -> Any:
    try:
        found = tomllib.loads(f"v = {raw}")
        if list(found) == ["v"]:
            return found["v"]
    except tomllib.TOMLDecodeError as error:
        if not raw or raw[0] in "[{\"'":
            raise RequestError(f"override {text!r}: its value is not TOML ({error}); quote it for the shell") from None
    return raw


def to_toml(found: Mapping[str, Any], path: str = "") -> str:
    """Plain data as TOML text: `tomllib.loads(to_toml(d)) == d` for tables of finite plain values."""
    simple, below = [], []
    for name, item in found.items():
        key = f"{path}.{_key(name)}" if path else _key(name)
        if isinstance(item, Mapping):
            below.append(f"\n[{key}]\n{to_toml(item, key)}")
        elif isinstance(item, list) and item and all(isinstance(x, Mapping) for x in item):
            below += [f"\n[[{key}]]\n{to_toml(x, key)}" for x in item]
        else:
            simple.append(f"{_key(name)} = {_inline(item)}\n")
    return "".join(simple + below)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _inline(name)


def _inline(item: Any) -> str:
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_inline(x)}" for k, x in item.items()) + "}"
    if isinstance(item, list | tuple):
        return "[" + ", ".join(map(_inline, item)) + "]"
    return repr(item)
