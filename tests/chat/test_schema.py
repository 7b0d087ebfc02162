"""Whether a call fits its tool's schema: only what surely does not is refused."""

import pytest

from pyrosome.chat.schema import fits, properties

OBJECT = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]}
LOOP = {"$defs": {"l": {"type": "object", "properties": {"next": {"$ref": "#/$defs/l"}}}}, "$ref": "#/$defs/l"}


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        ({"a": "x"}, OBJECT, True),
        ({"a": "x", "n": 1.0, "other": None}, OBJECT, True),
        ({"a": "x", "other": None}, {**OBJECT, "additionalProperties": False}, False),
        ({"a": "x", "other": 1}, {**OBJECT, "additionalProperties": {"type": "string"}}, False),
        ({"n": 1}, OBJECT, False),
        ({"a": 1}, OBJECT, False),
        ({"a": "x", "n": 1.5}, OBJECT, False),
        ({"a": "x", "n": True}, OBJECT, False),
        (True, {"type": ["boolean", "null"]}, True),
        (None, {"type": ["boolean", "null"]}, True),
        (1, {"type": "number"}, True),
        ("c", {"enum": ["a", "b"]}, False),
        ("a", {"const": "a"}, True),
        ([1, "x"], {"type": "array", "items": {"type": "integer"}}, False),
        (1, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, True),
        ([], {"oneOf": [{"type": "string"}, {"type": "integer"}]}, False),
        (1, {"allOf": [{"type": "integer"}, {"enum": [2]}]}, False),
        ({"next": {"next": {"next": 1}}}, LOOP, False),
        ({"next": {"next": {}}}, LOOP, True),
        (1, {"$ref": "#"}, True),
        (1, {"$ref": "elsewhere.json"}, True),
        (1, {"type": "unheard-of"}, True),
        (1, {}, True),
        (1, True, True),
        (1, False, False),
        ("x", {"minLength": 5}, True),
        ({"p_1": 1}, {"patternProperties": {"^p_": {}}, "additionalProperties": False}, True),
    ],
)
def test_a_value_fits_or_surely_does_not(value, schema, right):
    assert fits(value, schema) is right


def test_declared_parameters_are_known_only_where_they_are_listed():
    assert set(properties(OBJECT)) == {"a", "n"}
    assert properties({"anyOf": [OBJECT]}) is None
    assert properties(None) is None
