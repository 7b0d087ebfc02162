"""What clients of Anthropic's and OpenAI's newer protocols send, beyond what the official API reads."""

import contextlib

import pytest

from pyrosome.chat import Chat, InvalidRequest
from pyrosome.chat.carried import carried, carry
from tests.chat.cases import TOOLS, chat, tokenizer

ASK = {"role": "user", "content": "q"}
OFF = {"type": "disabled"}
PATCH_TOOL = {"type": "custom", "name": "edit", "description": "edits", "format": {
    "type": "grammar", "syntax": "lark", "definition": "start: /x/"}}  # fmt: skip
FUNCTIONS = [{"type": "function", **t} for t in TOOLS]


def messages(*content, **fields):
    return chat().render({"messages": [*content], "max_tokens": 50, **fields}, "messages")


def responses(*items, **fields):
    return chat().render({"input": [*items], **fields}, "responses")


# Thoughts that come back in a string

HISTORY = [ASK, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm 🙂"}]},
           {"role": "assistant", "content": "a"}, ASK]  # fmt: skip


def test_thoughts_come_back_in_the_string_that_codex_keeps():
    kept = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": carry("hm 🙂")}
    expected = responses(*HISTORY, tools=FUNCTIONS)
    assert "<think>hm 🙂</think>" in expected.text
    assert responses(HISTORY[0], kept, *HISTORY[2:], tools=FUNCTIONS).text == expected.text


def test_text_goes_before_the_string_beside_it():
    both = {**HISTORY[1], "encrypted_content": carry("other")}
    assert "<think>hm 🙂</think>" in responses(HISTORY[0], both, *HISTORY[2:], tools=FUNCTIONS).text


def test_thoughts_come_back_in_a_signature():
    def turn(**thought):
        content = [{"type": "thinking", **thought}, {"type": "text", "text": "a"}]
        return messages(
            ASK,
            {"role": "assistant", "content": content},
            ASK,
            tools=[{"name": "f", "input_schema": {"type": "object"}}],
        )

    expected = turn(thinking="hm", signature="whose ever").text
    assert "<think>hm</think>" in expected
    assert turn(thinking="", signature=carry("hm")).text == expected
    assert turn(thinking="hm").text == expected


@pytest.mark.parametrize("opaque", ["", "gAAAAB", carry("hm")[:-1], carry("hm") + "!", carry("hm").upper(), None, 7])
def test_a_string_of_another_maker_or_a_broken_one_holds_no_thoughts(opaque):
    assert carried(opaque) == ""


@pytest.mark.parametrize("thought", ["a", "\n\n", "🙂‍↔️ \x00", "a" * 1000])
def test_what_is_carried_comes_back_as_it_was(thought):
    assert carry(thought).isascii() and carried(carry(thought)) == thought


# Tools


def test_a_tool_of_free_text_is_a_function_of_one_text():  # fmt: skip
    prompt = responses(ASK, tools=[PATCH_TOOL], tool_choice={"type": "custom", "name": "edit"})
    assert [t.name for t in prompt.tools] == ["edit"] and prompt.constraint.kind == "tool_call_required"
    assert prompt.tools[0].parameters["required"] == ["input"]
    assert "edits\\n\\nThe input follows this lark grammar:\\nstart: /x/" in prompt.text


def test_apply_patch_is_described_as_the_official_api_does():
    mine = responses(ASK, tools=[{"type": "custom", "name": "apply_patch", "description": "mine"}]).text
    assert "*** Begin Patch" in mine and "mine" not in mine


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_the_tools_the_allowed_ones_are_shown(mode):
    allowed = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "read"}]}
    prompt = responses(ASK, tools=FUNCTIONS, tool_choice=allowed)
    assert [t.name for t in prompt.tools] == ["read"] and "get_weather" not in prompt.text
    assert prompt.constraint.kind == {"auto": "tool_call", "required": "tool_call_required"}[mode]


def test_a_tool_that_anthropics_clients_call_custom_is_a_tool_like_any_other():
    tools = [{"name": t["name"], "input_schema": t["parameters"]} for t in TOOLS]
    expected = messages(ASK, tools=tools).text
    assert messages(ASK, tools=[{**t, "type": "custom", "defer_loading": False} for t in tools]).text == expected


def test_a_tool_of_anthropics_servers_is_refused_by_its_place():
    with pytest.raises(InvalidRequest, match=r"tools\[0\]: server tools are not supported"):
        messages(ASK, tools=[{"type": "web_search_20250305", "name": "web_search"}])


