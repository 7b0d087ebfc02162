"""The grammar of tool calls: DSML blocks whose parameters fit each tool's JSON Schema, in Lark as llguidance reads it.

A string parameter is raw text up to its closing tag; every other is JSON.  Parameters come in the schema's order,
required ones always, others than those declared only where the schema says so.  Tags are written by the control
token's id, which no text in a grammar can match.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

from pyrosome.errors import RequestError

log = logging.getLogger(__name__)

SPACE = r"[\x20\x0A\x0D\x09]{0,32}"  # between JSON's parts: room for indentation, none for running on for ever
_OTHER_TYPES = ["object", "array", "number", "boolean", "null"]
_ANYTHING = r"(?s:.*)"
_MAX_DEPTH = 16  # of schemas within schemas, and of references that lead round in a circle
_MAX_SHAPES = 16  # combinations of a schema's alternatives; beyond that any parameters are taken
_OPENINGS = {"inside": "", "tag": '"tool_calls>\\n"', "whole": '"\\n\\n<" {token} "tool_calls>\\n"'}


def tool_grammar(
    tools: str,
    dsml: int,
    *,
    opening: str,
    parallel: bool,
    answer: dict[str, Any] | None = None,
    fault: Callable[[str], str] | None = None,
) -> str:
    """Lark text for calls of `tools` (a JSON list as chat completions have it).

    Args:
        dsml: the id of the token that every tag begins with, after its `<` or `</`.
        answer: JSON of this schema may stand in place of calls.
        opening: "inside" where the block is open already, "tag" just after its first control token, or "whole".
        fault: what is wrong with a Lark text, "" for nothing.  A parameter whose schema cannot be expressed is then
            held to its type alone, and that is logged; without `fault` all of it is written down.

    Raises:
        RequestError: no tools, a tool without a name, or one whose parameters are no schema.
    """
    functions = _functions(tools)
    g = _Grammar(dsml, fault)
    call = g.rule(" | ".join(g.call(i, f) for i, f in enumerate(functions)))
    # The line's end belongs to the call: as the beginning of the closing tag it would be taken for that alone.
    start = f"start: {_OPENINGS[opening].format(token=g.token)} {call}{'+' if parallel else ''} "
    start += f'"</" {g.token} "tool_calls>"'
    if answer is not None:
        start += f" | %json {_guided(answer)}"
    return "%llguidance {}\n" + "\n".join([start, *(f"{name}: {body}" for body, name in g.rules.items())]) + "\n"


class _Grammar:
    """Rules by their text, so that equal ones are one."""

    def __init__(self, dsml: int, fault: Callable[[str], str] | None) -> None:
        self.token, self.rules, self._fault = f"<[{dsml}]>", dict[str, str](), fault

    def rule(self, body: str, prefix: str = "r") -> str:
        """The name of a rule; with prefix "T" it is matched as one piece, by a regular expression."""
        return self.rules.setdefault(body, f"{prefix}{len(self.rules)}")

    def call(self, number: int, function: dict[str, Any]) -> str:
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError(f"tool {number} has no name; every tool needs one")
        schema = function.get("parameters") or {}
        if not isinstance(schema, dict):
            raise RequestError(f"the parameters of tool {name!r} are {schema!r}; a JSON Schema object was expected")
        bodies = [self._body(name, shape, schema) for shape in _shapes(schema, schema)]
        tag = _literal(f'invoke name="{_in_tag(name)}">\n')
        return self.rule(f'"<" {self.token} {tag} ({" | ".join(dict.fromkeys(bodies))}) "</" {self.token} "invoke>\\n"')

    def _body(self, tool: str, shape: dict[str, Any], root: dict[str, Any]) -> str:
        declared, required = shape["properties"], shape["required"]
        parts = []
        for key in dict.fromkeys([*declared, *required]):
            if declared.get(key) is not False:
                rule = self._parameter(tool, key, _literal(_in_tag(key)), declared.get(key, {}), root)
                parts.append(rule if key in required else f"{rule}?")
        others = shape.get("additionalProperties", not declared)
        if others is not False or shape.get("patternProperties"):
            other = r'/[^"<>\x00-\x1f]{1,64}/'
            if declared:
                other += f" & ~({' | '.join(map(_literal, declared))})"
            parts.append(self._parameter(tool, "", self.rule(other, "T"), others or {}, root) + "*")
        return " ".join(parts) or '""'

    def _parameter(self, tool: str, key: str, name: str, schema: Any, root: dict[str, Any]) -> str:
        texts, others = _split(schema, root)
        if not texts and not others:
            texts, others = _split({}, root)
        forms = [f'"true\\">" {self._text(tool, key, s)}' for s in texts]
        forms += [f'"false\\">" {self._json(tool, key, s, root)} "</"' for s in others]
        either = " | ".join(dict.fromkeys(forms))
        return self.rule(
            f'"<" {self.token} "parameter name=\\"" {name} "\\" string=\\"" ({either}) {self.token} "parameter>\\n"'
        )

    def _text(self, tool: str, key: str, schema: dict[str, Any]) -> str:
        """A string's raw text with the `</` after it: what follows, a control token, cannot be part of the text."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            return self.rule(" | ".join(_literal(f"{v}</") for v in values), "T")
        parts = []
        if isinstance(schema.get("pattern"), str):
            parts.append(f"/{_searching(schema['pattern'])}/")
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        if low or high != "":
            parts.append(f"/(?s:.){{{low},{high}}}/")
        whole = " & ".join(parts) or f"/{_ANYTHING}/"
        body = f'({whole}) "</"'
        if parts and self._is_refused(tool, key, f"start: TEXT\nTEXT: {body}"):
            body = f'(/{_ANYTHING}/) "</"'
        return self.rule(body, "T")

    def _json(self, tool: str, key: str, schema: Any, root: dict[str, Any]) -> str:
        body = f"%json {_guided(_within(schema, root))}"
        if self._is_refused(tool, key, f"start: {body}"):
            kinds = schema.get("type", _OTHER_TYPES) if isinstance(schema, dict) else _OTHER_TYPES
            body = f"%json {_guided({'type': kinds})}"
            if self._is_refused(tool, key, f"start: {body}"):
                body = f"%json {_guided({'type': _OTHER_TYPES})}"
        return self.rule(body)

    def _is_refused(self, tool: str, key: str, grammar: str) -> bool:
        reason = self._fault("%llguidance {}\n" + grammar) if self._fault else ""
        if reason:
            log.warning("tool %r: the schema of %r is held to its type alone: %s", tool, key or "others", reason)
        return bool(reason)


