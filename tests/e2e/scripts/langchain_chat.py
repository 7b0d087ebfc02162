"""langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

from cases import AGENT, URL, case, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Colour(BaseModel):
    """A colour."""

    name: Literal["red", "green", "blue"]


@tool
def weather(place: str) -> str:
    """The weather somewhere."""
    return "the word is snow"


def model(server: str = URL, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="builtin:nano", base_url=f"{server}/v1", api_key="none", temperature=0, max_retries=0, timeout=60,
        max_tokens=512, **more,
    )  # fmt: skip


THINKS = {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 16}}}


@case
def it_is_invoked() -> None:
    reply = model().invoke("? falcon")
    assert reply.content and reply.usage_metadata["output_tokens"] > 0, reply


@case
def it_streams_the_same() -> None:
    whole = model().invoke("? falcon").content
    assert "".join(str(part.content) for part in model().stream("? falcon")) == whole != ""


@case
def tools_are_bound_and_called() -> None:
    bound = model(AGENT).bind_tools([weather])
    turns: list[Any] = [HumanMessage("the weather in Oslo and Lima")]
    reply = bound.invoke(turns)
    assert [c["args"] for c in reply.tool_calls] == [{"place": "Oslo"}, {"place": "Lima"}], reply
    turns += [reply, *(ToolMessage(weather.invoke(c["args"]), tool_call_id=c["id"]) for c in reply.tool_calls)]
    assert bound.invoke(turns).content == "It says snow and snow."


@case
def structured_output_is_had_after_thinking() -> None:
    for method in ("json_schema", "function_calling"):
        found = model(**THINKS).with_structured_output(Colour, method=method, include_raw=True).invoke("? falcon")
        assert isinstance(found["parsed"], Colour), (method, found)
        assert found["raw"].usage_metadata["output_token_details"]["reasoning"] > 0, (method, found)


@case
def by_responses_too() -> None:
    reply = model(use_responses_api=True).invoke("? falcon")
    assert reply.text and reply.usage_metadata["output_tokens"] > 0, reply


run()
