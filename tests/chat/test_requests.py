"""The default manner: what clients ask for, in every protocol, is what they get."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyrosome.chat import Chat, InvalidRequest
from pyrosome.errors import CheckpointError, ContextTooLong, RequestError
from tests.chat.cases import NANO, OFFICIAL, TOOLS, chat, tokenizer

ASK = {"role": "user", "content": "q"}
TOOL_FIELDS = {
    "chat_completions": [{"type": "function", "function": t} for t in TOOLS],
    "messages": [{"name": t["name"], "input_schema": t["parameters"]} for t in TOOLS],
    "responses": [{"type": "function", **t} for t in TOOLS],
}
REQUIRED = {"chat_completions": "required", "messages": {"type": "any"}, "responses": "required"}
NAMED = {
    "chat_completions": {"type": "function", "function": {"name": "read"}},
    "messages": {"type": "tool", "name": "read"},
    "responses": {"type": "function", "name": "read"},
}
PROTOCOLS = list(REQUIRED)


def render(protocol="chat_completions", thinking=True, **fields):
    body = {"input" if protocol == "responses" else "messages": [ASK], "max_tokens": 50}
    if protocol == "responses":
        body |= {"reasoning": {"effort": "high" if thinking else "none"}}
    else:
        body |= {"thinking": {"type": "enabled" if thinking else "disabled"}}
    return chat().render({**body, **fields}, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_required_tool_is_called_after_thinking_or_at_once(protocol, thinking):
    prompt = render(protocol, thinking, tools=TOOL_FIELDS[protocol], tool_choice=REQUIRED[protocol])
    assert prompt.constraint.kind == "tool_call_required"
    assert prompt.constraint.after_reasoning == thinking
    assert prompt.start == ("reasoning" if thinking else "tools")
    assert [t["function"]["name"] for t in json.loads(prompt.constraint.schema)] == ["get_weather", "read"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_named_tool_is_the_only_one(protocol, thinking):
    prompt = render(protocol, thinking, tools=TOOL_FIELDS[protocol], tool_choice=NAMED[protocol])
    assert prompt.constraint.kind == "tool_call_required" and prompt.constraint.after_reasoning == thinking
    assert [t["function"]["name"] for t in json.loads(prompt.constraint.schema)] == ["read"]
    assert [t.name for t in prompt.tools] == ["read"] and "get_weather" not in prompt.text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_named_tool_that_is_not_there_is_refused(protocol):
    choice = json.loads(json.dumps(NAMED[protocol]).replace("read", "write"))
    with pytest.raises(InvalidRequest, match="write"):
        render(protocol, tools=TOOL_FIELDS[protocol], tool_choice=choice)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_required_tool_without_tools_is_refused_or_means_nothing(protocol):
    try:
        prompt = render(protocol, False, tool_choice=REQUIRED[protocol])
    except InvalidRequest:
        return
    assert prompt.constraint is None and prompt.start == "content"


@pytest.mark.parametrize("thinking", [True, False])
def test_sampling_is_as_asked_and_else_the_official_default(thinking):
    asked = {"temperature": 0.3, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "seed": 7}
    asked |= {"frequency_penalty": -0.5, "repetition_penalty": 1.1}
    prompt = render(thinking=thinking, **asked)
    params = prompt.sampling_params()
    assert {k: getattr(params, k) for k in asked} == asked
    assert params.max_tokens == 50 and params.stop == () and params.logprobs is None
    assert render(logprobs=True, top_logprobs=3).sampling_params().logprobs == 3
    plain = render(thinking=thinking, tools=TOOL_FIELDS["chat_completions"]).sampling
    assert (plain.temperature, plain.top_p) == (1.0, 0.95 if thinking else 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 3), ("top_p", 0), ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0), ("max_tokens", 0)],
)
def test_a_field_outside_its_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field):
        render(**{field: value})


def test_openai_spellings_are_understood():
    assert render(max_tokens=None, max_completion_tokens=77).max_tokens == 77
    assert render(n=4).ids == render().ids
    assert render(stop="END").stop == ("END",)
    system = chat().render({"messages": [{"role": "system", "content": "S"}, ASK]})
    assert chat().render({"messages": [{"role": "developer", "content": "S"}, ASK]}).ids == system.ids
    assert render(reasoning={"effort": "max"}).effort == "max"
    assert render(chat_template_kwargs={"reasoning_effort": "low"}).effort == "low"
    tools = TOOL_FIELDS["chat_completions"]
    assert (
        render(tools=tools).constraint.parallel
        and not render(tools=tools, parallel_tool_calls=False).constraint.parallel
    )


def test_json_is_given_to_whoever_asks():
    prompt = render(response_format={"type": "json_object"})
    assert (prompt.constraint.kind, prompt.constraint.schema, prompt.json_only) == ("json", "", True)
    assert prompt.constraint.after_reasoning
    prompt = render("responses", text={"format": {"type": "json_object"}})
    assert (prompt.constraint.kind, prompt.json_only) == ("json", True)
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    prompt = render("messages", output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(prompt.constraint.schema) == schema and json.dumps(schema) in prompt.text
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert render(response_format=schema).constraint.kind == "json"


def test_with_tools_it_is_given_where_no_call_is_made():
    tools, schema = TOOL_FIELDS["chat_completions"], {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    both = render(tools=tools, response_format=form).constraint
    assert both.kind == "tool_call" and json.loads(both.answer) == schema
    assert both.schema == render(tools=tools).constraint.schema and render(tools=tools).constraint.answer is None
    assert render(tools=tools, response_format={"type": "json_object"}).constraint.answer == ""
    forced = render(tools=tools, response_format=form, tool_choice="required").constraint
    assert forced.kind == "tool_call_required" and forced.answer is None
    none = render(tools=tools, response_format=form, tool_choice="none").constraint
    assert none.kind == "json" and json.loads(none.schema) == schema


def test_calls_and_results_without_ids_are_paired_in_order():
    calls = [{"type": "function", "function": {"name": "read", "arguments": {"path": p}}} for p in "ab"]
    results = [{"role": "tool", "content": f"<{p}>"} for p in "ab"]
    prompt = chat().render({"messages": [ASK, {"role": "assistant", "tool_calls": calls, "content": None}, *results]})
    assert "<tool_result><a></tool_result>\n\n<tool_result><b></tool_result>" in prompt.text


def test_a_conversation_needs_no_request():
    bare = chat().conversation([ASK], "off", [TOOLS[1]])
    assert bare.mode == "off" and [t.name for t in bare.tools] == ["read"]
    assert bare.ids == render(thinking=False, tools=TOOL_FIELDS["chat_completions"][1:]).ids
    assert chat().conversation([ASK], "max").mode == "max"
    with pytest.raises(RequestError, match="'off', 'low', 'high', 'max'"):
        chat().conversation([ASK], "ultra")


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}', encoding="utf-8")
    small = Chat(tmp_path, tokenizer=tokenizer())
    body = {"messages": [{"role": "user", "content": "hello"}], "thinking": {"type": "disabled"}}
    assert small.render(body).max_tokens == 64 - len(small.render(body).ids)
    for too_much in ({**body, "max_tokens": 64}, {**body, "messages": [{"role": "user", "content": "a b " * 99}]}):
        with pytest.raises(ContextTooLong, match="the context holds 64"):
            small.render(too_much)
        with pytest.raises(InvalidRequest, match="maximum context length is 64"):
            Chat(tmp_path, tokenizer=tokenizer(), compat="deepseek").render(too_much)


def test_chat_needs_no_torch_and_loads_the_renderer_when_first_used():
    code = "import sys, pyrosome.chat; print([m for m in ('torch', 'deepseek_recipe') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_cannot_be_a_chat_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was looked for"):
        Chat(tmp_path)
    for field, value in (("dialect", "0813"), ("compat", "openai")):
        with pytest.raises(RequestError, match=value):
            Chat(OFFICIAL, tokenizer=tokenizer(), **{field: value})
    with pytest.raises(RequestError, match="completions"):
        chat().render({"messages": [ASK]}, "completions")
    values = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "<think>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match="lacks <think>"):
        Chat(tmp_path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**20)
    | st.floats()
    | st.sampled_from(["", "user", "assistant", "c", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "role",
                        "content",
                        "type",
                        "text",
                        "name",
                        "function",
                        "tool_calls",
                        "tool_call_id",
                        "id",
                        "arguments",
                    ),
                    *("call_id", "parameters", "effort", "thinking", "format", "prefix", "summary", "schema", "input"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = [
    *(
        "messages",
        "input",
        "tools",
        "tool_choice",
        "thinking",
        "reasoning",
        "reasoning_effort",
        "response_format",
        "stop",
    ),
    *("text", "system", "instructions", "max_tokens", "temperature", "top_k", "chat_template_kwargs", "output_config"),
    *("continue_final_message", "add_generation_prompt", "stream", "seed", "max_completion_tokens", "top_p", "n"),
]
GOOD = {"messages": [ASK], "input": "q", "max_tokens": 5}


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.sampled_from(PROTOCOLS),
    st.sampled_from([None, "deepseek"]),
)
def test_no_body_is_met_with_anything_but_a_prompt_or_a_refusal(body, protocol, compat):
    server = chat("0731", compat)
    try:
        prompt = server.render({**GOOD, **body}, protocol)
    except RequestError:
        return
    assert prompt.ids[0] == 0