def _shapes(schema: Any, root: Any, depth: int = 0) -> list[dict[str, Any]]:
    """The alternatives of an object's schema: each with properties, required, and what it says of others."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return [{"properties": {}, "required": []}]
    shape = {k: schema[k] for k in ("additionalProperties", "patternProperties") if k in schema}
    properties, required = schema.get("properties"), schema.get("required")
    shape["properties"] = properties if isinstance(properties, dict) else {}
    shape["required"] = [k for k in required if isinstance(k, str)] if isinstance(required, list) else []
    shapes = [shape]
    parts = [[s] for s in _list(schema.get("allOf"))] + [_list(schema.get(w)) for w in ("anyOf", "oneOf")]
    for options in filter(None, parts):
        found = [o for s in options for o in _shapes(s, root, depth + 1)]
        shapes = [_merged(a, b) for a in shapes for b in found]
        if len(shapes) > _MAX_SHAPES:
            return [{"properties": {}, "required": []}]
    return shapes


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    properties = {**a["properties"], **b["properties"]}
    return {**a, **b, "properties": properties, "required": list(dict.fromkeys([*a["required"], *b["required"]]))}


def _split(schema: Any, root: Any, depth: int = 0) -> tuple[list[dict[str, Any]], list[Any]]:
    """(what of a schema is for strings, what is for everything else), alternatives one by one."""
    schema = _resolved(schema, root)
    if schema is False:
        return [], []
    if not isinstance(schema, dict) or not schema:
        return [{}], [{"type": _OTHER_TYPES}]
    if depth > _MAX_DEPTH:
        return [], [schema]
    for word in ("anyOf", "oneOf"):
        if options := _list(schema.get(word)):
            rest = {k: v for k, v in schema.items() if k != word}
            found = [_split({**rest, **_resolved(s, root)} if isinstance(s, dict) else s, root, depth + 1)
                     for s in options]  # fmt: skip
            return [t for texts, _ in found for t in texts], [o for _, others in found for o in others]
    if parts := [_resolved(s, root) for s in _list(schema.get("allOf"))]:
        merged = {k: v for s in [schema, *parts] if isinstance(s, dict) for k, v in s.items() if k != "allOf"}
        return _split(merged, root, depth + 1) if merged.get("type") == "string" else ([], [schema])
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or ["string", *_OTHER_TYPES]
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        strings = [v for v in values if isinstance(v, str)] if "string" in kinds else []
        others = [v for v in values if not isinstance(v, str)]
        return ([{"enum": strings}] if strings else []), ([{"enum": others}] if others else [])
    others = [k for k in kinds if k != "string"]
    return ([schema] if "string" in kinds else []), ([{**schema, "type": others}] if others else [])


def _resolved(schema: Any, root: Any) -> Any:
    """A schema with its own reference followed; what stands beside that is kept."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#"):
            break
        at = root
        for part in filter(None, schema["$ref"][1:].split("/")):
            at = at.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            break
        schema = {**at, **{k: v for k, v in schema.items() if k != "$ref"}}
    return schema


