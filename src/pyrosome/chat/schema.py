"""Does a value fit a tool's JSON Schema?  Enough of the standard to tell a call from a mention of one.

Keywords not listed here are taken as fulfilled: a model's answer is refused only for what is surely wrong.
"""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_MAX_DEPTH = 32  # of schemas within schemas, and of references that lead round in a circle


def fits(value: Any, schema: Any, root: Any = None, depth: int = 0) -> bool:
    """Whether `value` (parsed JSON) agrees with `schema`; `$ref` is followed within `root`."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return schema is not False

    def inner(v: Any, s: Any) -> bool:
        return fits(v, s, root, depth + 1)

    if "$ref" in schema and not inner(value, _resolve(schema["$ref"], root)):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        return False
    if not _has_type(value, schema.get("type")):
        return False
    if not all(inner(value, s) for s in _list(schema.get("allOf"))):
        return False
    for either in ("anyOf", "oneOf"):
        options = _list(schema.get(either))
        if options and not any(inner(value, s) for s in options):
            return False
    if isinstance(value, dict):
        return _object_fits(value, schema, inner)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return all(inner(v, schema["items"]) for v in value)
    return True


def properties(schema: Any) -> dict[str, Any] | None:
    """The parameters a tool declares by name; None where its schema does not list them in one place."""
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        return dict(schema["properties"])
    return None


def _object_fits(value: dict[str, Any], schema: dict[str, Any], inner: Any) -> bool:
    declared = properties(schema) or {}
    required = _list(schema.get("required"))
    if any(isinstance(key, str) and key not in value for key in required):
        return False
    others = schema.get("additionalProperties", True)
    if schema.get("patternProperties"):
        others = True
    return all(inner(v, declared[k]) if k in declared else inner(v, others) for k, v in value.items())


def _has_type(value: Any, names: Any) -> bool:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or any(n not in _TYPES for n in names):
        return True
    return any(_is(value, n) for n in names)


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    at = root
    for part in filter(None, reference[1:].split("/")):
        at = at.get(part.replace("~1", "/").replace("~0", "~"), True) if isinstance(at, dict) else True
    return at
