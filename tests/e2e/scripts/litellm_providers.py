"""litellm, by its providers for OpenAI's and Anthropic's protocols."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from cases import AGENT, URL, case, raised, run

ASK = [{"role": "user", "content": "? falcon"}]
PROVIDERS = (("openai/builtin:nano", "/v1"), ("anthropic/builtin:nano", ""), ("deepseek/builtin:nano", "/v1"))
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": PLACE}}]


def asked(model: str, path: str, server: str = URL, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "api_base": server + path, "api_key": "none", "messages": ASK, "max_tokens": 256,
        "temperature": 0, "num_retries": 0, "timeout": 60, **more,
    }  # fmt: skip


@case
def each_provider_completes() -> None:
    for provider in PROVIDERS:
        reply = litellm.completion(**asked(*provider))
        assert reply.choices[0].message.content and reply.choices[0].finish_reason == "stop", (provider, reply)
        assert reply.choices[0].message.reasoning_content, (provider, reply)
        assert reply.usage.completion_tokens > 0, reply


@case
def each_provider_streams_the_same() -> None:
    for provider in PROVIDERS:
        whole = litellm.completion(**asked(*provider)).choices[0].message
        said, thought = "", ""
        for chunk in litellm.completion(**asked(*provider), stream=True):
            delta = chunk.choices[0].delta
            said += delta.content or ""
            thought += getattr(delta, "reasoning_content", None) or ""
        assert (said, thought) == (whole.content, whole.reasoning_content), (provider, said, thought, whole)


@case
def each_provider_has_tools_called_and_takes_results() -> None:
    for model, path in PROVIDERS:
        turns: list[Any] = [{"role": "user", "content": "the weather in Oslo and Lima"}]
        more = {"server": AGENT, "tools": TOOLS}
        chunks = list(litellm.completion(**asked(model, path, **more) | {"messages": turns}, stream=True))
        message = litellm.stream_chunk_builder(chunks).choices[0].message
        calls = message.tool_calls
        assert [json.loads(c.function.arguments)["place"] for c in calls] == ["Oslo", "Lima"], (model, message)
        results = [
            {"role": "tool", "tool_call_id": c.id, "content": f"the word is {w}"}
            for c, w in zip(calls, ("snow", "fog"), strict=True)
        ]
        turns += [message.model_dump(exclude_none=True), *results]
        last = litellm.completion(**asked(model, path, **more) | {"messages": turns})
        assert last.choices[0].message.content == "It says snow and fog.", (model, last)


@case
def a_bad_request_is_one() -> None:
    for provider in PROVIDERS[:2]:
        wrong = asked(*provider) | {"temperature": 9}
        error = raised(litellm.BadRequestError, lambda wrong=wrong: litellm.completion(**wrong))
        assert "temperature" in str(error), error


@case
def asynchronous_completions_run_side_by_side() -> None:
    async def many() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**asked(*PROVIDERS[0])) for _ in range(4)))

    assert len({r.choices[0].message.content for r in asyncio.run(many())}) == 1


run()
