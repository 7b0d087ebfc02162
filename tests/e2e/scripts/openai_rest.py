"""The official Python client on completions, responses, models, errors and retries."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import openai
from cases import AGENT, KEY, LOCKED, NARROW_KEY, URL, case, raised, run
from pydantic import BaseModel

NANO = "builtin:nano"
ASK = [{"role": "user", "content": "? falcon"}]
BRIEF = {"thinking": {"type": "enabled", "budget_tokens": 16}}
ENDLESS = {"ignore_eos": True}
TOOL = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)


class Colour(BaseModel):
    name: Literal["red", "green", "blue"]


# Completions


@case
def a_completion_echoes_its_prompt_with_log_probabilities() -> None:
    reply = client.completions.create(
        model=NANO, prompt="Once upon a time", max_tokens=4, echo=True, logprobs=2, temperature=0
    )
    choice = reply.choices[0]
    logs = choice.logprobs
    assert choice.text.startswith("Once upon a time") and len(choice.text) > 16, choice
    assert logs.token_logprobs[0] is None and all(p <= 0 for p in logs.token_logprobs[1:]), logs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.text_offset) == len(logs.top_logprobs), logs


@case
def completions_of_several_prompts_stream() -> None:
    asked = {"model": NANO, "prompt": ["Once upon", "The"], "max_tokens": 6, "temperature": 0}
    whole = {c.index: c.text for c in client.completions.create(**asked).choices}
    parts: dict[int, str] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for part in chunk.choices:
            parts[part.index] = parts.get(part.index, "") + part.text
    assert parts == whole and len(whole) == 2, (parts, whole)


# Responses


@case
def a_response_has_thoughts_and_a_text() -> None:
    reply = client.responses.create(model=NANO, input="? falcon", temperature=0, max_output_tokens=256)
    assert reply.status == "completed" and reply.output_text, reply
    assert [item.type for item in reply.output] == ["reasoning", "message"], reply
    assert reply.usage.output_tokens_details.reasoning_tokens > 0, reply.usage


@case
def a_response_streams_to_what_it_is_whole() -> None:
    asked = {"model": NANO, "input": "? falcon", "temperature": 0, "max_output_tokens": 256}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events))), events
    assert events[0].type == "response.created" and events[-1].type == "response.completed", events
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == whole.output_text == events[-1].response.output_text, (said, whole)


@case
def a_response_calls_a_required_tool_after_thinking() -> None:
    reply = client.responses.create(
        model=NANO, input=ASK, tools=[TOOL], tool_choice="required", temperature=0, max_output_tokens=512,
        extra_body=BRIEF,
    )  # fmt: skip
    kinds = [item.type for item in reply.output]
    assert reply.status == "completed" and kinds[0] == "reasoning" and "function_call" in kinds, reply
    for item in reply.output:
        if item.type == "function_call":
            assert item.name == "weather" and json.loads(item.arguments)["unit"] in {"celsius", "kelvin"}, item


@case
def two_calls_of_a_response_and_their_results() -> None:
    other = openai.OpenAI(base_url=f"{AGENT}/v1", api_key="none", max_retries=0, timeout=60)
    place = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    tools = [{"type": "function", "name": "weather", "parameters": place, "strict": False}]
    turns: list[Any] = [{"role": "user", "content": "the weather in Oslo and Lima"}]
    with other.responses.stream(model="m", input=turns, tools=tools) as events:
        kinds = {event.type for event in events}
        reply = events.get_final_response()
    assert "response.function_call_arguments.delta" in kinds, kinds
    calls = [item for item in reply.output if item.type == "function_call"]
    assert [json.loads(c.arguments) for c in calls] == [{"place": "Oslo"}, {"place": "Lima"}], reply
    turns += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in reply.output]
    turns += [
        {"type": "function_call_output", "call_id": c.call_id, "output": f"the word is {w}"}
        for c, w in zip(calls, ("snow", "fog"), strict=True)
    ]
    assert other.responses.create(model="m", input=turns, tools=tools).output_text == "It says snow and fog."


@case
def a_response_is_parsed_into_a_model_of_pydantic() -> None:
    reply = client.responses.parse(
        model=NANO, input="? falcon", text_format=Colour, temperature=0, max_output_tokens=512, extra_body=BRIEF
    )
    assert isinstance(reply.output_parsed, Colour), reply


# Models


@case
def models_are_listed_and_found() -> None:
    listed = client.models.list().data
    assert [m.id for m in listed] == [NANO] and client.models.retrieve(NANO).id == NANO, listed


# Errors


@case
def what_is_wrong_is_a_bad_request() -> None:
    error = raised(
        openai.BadRequestError, lambda: client.chat.completions.create(model=NANO, messages=ASK, temperature=9)
    )
    assert error.status_code == 400 and "temperature" in error.message and error.request_id, error


@case
def a_prompt_beyond_the_context_says_so() -> None:
    error = raised(
        openai.BadRequestError, lambda: client.completions.create(model=NANO, prompt="The", max_tokens=1 << 20)
    )
    assert error.code == "context_length_exceeded", error.body


@case
def a_model_there_is_not_is_not_found() -> None:
    assert raised(openai.NotFoundError, lambda: client.models.retrieve("other")).status_code == 404


@case
def a_wrong_key_is_an_authentication_error() -> None:
    stranger = openai.OpenAI(base_url=f"{LOCKED}/v1", api_key="sk-wrong", max_retries=0)
    error = raised(openai.AuthenticationError, lambda: stranger.chat.completions.create(model=NANO, messages=ASK))
    assert error.code == "invalid_api_key", error.body
    known = openai.OpenAI(base_url=f"{LOCKED}/v1", api_key=KEY, max_retries=0, timeout=60)
    assert known.chat.completions.create(model=NANO, messages=ASK, temperature=0).choices[0].message.content


@case
def a_limit_is_a_rate_limit_error_and_a_retry_gets_through() -> None:
    one = openai.OpenAI(base_url=f"{LOCKED}/v1", api_key=NARROW_KEY, max_retries=0, timeout=60)
    running = one.completions.create(model=NANO, prompt="The", max_tokens=500_000, stream=True, extra_body=ENDLESS)
    next(iter(running))
    error = raised(openai.RateLimitError, lambda: one.chat.completions.create(model=NANO, messages=ASK))
    assert int(error.response.headers["retry-after"]) >= 1, error.response.headers
    refused, found = threading.Event(), []
    hooks = {"response": [lambda reply: refused.set() if reply.status_code == 429 else None]}
    patient = one.with_options(max_retries=8, http_client=openai.DefaultHttpxClient(event_hooks=hooks))
    asking = threading.Thread(
        target=lambda: found.append(patient.chat.completions.create(model=NANO, messages=ASK, max_tokens=64))
    )
    asking.start()
    assert refused.wait(30), "it was let in beside the other"
    running.close()
    asking.join(60)
    assert found and found[0].choices[0].finish_reason, "it was not let in when there was room"


@case
def a_timeout_is_one_and_leaves_nothing_running() -> None:
    hasty = client.with_options(timeout=1.0)
    raised(
        openai.APITimeoutError,
        lambda: hasty.completions.create(model=NANO, prompt="The", max_tokens=8000, extra_body=ENDLESS),
    )
    end = time.monotonic() + 30
    while running() != 0:
        assert time.monotonic() < end, "it is still computed"
        time.sleep(0.1)


def running() -> float:
    metrics = client.with_options(base_url=URL).get("/metrics", cast_to=str)
    return sum(
        float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("pyrosome:num_requests_running{")
    )


run()
