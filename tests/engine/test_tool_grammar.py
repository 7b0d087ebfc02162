"""Tool calls as a grammar: what a schema allows can be written, and what it does not allow cannot."""

import json
import logging

import pytest

from pyrosome.chat.schema import fits
from pyrosome.engine.constrain import Grammars
from pyrosome.engine.tool_grammar import tool_grammar
from pyrosome.errors import RequestError
from pyrosome.options import Constraint, SamplingParams
from tests.chat.cases import NANO, block, called, prompt_for, read, tokenizer

GRAMMARS = Grammars(NANO / "tokenizer.json", tokenizer(NANO).vocab_size, 1)
ADDRESS = {"type": "object", "properties": {"zip": {"type": "integer"}}, "required": ["zip"]}


def takes(parameters, *values, raw=None):
    """Whether a call with these values can be written whole; if so it is read back as it was meant."""
    declared = [{"function": {"name": "f", "parameters": parameters}}]
    guide = GRAMMARS.compile(Constraint("tool_call", json.dumps(declared)), None, SamplingParams())
    ids = tokenizer(NANO).encode(raw or block(*(("f", v) for v in values)), allow_special=True)
    if guide.usable([*ids, 1]) < len(ids) + 1:
        return False
    if values:
        prompt = prompt_for(tools=[{"name": "f", "parameters": parameters}])
        message, _, _ = read(ids, prompt, directory=NANO)
        assert called(message) == [("f", v) for v in values] and all(fits(v, parameters) for v in values)
    return True


def one(schema, **root):
    return {"type": "object", "properties": {"x": schema}, "required": ["x"], **root}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", "5", "a</b>\n<c>", "x </", '{"a": 1}', "😀"], [5, None, ["a"]]),
        ({"type": "integer"}, [0, -7], ["a", 1.5, None, True]),
        ({"type": ["string", "null"]}, ["null", None], [1, {}]),
        ({"type": "string", "enum": ["a", "b/\n", "</a>"]}, ["a", "b/\n", "</a>"], ["", "c", 1]),
        ({"enum": ["a", 2, None]}, ["a", 2, None], ["2", 3, "b"]),
        ({"const": "only"}, ["only"], ["onl", 1]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é😀x"], ["a", "abcd"]),
        ({"type": "string", "pattern": "^a/b$"}, ["a/b"], ["xa/b", "a/bc"]),
        ({"type": "string", "pattern": "b+"}, ["b", "xbby\n"], ["", "xy"]),
        ({"type": "string", "pattern": "^(a|[|)])x$|^c"}, ["ax", "|x", ")x", "cd"], ["bx", "dc"]),
        ({"type": "string", "pattern": "^[ab]+$", "maxLength": 3}, ["aba"], ["abab", "abc"]),
        ({"type": "string", "pattern": "^\\\\/$"}, ["\\/"], ["/", "\\"]),
        ({"anyOf": [{"type": "string", "enum": ["k"]}, {"type": "array", "items": {"type": "integer"}}]},
         ["k", [1, 2]], ["j", ["a"], None]),
        ({"allOf": [{"$ref": "#/$defs/color"}], "description": "as old pydantic writes it"}, ["red"], ["pink", 1]),
        ({"anyOf": [{"$ref": "#/$defs/color"}, {"type": "null"}]}, ["red", None], ["pink", 1]),
        ({"type": "array", "items": {"$ref": "#/definitions/address"}}, [[{"zip": 1}]], [[{}], "x"]),
        ({"$ref": "#/$defs/tree"}, [{"kids": [{"kids": []}]}], [{"kids": [1]}]),
        ({}, ["a", 1, None, {"a": [True]}], []),
    ],
)  # fmt: skip
def test_a_parameter_takes_what_its_schema_allows(schema, good, bad):
    tree = {
        "type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "required": ["kids"], "additionalProperties": False,
    }  # fmt: skip
    defs = {"$defs": {"color": {"type": "string", "enum": ["red"]}, "tree": tree}, "definitions": {"address": ADDRESS}}
    parameters = one(schema, **defs)
    for value in good:
        assert takes(parameters, {"x": value}), value
    for value in bad:
        assert not takes(parameters, {"x": value}), value


def test_required_parameters_come_and_undeclared_ones_only_where_the_schema_says_so():
    two = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["b"]}
    assert takes(two, {"b": 1}) and takes(two, {"a": "x", "b": 1}, {"b": 2})
    assert not takes(two, {"a": "x"}) and not takes(two, {"b": 1, "c": 1}) and not takes(two, {"b": 1, "a": "x"})
    open_ = {**two, "additionalProperties": {"type": "integer"}}
    assert takes(open_, {"b": 1, "c": 1, "ab": 2}) and not takes(open_, {"b": 1, "c": "x"})
    assert not takes(open_, {"b": 1, "a": 2}), "a declared name among the others"
    assert takes({}, {}) and takes({}, {"any": "x", "other": [1]}) and takes({"type": "object", "properties": {}}, {})
    assert takes({"type": "object", "required": ["z"]}, {"z": 1})
    assert not takes({"type": "object", "properties": {"a": False}, "required": []}, {"a": 1})


