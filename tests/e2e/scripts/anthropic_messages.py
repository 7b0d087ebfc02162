"""The official Python client of Anthropic's protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
from cases import AGENT, KEY, LOCKED, URL, case, raised, run

NANO = "builtin:nano"
ASK = [{"role": "user", "content": "? falcon"}]
THINK = {"type": "enabled", "budget_tokens": 1024}
TOOL = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=120)


def ask(**more: Any) -> Any:
    return client.messages.create(
        **{"model": NANO, "max_tokens": 2048, "messages": ASK, "extra_body": {"temperature": 0}, **more}
    )


@case
def a_message_has_thoughts_with_a_signature_and_a_text() -> None:
    message = ask(thinking=THINK)
    assert [b.type for b in message.content] == ["thinking", "text"], message
    assert message.content[0].thinking and message.content[0].signature and message.content[1].text, message
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0, message


@case
def without_thinking_there_is_text_alone() -> None:
    assert [b.type for b in ask(thinking={"type": "disabled"}).content] == ["text"]


@case
def the_stream_helper_makes_the_same_message() -> None:
    whole = ask(thinking=THINK)
    with client.messages.stream(
        model=NANO, max_tokens=2048, messages=ASK, thinking=THINK, extra_body={"temperature": 0}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds
    assert {"thinking", "text", "signature"} <= set(kinds), kinds
    assert [b.to_dict() | {"signature": ""} for b in final.content] == [
        b.to_dict() | {"signature": ""} for b in whole.content
    ], (final, whole)
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == whole.usage.output_tokens, final


@case
def thoughts_come_back_with_their_signature() -> None:
    first = ask(thinking=THINK, tools=[TOOL])
    thought = first.content[0].thinking
    assert thought, first
    told = {"role": "assistant", "content": [block.to_dict() for block in first.content]}
    turns = [*ASK, told, {"role": "user", "content": "? heron"}]
    again = ask(messages=turns, thinking=THINK, tools=[TOOL])
    assert again.stop_reason in {"end_turn", "tool_use"} and again.usage.output_tokens > 0, again
    body = {"model": NANO, "max_tokens": 9, "messages": turns, "thinking": THINK, "tools": [TOOL]}
    prompt = client.post("/v1/messages/render", cast_to=object, body=body)["prompt"]
    assert f"<think>{thought}</think>" in prompt, prompt


@case
def a_tool_is_used_and_its_result_taken() -> None:
    first = ask(tools=[TOOL], tool_choice={"type": "any"}, thinking={"type": "disabled"})
    uses = [b for b in first.content if b.type == "tool_use"]
    assert first.stop_reason == "tool_use" and uses[0].input["unit"] in {"celsius", "kelvin"}, first
    results = [{"type": "tool_result", "tool_use_id": b.id, "content": "20"} for b in uses]
    turns = [
        *ASK,
        {"role": "assistant", "content": [b.to_dict() for b in first.content]},
        {"role": "user", "content": results},
    ]
    again = ask(
        messages=turns, tools=[TOOL], tool_choice={"type": "none"}, max_tokens=64, thinking={"type": "disabled"}
    )
    assert again.stop_reason in {"end_turn", "max_tokens"} and again.content, again


@case
def a_tool_is_used_after_thinking() -> None:
    message = ask(
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert message.stop_reason == "tool_use", message
    assert message.content[0].type == "thinking" and message.content[-1].type == "tool_use", message


@case
def two_tools_at_once_and_their_results() -> None:
    other = anthropic.Anthropic(base_url=AGENT, api_key="none", max_retries=0, timeout=60)
    place = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    asked: dict[str, Any] = {"model": "m", "max_tokens": 500, "tools": [{"name": "weather", "input_schema": place}]}
    turns: list[Any] = [{"role": "user", "content": "the weather in Oslo and Lima"}]
    with other.messages.stream(**asked, messages=turns, thinking=THINK) as stream:
        message = stream.get_final_message()
    assert [b.type for b in message.content] == ["thinking", "text", "tool_use", "tool_use"], message
    uses = message.content[2:]
    assert [b.input for b in uses] == [{"place": "Oslo"}, {"place": "Lima"}], message
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": f"the word is {w}"}
        for b, w in zip(uses, ("snow", "fog"), strict=True)
    ]
    turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    last = other.messages.create(**asked, messages=turns, thinking=THINK)
    assert last.content[-1].text == "It says snow and fog.", last


@case
def tokens_are_counted_as_they_are_billed() -> None:
    counted = client.messages.count_tokens(model=NANO, messages=ASK, tools=[TOOL]).input_tokens
    usage = ask(tools=[TOOL], max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0), (counted, usage)


@case
def errors_are_of_their_kinds() -> None:
    stranger = client.with_options(base_url=LOCKED, api_key="x")
    for error in (
        raised(anthropic.BadRequestError, lambda: ask(messages=[])),
        raised(anthropic.AuthenticationError, lambda: stranger.messages.create(model=NANO, max_tokens=1, messages=ASK)),
    ):
        assert error.body["type"] == "error" and error.body["error"]["message"], error.body


@case
def a_key_is_taken_in_either_header() -> None:
    for how in ({"api_key": KEY}, {"auth_token": KEY}):
        found = anthropic.Anthropic(base_url=LOCKED, max_retries=0, timeout=60, **how)
        assert found.messages.create(model=NANO, max_tokens=1, messages=ASK).usage.output_tokens == 1


@case
def the_asynchronous_client_streams() -> None:
    found = anthropic.AsyncAnthropic(base_url=URL, api_key="none", max_retries=0, timeout=60)
    asked = {"model": NANO, "max_tokens": 64, "messages": ASK, "thinking": {"type": "disabled"}}

    async def text() -> str:
        async with found, found.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
            return "".join([part async for part in stream.text_stream])

    assert asyncio.run(text()) == ask(thinking={"type": "disabled"}, max_tokens=64).content[0].text


run()
