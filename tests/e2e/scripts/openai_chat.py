"""The official Python client on chat completions."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from cases import AGENT, URL, case, run
from pydantic import BaseModel

ASK = [{"role": "user", "content": "? falcon"}]
BRIEF = {"thinking": {"type": "enabled", "budget_tokens": 16}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"type": "string", "enum": ["celsius", "kelvin"]}, "now": {"type": "boolean"}},
                "required": ["unit", "now"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "forecast")
]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)


class Colour(BaseModel):
    name: Literal["red", "green", "blue"]
    is_warm: bool


def ask(**more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "builtin:nano", "messages": ASK, "max_tokens": 256, "temperature": 0, **more}
    )


def arguments_of(call: Any) -> dict[str, Any]:
    found = json.loads(call.function.arguments)
    assert found.keys() == {"unit", "now"} and found["unit"] in {"celsius", "kelvin"}, found
    assert isinstance(found["now"], bool), found
    return found


@case
def an_answer_in_one_piece() -> None:
    reply = ask(max_tokens=24)
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and reply.model == "builtin:nano", reply
    assert choice.finish_reason == "stop" and choice.message.content, choice
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and 0 < usage.completion_tokens <= 24
    assert reply.system_fingerprint, reply


@case
def a_stream_is_the_same_answer_with_usage_last() -> None:
    whole = ask().choices[0]
    said, thought, reasons, usage = "", "", [], []
    for chunk in ask(stream=True, stream_options={"include_usage": True}):
        assert not usage, "nothing follows it"
        usage += [chunk.usage] if chunk.usage else []
        for part in chunk.choices:
            said += part.delta.content or ""
            thought += getattr(part.delta, "reasoning_content", None) or ""
            reasons += [part.finish_reason] if part.finish_reason else []
    assert said and thought, (said, thought)
    assert (said, thought) == (whole.message.content, whole.message.reasoning_content), (said, thought, whole)
    assert reasons == [whole.finish_reason] and usage[0].completion_tokens > 0, (reasons, usage)


@case
def thoughts_are_given_counted_and_taken_back() -> None:
    first = ask()
    message = first.choices[0].message
    assert message.reasoning_content, message
    assert first.usage.completion_tokens_details.reasoning_tokens > 0, first.usage
    turns = [*ASK, message.model_dump(exclude_none=True), {"role": "user", "content": "? heron"}]
    again = ask(messages=turns, extra_body={"chat_template_kwargs": {"drop_thinking": False}})
    assert again.choices[0].finish_reason == "stop" and again.usage.prompt_tokens > first.usage.prompt_tokens, again
    body = {"model": "builtin:nano", "messages": turns, "chat_template_kwargs": {"drop_thinking": False}}
    prompt = client.post("/chat/completions/render", cast_to=dict, body=body)["prompt"]
    assert f"<think>{message.reasoning_content}</think>{message.content}" in prompt, prompt


@case
def each_mode_is_asked_for_and_told() -> None:
    for asked, mode in (("none", "off"), ("low", "low"), ("high", "high"), ("max", "max")):
        raw = client.chat.completions.with_raw_response.create(
            model="builtin:nano", messages=ASK, max_tokens=64, temperature=0, reasoning_effort=asked
        )
        reply = raw.parse()
        assert raw.headers["x-pyrosome-mode"] == mode == reply.pyrosome["mode"], (asked, mode, raw.headers)
        assert bool(getattr(reply.choices[0].message, "reasoning_content", None)) == (mode != "off"), reply


@case
def a_required_tool_is_called_after_thinking() -> None:
    reply = ask(tools=TOOLS, tool_choice="required", extra_body=BRIEF).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.reasoning_content, reply
    for call in reply.message.tool_calls:
        assert call.id and call.type == "function" and call.function.name in {"weather", "forecast"}, call
        arguments_of(call)


@case
def a_named_tool_is_the_one_that_is_called() -> None:
    for name in ("weather", "forecast"):
        choice = {"type": "function", "function": {"name": name}}
        reply = ask(tools=TOOLS, tool_choice=choice, extra_body=BRIEF).choices[0]
        assert {c.function.name for c in reply.message.tool_calls} == {name}, reply


@case
def without_parallel_calls_there_is_one() -> None:
    reply = ask(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, extra_body=BRIEF)
    assert len(reply.choices[0].message.tool_calls) == 1, reply


@case
def calls_stream_to_the_same_arguments() -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "extra_body": BRIEF}
    whole = [(c.function.name, c.function.arguments) for c in ask(**asked).choices[0].message.tool_calls]
    found: dict[int, list[str]] = {}
    for chunk in ask(**asked, stream=True):
        for part in chunk.choices:
            for call in part.delta.tool_calls or []:
                one = found.setdefault(call.index, ["", ""])
                one[0] += call.function.name or ""
                one[1] += call.function.arguments or ""
    assert [tuple(found[i]) for i in sorted(found)] == whole, (found, whole)


@case
def a_model_of_pydantic_is_parsed_after_thinking() -> None:
    reply = client.chat.completions.parse(
        model="builtin:nano", messages=ASK, max_tokens=512, temperature=0, response_format=Colour, extra_body=BRIEF
    )
    message = reply.choices[0].message
    assert isinstance(message.parsed, Colour) and message.reasoning_content, message


@case
def the_stream_helper_parses_too() -> None:
    with client.chat.completions.stream(
        model="builtin:nano", messages=ASK, max_tokens=512, temperature=0, response_format=Colour, extra_body=BRIEF
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "chunk"} <= kinds, kinds
    assert isinstance(final.choices[0].message.parsed, Colour), final


@case
def a_strict_tool_is_parsed_into_its_model() -> None:
    tool = openai.pydantic_function_tool(Colour)
    reply = client.chat.completions.parse(
        model="builtin:nano", messages=ASK, max_tokens=512, temperature=0, tools=[tool], tool_choice="required",
        extra_body=BRIEF,
    )  # fmt: skip
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Colour), reply


@case
def log_probabilities_are_of_the_tokens_of_the_answer() -> None:
    choice = ask(logprobs=True, top_logprobs=3, reasoning_effort="none").choices[0]
    entries = choice.logprobs.content
    assert "".join(e.token for e in entries).startswith(choice.message.content), choice
    for entry in entries:
        tops = [t.logprob for t in entry.top_logprobs]
        assert entry.logprob <= 0 and len(tops) == 3 and tops == sorted(tops, reverse=True), entry
        assert abs(entry.logprob - tops[0]) < 1e-6, "the likeliest was chosen"


@case
def several_answers_come_by_their_index() -> None:
    reply = ask(n=3, temperature=1, seed=7, max_tokens=8)
    assert [c.index for c in reply.choices] == [0, 1, 2], reply
    streamed = {c.index for chunk in ask(n=3, stream=True, max_tokens=8) for c in chunk.choices}
    assert streamed == {0, 1, 2}, streamed


@case
def a_seed_gives_the_same_answer_again() -> None:
    asked = {"temperature": 1, "seed": 11, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    one, two = (ask(**asked).choices[0].message for _ in range(2))
    assert one.to_dict() == two.to_dict(), (one, two)


@case
def two_calls_at_once_and_their_results() -> None:
    """By the server that plays a part."""
    other = openai.OpenAI(base_url=f"{AGENT}/v1", api_key="none", max_retries=0, timeout=60)
    place = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": place}}]
    turns: list[Any] = [{"role": "user", "content": "the weather in Oslo and Lima"}]
    for stream in (False, True):
        if stream:
            with other.chat.completions.stream(model="m", messages=turns, tools=tools) as events:
                reply = events.get_final_completion().choices[0]
        else:
            reply = other.chat.completions.create(model="m", messages=turns, tools=tools).choices[0]
        calls = reply.message.tool_calls
        assert reply.finish_reason == "tool_calls" and reply.message.content == "I look.", reply
        assert [json.loads(c.function.arguments) for c in calls] == [{"place": "Oslo"}, {"place": "Lima"}], calls
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"the word is {word}"}
        for call, word in zip(calls, ("snow", "fog"), strict=True)
    ]
    last = other.chat.completions.create(
        model="m", messages=[*turns, reply.message.model_dump(exclude_none=True), *results], tools=tools
    )
    assert last.choices[0].message.content == "It says snow and fog.", last


run()
