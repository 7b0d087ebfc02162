"""Answers bound by vLLM's fields."""

import json

import pytest

from pyrosome.chat import Chat, InvalidRequest
from pyrosome.chat.structured import structured
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.constrain import Grammars
from pyrosome.errors import RequestError
from pyrosome.options import Constraint, SamplingParams

PATH = open_checkpoint("builtin:nano").path
CHAT = Chat(PATH)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def rendered(**fields):
    return CHAT.render({"messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize(
    ("body", "kind", "schema"),
    [
        ({"guided_json": SCHEMA}, "json", AS_TEXT),
        ({"guided_json": json.dumps(SCHEMA)}, "json", AS_TEXT),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json", AS_TEXT),
        ({"structured_outputs": {"json_object": True}}, "json", ""),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"guided_choice": ["yes", 'a "no"\n']}, "lark", r'start: "yes" | "a \"no\"\n"'),
        ({"guided_grammar": 'start: "a" | "b"'}, "lark", 'start: "a" | "b"'),
    ],
)
def test_each_spelling_is_a_constraint_after_the_thoughts_and_not_in_the_prompt(body, kind, schema):
    assert structured(body) == (kind, schema)
    prompt = rendered(**body)
    assert prompt.constraint == Constraint(kind, schema, after_reasoning=True)
    assert prompt.ids == rendered().ids
    assert rendered(**body, thinking={"type": "disabled"}).constraint == Constraint(kind, schema)


@pytest.mark.parametrize("body", [{}, {"guided_json": None}, {"structured_outputs": {}}, {"guided_json_object": False}])
def test_nothing_asked_for_binds_nothing(body):
    assert structured(body) is None


@pytest.mark.parametrize("text", ["yes", 'a "no"\n'])
def test_a_choice_is_written_out_as_it_is(text):
    guide = Grammars(PATH / "tokenizer.json", 1280, 1).compile(
        Constraint(*structured({"guided_choice": ["yes", 'a "no"\n']})), None, SamplingParams()
    )
    for token in CHAT.tokenizer.encode(text):
        guide.accept(token)
    assert guide.is_finished


def test_a_grammar_in_another_notation_is_rewritten():
    kind, lark = structured({"guided_grammar": 'root ::= "a" | "b"'})
    assert Grammars(PATH / "tokenizer.json", 1280, 1).compile(Constraint(kind, lark), None, SamplingParams())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json, guided_regex"),
        ({"guided_json": {}, "structured_outputs": {"choice": ["a"]}}, "bound to one"),
        ({"guided_json": "{"}, "guided_json is text that is not JSON"),
        ({"guided_json": 3}, "guided_json is 3"),
        ({"guided_regex": 3}, "guided_regex is 3"),
        ({"guided_choice": []}, "guided_choice is"),
        ({"guided_choice": ["a", ""]}, "guided_choice is"),
        ({"guided_grammar": "root ::= ??? ("}, "guided_grammar cannot be read"),
        ({"structured_outputs": "json"}, "structured_outputs is 'json'"),
        ({"structured_outputs": {"structural_tag": {}}}, "structural_tag"),
    ],
)
def test_what_is_wrong_is_named(body, message):
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        structured(body)


def test_beside_optional_tools_the_answer_is_bound_to_a_schema_only():
    assert rendered(tools=TOOLS, guided_json=SCHEMA).constraint.answer == AS_TEXT
    assert rendered(tools=TOOLS, tool_choice="none", guided_regex="a").constraint == Constraint("regex", "a", True)
    for fields in ({"guided_regex": "a"}, {"guided_json": SCHEMA, "tool_choice": "required"}):
        with pytest.raises(InvalidRequest, match="tool_choice none"):
            rendered(tools=TOOLS, **fields)
    with pytest.raises(InvalidRequest, match="bound to one"):
        rendered(guided_regex="a", response_format={"type": "json_object"})


def test_a_seed_below_zero_is_a_seed():
    assert rendered(seed=-5).sampling.seed == -5
    assert rendered(seed=5).sampling.seed == 5
