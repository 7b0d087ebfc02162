"""Answers bound by a schema, an expression or a grammar, in the spellings of vLLM's clients."""

from __future__ import annotations

import json
from reprlib import repr as shown
from typing import Any

from pyrosome.errors import RequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OLD = "guided_"  # the prefix of each kind's older spelling, as a field of its own


def structured(body: dict[str, Any]) -> tuple[str, str] | None:
    """What a body's `structured_outputs`, or `guided_...` fields, bind the answer to: a `Constraint`'s kind and schema.

    Raises:
        RequestError: they hold several things, or something that is none.
    """
    found = {_OLD + kind: body[_OLD + kind] for kind in KINDS if body.get(_OLD + kind) is not None}
    given = body.get("structured_outputs")
    if given is not None:
        if not isinstance(given, dict):
            raise RequestError(
                f"structured_outputs is {shown(given)}; an object with one of {', '.join(KINDS)} was expected"
            )
        if given.get("structural_tag") is not None:
            raise RequestError("structured_outputs.structural_tag is not supported; declare tools, or send a grammar")
        found |= {f"structured_outputs.{k}": given[k] for k in KINDS if given.get(k) is not None}
    found = {name: value for name, value in found.items() if value is not False}
    if not found:
        return None
    if len(found) > 1:
        raise RequestError(f"{', '.join(found)} were sent; an answer can be bound to one of them")
    ((name, value),) = found.items()
    kind = name.removeprefix(_OLD).rpartition(".")[2]
    if kind == "json_object":
        return "json", ""
    if kind == "json":
        return "json", _schema(name, value)
    if kind == "choice":
        return "lark", _choice(name, value)
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}; text was expected")
    return ("regex", value) if kind == "regex" else ("lark", _lark(name, value))


def _schema(name: str, value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"{name} is text that is not JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise RequestError(f"{name} is {shown(value)}; a JSON Schema was expected")
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError(f"{name} is nested too deep") from None


def _choice(name: str, value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise RequestError(f"{name} is {shown(value)}; a list of texts, none of them empty, was expected")
    return "start: " + " | ".join(json.dumps(v, ensure_ascii=False) for v in value)


def _lark(name: str, value: str) -> str:
    """A grammar as the engine reads it; GBNF and EBNF with `::=` are rewritten."""
    from llguidance.gbnf_to_lark import any_to_lark  # brings native code: loaded when a grammar first comes

    try:
        return str(any_to_lark(value))
    except Exception as error:  # whatever its parser stumbles over
        raise RequestError(f"{name} cannot be read as a grammar: {error}") from None
