"""OpenAI's responses: whole and streamed.  Nothing is kept: every request holds its whole conversation."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pyrosome.chat.events import ContentDelta, Done, Message, ReasoningDelta, ToolCallDelta, ToolCallStart, Usage
from pyrosome.chat.prompt import Prompt
from pyrosome.chat.tokenizer import Tokenizer
from pyrosome.server.caller import GENERATE
from pyrosome.server.exchange import Exchange, Said, StillHere
from pyrosome.server.logprobs import token_entries
from pyrosome.server.openai_schema import RENDERED
from pyrosome.server.openapi import described
from pyrosome.server.problems import OPENAI, Problem, Refused
from pyrosome.server.response_items import Entries, Frames, Items, Manner
from pyrosome.server.responses_schema import RESPONSE, RESPONSES
from pyrosome.server.routes import (
    add,
    answered,
    body_of,
    caller_of,
    chat_exchange,
    of_one_answer,
    paths,
    rendered,
    service_of,
)
from pyrosome.server.shape import Shape, frame, progress_of

_CUT_SHORT = ("length", "repetition")


def router() -> APIRouter:
    """The routes of responses."""
    routes = APIRouter(tags=["responses"])

    async def create(request: Request) -> Response:
        caller = await caller_of(request, GENERATE)
        body = of_one_answer(await body_of(request))
        service = service_of(request)
        prompt, exchange = await chat_exchange(request, body, caller, "responses", "resp_")
        shape = ResponsesShape(exchange, prompt, service.chat.tokenizer, official=bool(service.options.compat))
        return await answered(exchange, shape, stream=prompt.stream, mode=prompt.mode)

    async def render(request: Request) -> Response:
        return await rendered(request, "responses")

    async def stored(request: Request, response_id: str) -> Response:
        await caller_of(request, GENERATE)
        raise Refused(
            404, f"there is no response {response_id!r}: none is kept here; what was answered is all there is of it"
        )

    for suffix, route, method, summary, about in (
        ("/responses", create, "POST", "Answer a conversation", described(RESPONSES, ok=RESPONSE)),
        ("/responses/render", render, "POST", "Show its prompt", described(RESPONSES, ok=RENDERED)),
        ("/responses/{response_id}", stored, "GET", "None is kept", described({})),
    ):
        add(routes, paths(suffix), route, method, summary=summary, response_model=None, **about)
    return routes


class ResponsesShape(Shape):
    """`response` and the events of its stream, numbered from 0.

    Args:
        official: as the official API writes it.
    """

    def __init__(self, exchange: Exchange, prompt: Prompt, tokenizer: Tokenizer, *, official: bool) -> None:
        super().__init__(exchange)
        self._official, self._tokenizer = official, tokenizer
        self._num_top = (prompt.sampling.top_logprobs or 0) if prompt.sampling.logprobs else None
        self._manner = _manner_of(self.asked.body, official=official)
        self._items = Items(self.outcome.id, self._manner)
        self._echoed = _echo(self.asked.body, exchange, official=official)
        self._number = 0

    def begin(self) -> list[bytes]:
        """The response without output, twice, as OpenAI does."""
        empty = self._response("in_progress", [])
        return self._frames([("response.created", {"response": empty}), ("response.in_progress", {"response": empty})])

    def said(self, said: Said) -> list[bytes]:
        """A part of the answer; with the last one, the whole response."""
        if not isinstance(said.event, Done):
            return self._frames(self._items.take(said.event, self._entries(said.tokens)))
        status = _status(said.event.message)
        frames = self._items.close(status)
        response = self._response(status, self._items.done, message=said.event.message)
        return self._frames([*frames, (f"response.{status}", {"response": response})])

    def still_here(self, here: StillHere) -> list[bytes]:
        """That it is in progress, once more, and a comment for people."""
        now = self._response("in_progress", self._items.done)
        return [progress_of(here), *self._frames([("response.in_progress", {"response": now})])]

    def end(self) -> list[bytes]:
        """Nothing: the last event was the end."""
        return []

    def failed(self, problem: Problem) -> list[bytes]:
        """The response as far as it came, and why no further."""
        error = problem.body(OPENAI)["error"]
        code = "server_error" if problem.status >= 500 else error["code"]
        told = {"code": code, "message": error["message"]}
        response = self._response("failed", self._items.shown, error=told)
        return self._frames([("response.failed", {"response": response})])

    def whole(self) -> dict[str, Any]:
        """The `response`, made of the same items as the stream."""
        message = self.outcome.messages[0]
        items = Items(self.outcome.id, self._manner)
        if message.reasoning:
            items.take(ReasoningDelta(message.reasoning))
        if message.content:
            logs = [log for kind, log in self.outcome.logs[0] if kind == "content"]
            items.take(ContentDelta(message.content), self._entries(logs))
        for index, call in enumerate(message.tool_calls):
            items.take(ToolCallStart(index, call.id, call.name))
            items.take(ToolCallDelta(index, call.arguments))
        status = _status(message)
        items.close(status)
        return self._response(status, items.done, message=message)

    def _entries(self, tokens: Any) -> Entries:
        return [] if self._num_top is None else token_entries(self._tokenizer, tokens, self._num_top)

    def _frames(self, frames: Frames) -> list[bytes]:
        out = []
        for kind, fields in frames:
            out.append(frame({"type": kind, **fields, "sequence_number": self._number}, kind))
            self._number += 1
        return out

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]],
        *,
        message: Message | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        is_cut = message is not None and message.finish_reason in _CUT_SHORT
        return {
            "id": self.outcome.id,
            "object": "response",
            "created_at": self.outcome.created,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.asked.model,
            "output": list(output),
            "usage": usage_of(self.outcome.usage, official=self._official) if message else None,
            **self._echoed,
            **({} if self._official else self.told()),
        }


def usage_of(usage: Usage, *, official: bool) -> dict[str, Any]:
    """Usage in the words of responses; nothing is charged for what is written to the cache."""
    cached = {"cached_tokens": usage.cached_tokens}
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": cached if official else {**cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _status(message: Message) -> str:
    return "incomplete" if message.finish_reason in _CUT_SHORT else "completed"


def _manner_of(body: dict[str, Any], *, official: bool) -> Manner:
    free_text, namespaces = set(), {}
    for tool in _dicts(body.get("tools")):
        if tool.get("type") == "custom":
            free_text.add(str(tool.get("name")))
        elif tool.get("type") == "namespace":
            space = str(tool.get("name"))
            joint = "" if space.endswith("_") else "__"  # as the template names them
            for inner in _dicts(tool.get("tools")):
                namespaces[f"{space}{joint}{inner.get('name')}"] = (space, str(inner.get("name")))
    reasoning, include = body.get("reasoning"), body.get("include")
    return Manner(
        frozenset(free_text),
        namespaces,
        summarizes=not official and isinstance(reasoning, dict) and reasoning.get("summary") is not None,
        carries=not official and isinstance(include, list) and "reasoning.encrypted_content" in include,
        official=official,
    )


def _echo(body: dict[str, Any], exchange: Exchange, *, official: bool) -> dict[str, Any]:
    """What a response repeats of its request; what was left open as it was taken."""
    asked, params = exchange.asked, exchange.asked.request.params
    reasoning = body.get("reasoning") if isinstance(body.get("reasoning"), dict) else {}
    text = body.get("text") if isinstance(body.get("text"), dict) else {}
    assert isinstance(reasoning, dict) and isinstance(text, dict)
    effort = reasoning.get("effort") or ("none" if asked.mode == "off" else asked.mode)
    temperature, top_p = (1.0, 1.0) if official else (params.temperature, params.top_p)
    found: dict[str, Any] = {
        "background": False, "content_filters": None, "frequency_penalty": body.get("frequency_penalty") or 0.0,
        "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"), "moderation": None,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "presence_penalty": body.get("presence_penalty") or 0.0, "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"), "prompt_cache_retention": None,
        "reasoning": {"effort": effort, "summary": reasoning.get("summary")},
        "safety_identifier": body.get("safety_identifier"), "service_tier": "default", "store": False,
        "temperature": temperature if body.get("temperature") is None else body["temperature"],
        "text": {"format": {"type": "text"}, "verbosity": None} | text,
        "tool_choice": body.get("tool_choice") or "auto", "tools": [_whole_tool(t) for t in _dicts(body.get("tools"))],
        "top_logprobs": body.get("top_logprobs") or 0,
        "top_p": top_p if body.get("top_p") is None else body["top_p"], "truncation": "disabled",
        "user": body.get("user"), "metadata": body.get("metadata") or {},
    }  # fmt: skip
    return found


def _whole_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields that were left out, as OpenAI echoes it."""
    found = dict(tool)
    if tool.get("type") == "function":
        found = {"description": None, "parameters": None, "strict": None, **tool}
    if isinstance(tool.get("tools"), list):
        found["tools"] = [_whole_tool(t) for t in _dicts(tool["tools"])]
    return found


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []
