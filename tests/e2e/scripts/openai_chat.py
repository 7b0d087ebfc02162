"""The official Python client on chat completions."""

from __future__ import annotations

import json
from typing import Literal

import openai
from cases import URL, case, run
from pydantic import BaseModel

ASK = [{"role": "user", "content": "? falcon"}]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)


@case
def an_answer_in_one_piece() -> None:
    reply = client.chat.completions.create(model="builtin:nano", messages=ASK, max_tokens=24, temperature=0)
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and reply.model == "builtin:nano", reply
    assert choice.finish_reason in {"stop", "length"}, choice
    assert choice.message.content or choice.message.reasoning_content, choice
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and 0 < usage.completion_tokens <= 24
    assert reply.system_fingerprint, reply


@case
def a_stream_is_the_same_answer() -> None:
    asked = {"model": "builtin:nano", "messages": ASK, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    said, thought, reasons, usage = "", "", [], []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage += [chunk.usage] if chunk.usage else []
        for part in chunk.choices:
            said += part.delta.content or ""
            thought += getattr(part.delta, "reasoning_content", None) or ""
            reasons += [part.finish_reason] if part.finish_reason else []
    assert (said, thought) == (whole.message.content, whole.message.reasoning_content), (said, thought, whole)
    assert reasons == [whole.finish_reason] and len(usage) == 1 and usage[0].completion_tokens > 0, (reasons, usage)


run()