def _within(schema: Any, root: dict[str, Any]) -> Any:
    """A part of a schema that stands alone: what it refers to goes with it."""
    if '"$ref"' not in json.dumps(schema):
        return schema
    return {**_moved(schema), "$defs": {"root": _moved(root)}}


def _moved(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_moved(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    is_local = isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#")
    moved = {"$ref": "#/$defs/root" + schema["$ref"][1:]} if is_local else {}
    return {k: moved.get(k, _moved(v)) for k, v in schema.items()}


def _guided(schema: Any) -> str:
    """Keywords that no grammar can express are left out: they are the caller's to check, as ever."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE, "lenient": True}})


def _searching(pattern: str) -> str:
    """A pattern, which in a schema may be found anywhere, as an expression for the whole text, between slashes."""
    branches = []
    for branch in _branches(pattern):
        lead = "" if branch.startswith("^") else _ANYTHING
        is_closed = re.search(r"(?<!\\)(?:\\\\)*\$$", branch) is not None
        body = branch.removeprefix("^")[: -1 if is_closed else None]
        branches.append(f"{lead}(?:{body}){'' if is_closed else _ANYTHING}")
    # A slash or a line's end would end the expression in Lark.
    written = {"/": r"\x2f", r"\/": r"\x2f", "\n": r"\n", "\r": r"\r"}
    return re.sub(r"\\.|[/\n\r]", lambda m: written.get(m[0], m[0]), "|".join(branches), flags=re.DOTALL)


def _branches(pattern: str) -> list[str]:
    """A pattern cut at the bars that stand in no group and no class."""
    branches, depth, in_class = [""], 0, False
    for piece in re.findall(r"\\.|.", pattern, flags=re.DOTALL):
        if piece == "|" and not depth and not in_class:
            branches.append("")
            continue
        branches[-1] += piece
        if in_class:
            in_class = piece != "]"
        elif piece == "[":
            in_class = True
        else:
            depth += {"(": 1, ")": -1}.get(piece, 0)
    return branches


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _in_tag(name: str) -> str:
    if any(ord(c) < 32 or c in '"<>' for c in name):
        raise RequestError(f"a tool or parameter is named {name!r}, which a tag cannot hold; rename it")
    return name


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _functions(tools: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(tools)
    except ValueError as error:
        raise RequestError(f"the tools are not JSON: {error}") from None
    given = found if isinstance(found, list) else [found]
    functions: list[Any] = [t.get("function", t) if isinstance(t, dict) else t for t in given]
    if given is not found or not all(isinstance(f, dict) for f in functions):
        raise RequestError("the tools are no list of objects; give them as chat completions have them")
    if not functions:
        raise RequestError("tool calls were asked for and no tool was given; declare one")
    return functions