def test_what_another_providers_tools_did_is_left_out_of_the_history():
    searched = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}]  # fmt: skip
    text = {"type": "text", "text": "a"}
    expected = messages(ASK, {"role": "assistant", "content": [text]}, ASK, thinking=OFF).text
    assert messages(ASK, {"role": "assistant", "content": [*searched, text]}, ASK, thinking=OFF).text == expected
    alone = messages(ASK, {"role": "assistant", "content": searched}, ASK, thinking=OFF).text
    assert alone == messages(ASK, ASK, thinking=OFF).text


def test_a_call_without_arguments_may_leave_them_out():
    def turn(**call):
        use = {"type": "tool_use", "id": "t", "name": "f", **call}
        result = {"type": "tool_result", "tool_use_id": "t", "content": "r"}
        return messages(ASK, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}).text

    assert turn() == turn(input=None) == turn(input={})


@pytest.mark.parametrize("strict", [(False, False), (True, False), (None, True)])
def test_some_tools_may_be_strict_and_others_not(strict):
    def named(protocol):
        for tool, flag in zip(TOOLS, strict, strict=True):
            flags = {} if flag is None else {"strict": flag}
            if protocol == "chat_completions":
                yield {"type": "function", "function": {**tool, **flags}}
            elif protocol == "messages":
                yield {"name": tool["name"], "input_schema": tool["parameters"], **flags}
            else:
                yield {"type": "function", **tool, **flags}

    for protocol in ("chat_completions", "messages", "responses"):
        body = {"input" if protocol == "responses" else "messages": [ASK], "tools": list(named(protocol))}
        prompt = chat().render(body, protocol)
        assert [t.name for t in prompt.tools] == [t["name"] for t in TOOLS]
        if len(set(map(bool, strict))) == 2:
            assert [t.parameters for t in prompt.tools] == [t["parameters"] for t in TOOLS]
    space = {"type": "namespace", "name": "n", "description": "", "tools": [{**FUNCTIONS[0], "strict": strict[0]}]}
    prompt = responses(ASK, tools=[space, {**FUNCTIONS[1], "strict": strict[1]}, PATCH_TOOL])
    assert len(prompt.tools) == 3


# Modes and lengths


@pytest.mark.parametrize("dialect", ["preview", "0731"])  # fmt: skip
@pytest.mark.parametrize("protocol", ["chat_completions", "messages", "responses"])
def test_xhigh_is_high(dialect, protocol):
    template = Chat(".", dialect, tokenizer=tokenizer())
    prompts = []
    for effort in ("high", "xhigh"):
        body = {"input": "q"} if protocol == "responses" else {"messages": [ASK], "max_tokens": 9}
        field = {"responses": "reasoning", "messages": "output_config"}.get(protocol)
        body |= {field: {"effort": effort}} if field else {"reasoning_effort": effort}
        prompts.append(template.render(body, protocol))
    assert prompts[0].text == prompts[1].text and prompts[1].mode == "high"


def test_thinking_is_turned_off_in_responses_as_in_the_other_protocols():
    assert responses(ASK, thinking=OFF).mode == "off"
    assert responses(ASK, thinking=OFF, reasoning={"summary": "auto"}).mode == "off"
    assert responses(ASK, thinking=OFF, reasoning={"effort": "low"}).mode == "low"


def test_anthropics_max_tokens_is_lowered_to_what_fits(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}', encoding="utf-8")
    small = Chat(tmp_path, tokenizer=tokenizer())
    prompt = small.render({"messages": [ASK], "max_tokens": 32000}, "messages")
    assert prompt.max_tokens == 64 - len(prompt.ids)
    assert small.render({"messages": [ASK], "max_tokens": 5}, "messages").max_tokens == 5


# What is no request


@pytest.mark.parametrize("depth", [200, 2000])  # fmt: skip
def test_a_request_nested_too_deep_is_refused(depth):
    value: object = 1
    for _ in range(depth):
        value = {"a": value}
    with pytest.raises(InvalidRequest, match=r"nest"):
        messages(ASK, tools=[{"name": "f", "input_schema": value}])


@pytest.mark.parametrize("junk", [5, "x", {}, [5], [[]], [{"type": []}], [{"type": "reasoning", "summary": 5}]])
@pytest.mark.parametrize("protocol", ["chat_completions", "messages", "responses"])
@pytest.mark.parametrize("field", ["tools", "messages", "input", "tool_choice", "thinking", "reasoning", "text"])
def test_fields_of_a_wrong_kind_are_refused_and_never_a_fault(protocol, field, junk):
    whole = {"input": [ASK]} if protocol == "responses" else {"messages": [ASK]}
    messages_field = "input" if protocol == "responses" else "messages"
    nested = {"type": "allowed_tools", "tools": junk} if field == "tool_choice" else junk
    for body in ({**whole, field: junk}, {**whole, field: nested}, {messages_field: [{**ASK, "tool_calls": junk}]}):
        with contextlib.suppress(InvalidRequest):
            assert chat().render(body, protocol).ids