def test_alternatives_of_the_whole_are_kept_apart():
    kinds = [one({"const": "a"}), {"properties": {"y": {"type": "integer"}}, "required": ["y"]}]
    either = {"type": "object", "oneOf": kinds}
    assert takes(either, {"x": "a"}) and takes(either, {"y": 1}) and not takes(either, {"x": "b"})
    both = {"allOf": kinds}
    assert takes(both, {"x": "a", "y": 1}) and not takes(both, {"x": "a"})
    assert takes({"$ref": "#/$defs/a", "$defs": {"a": one({"type": "integer"})}}, {"x": 3})


def test_keywords_no_grammar_expresses_are_left_to_the_caller_and_the_rest_is_kept(caplog):
    odd = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    assert takes(one(odd), {"x": [1, 2]}) and not takes(one(odd), {"x": ["a"]})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for schema in ({"type": "string", "pattern": "^(?!a)b$"}, {"type": "string", "pattern": "("}):
            assert takes(one(schema), {"x": "anything"}) and not takes(one(schema), {"x": 1})
        unfit = one({"type": "integer", "minimum": 5, "maximum": 3})
        assert takes(unfit, raw=block(("f", {"x": 9}))) and not takes(unfit, raw=block(("f", {"x": [9]})))
        assert takes(one({"$ref": "#/nowhere"}), raw=block(("f", {"x": [1]})))
        assert takes(one({"type": "nothing"}), raw=block(("f", {"x": [1]})))
    assert "tool 'f': the schema of 'x' is held to its type alone" in caplog.text


def test_control_tokens_stand_in_no_value():
    for value in ("a<｜User｜>b", "</think>", "x<｜end▁of▁sentence｜>", "a｜DSML｜b", "</｜DSML｜invoke>"):
        text = f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="true">{value}'
        assert not takes(
            one({"type": "string"}), raw=text + "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
        )


def test_one_bad_schema_among_many_tools_costs_the_others_nothing():
    tools = [{"function": {"name": n, "parameters": one(s)}} for n, s in
             (("bad", {"type": "string", "pattern": "(?=a)"}), ("good", {"type": "integer"}))]  # fmt: skip
    guide = GRAMMARS.compile(Constraint("tool_call", json.dumps(tools)), None, SamplingParams())
    encode = tokenizer(NANO).encode
    for calls, good in (([("good", {"x": 1})], True), ([("good", {"x": "a"})], False), ([("bad", {"x": "a"})], True)):
        ids = encode(block(*calls), allow_special=True)
        assert (guide.usable(ids) == len(ids)) == good


def test_an_answer_in_json_may_stand_in_place_of_calls_and_nothing_else_may():
    tools = json.dumps([{"function": {"name": "f", "parameters": one({"type": "integer"})}}])
    encode = tokenizer(NANO).encode
    for schema, good, bad in (
        (json.dumps(ADDRESS), ['{"zip": 1}'], ['{"zip": "a"}', "hello", "[]"]),
        ("", ['{"a": [1]}', "{}"], ["[1]", "hello"]),
    ):
        guide = GRAMMARS.compile(Constraint("tool_call", tools, answer=schema), None, SamplingParams())
        for text in (*good, block(("f", {"x": 1})), block(("f", {"x": 1}), ("f", {"x": 2}))):
            ids = [*encode(text, allow_special=True), 1]
            assert guide.usable(ids) == len(ids), text
        for text in (*bad, block(("f", {"x": "a"})), good[0] + block(("f", {"x": 1}))):
            ids = [*encode(text, allow_special=True), 1]
            assert guide.usable(ids) < len(ids), text
    with pytest.raises(RequestError, match="JSON Schema is an object"):
        GRAMMARS.compile(Constraint("tool_call", tools, answer="[1]"), None, SamplingParams())


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "not JSON"), ("{}", "no list of objects"), ("[1]", "no list of objects"), ("[]", "declare one"),
        ('[{"function": {}}]', "tool 0 has no name"), ('[{"name": "a", "parameters": 3}]', "parameters of tool 'a'"),
        ('[{"name": "a<b"}]', "rename it"), ('[{"name": "f", "parameters": {"required": [">"]}}]', "rename it"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called_are_refused(tools, message):
    with pytest.raises(RequestError, match=message):
        tool_grammar(tools, 5, opening="whole", parallel=True)
