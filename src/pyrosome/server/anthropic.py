"""Anthropic's messages: whole, streamed, counted.

A stream is a series of blocks that never overlap: thoughts, text, and one for each tool call, in this order.
"""

from __future__ import annotations

import json
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome.chat.carried import carry
from pyrosome.chat.events import (
    ContentDelta,
    Done,
    Event,
    Message,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)  # fmt: skip
from pyrosome.errors import ContextTooLong
from pyrosome.server.anthropic_schema import COUNT, COUNTED, MESSAGE, MESSAGES
from pyrosome.server.caller import GENERATE
from pyrosome.server.exchange import Exchange, Said, StillHere
from pyrosome.server.openai_schema import RENDERED
from pyrosome.server.openapi import described
from pyrosome.server.problems import ANTHROPIC, Problem, Refused
from pyrosome.server.routes import (
    add,
    answered,
    body_of,
    caller_of,
    chat_exchange,
    of_one_answer,
    rendered,
    salt_of,
    service_of,
)
from pyrosome.server.shape import Shape, frame, progress_of

PREFIXES = ("/v1", "", "/anthropic/v1", "/anthropic")
_STOP_REASONS = {"tool_calls": "tool_use", "length": "max_tokens", "repetition": "max_tokens"}


def router() -> APIRouter:
    """The routes of messages."""
    routes = APIRouter(tags=["messages"])

    async def create(request: Request) -> Response:
        caller = await caller_of(request, GENERATE)
        body = of_one_answer(await body_of(request))
        official = bool(service_of(request).options.compat)
        try:
            prompt, exchange = await chat_exchange(request, body, caller, "messages", "msg_")
        except ContextTooLong as error:
            # In these words, because clients that shorten their history by themselves look for them.
            raise Refused(
                400,
                f"prompt is too long: {error.asked_tokens} tokens > {error.max_tokens} maximum; {error.hint}",
                code="context_length_exceeded",
            ) from None
        shape = MessagesShape(exchange, official=official, shows_thoughts=official or not _hides_thoughts(body))
        reply = await answered(exchange, shape, stream=prompt.stream, mode=prompt.mode)
        reply.headers["request-id"] = exchange.id
        return reply

    async def count(request: Request) -> Response:
        caller = await caller_of(request, GENERATE)
        body = {k: v for k, v in (await body_of(request)).items() if k != "max_tokens"}
        service = service_of(request)
        service.name_for(body.get("model"))
        try:
            num_tokens = len((await service.render(body, "messages", salt_of(caller, body))).ids)
        except ContextTooLong as error:
            num_tokens = error.asked_tokens  # the prompt's alone, since no answer was asked for
        return JSONResponse({"input_tokens": num_tokens})

    async def render(request: Request) -> Response:
        return await rendered(request, "messages")

    for suffix, route, summary, about in (
        ("/messages", create, "Answer a conversation", described(MESSAGES, ok=MESSAGE, shape=ANTHROPIC)),
        ("/messages/count_tokens", count, "Count its tokens", described(COUNT, ok=COUNTED, shape=ANTHROPIC)),
        ("/messages/render", render, "Show its prompt", described(COUNT, ok=RENDERED, shape=ANTHROPIC)),
    ):
        add(routes, [prefix + suffix for prefix in PREFIXES], route, summary=summary, **about)
    return routes


class MessagesShape(Shape):
    """`message` and its stream of blocks.

    Args:
        official: as the official API writes it, without a word about mode and seed.
        shows_thoughts: else a block of thoughts is empty, and its signature holds them.
    """

    def __init__(self, exchange: Exchange, *, official: bool, shows_thoughts: bool) -> None:
        super().__init__(exchange)
        self._official, self._shows_thoughts = official, shows_thoughts
        self._content: list[dict[str, Any]] = []  # blocks so far
        self._is_open = False  # the last of them
        self._thoughts: list[str] = []

    def begin(self) -> list[bytes]:
        """The message without content; how much of its prompt the cache holds is not known yet."""
        usage = usage_of(Usage(len(self.asked.request.ids), 0, 0), official=True)
        message = self._message([], None, None, usage)
        return [_event("message_start", message=message)]

    def said(self, said: Said) -> list[bytes]:
        """A part of the answer: its block is opened where another was open, and then it grows."""
        event = said.event
        if isinstance(event, Done):
            return [*self._close(), self._delta(event)]
        frames = self._opened(event)
        if isinstance(event, ReasoningDelta):
            self._thoughts.append(event.text)
            delta = {"type": "thinking_delta", "thinking": event.text} if self._shows_thoughts else None
        elif isinstance(event, ContentDelta):
            delta = {"type": "text_delta", "text": event.text}
        elif isinstance(event, ToolCallDelta):
            delta = {"type": "input_json_delta", "partial_json": event.arguments}
        else:
            delta = None
        if delta:
            frames.append(_event("content_block_delta", index=len(self._content) - 1, delta=delta))
        return frames

    def still_here(self, here: StillHere) -> list[bytes]:
        """A ping, which clients' deadlines heed, and a comment for people."""
        return [progress_of(here), _event("ping")]

    def end(self) -> list[bytes]:
        """The end."""
        return [_event("message_stop")]

    def failed(self, problem: Problem) -> list[bytes]:
        """An error; nothing follows it."""
        return [frame(problem.body(ANTHROPIC), "error")]

    def whole(self) -> dict[str, Any]:
        """The `message`.  What a client puts together from the stream is the same."""
        message = self.outcome.messages[0]
        content: list[dict[str, Any]] = []
        if message.reasoning:
            shown = message.reasoning if self._shows_thoughts else ""
            content.append({"type": "thinking", "thinking": shown, "signature": self._signature(message.reasoning)})
        if message.content:
            content.append({"type": "text", "text": message.content})
        content += [
            {"type": "tool_use", "id": c.id, "name": c.name, "input": self._input(c.arguments)}
            for c in message.tool_calls
        ]
        usage = usage_of(self.outcome.usage, official=self._official)
        body = self._message(content, stop_reason(message), message.stop_sequence, usage)
        return body | self._told()

    def _opened(self, event: Event) -> list[bytes]:
        block: dict[str, Any]
        if isinstance(event, ReasoningDelta):
            block = {"type": "thinking", "thinking": "", "signature": self.outcome.id if self._official else ""}
        elif isinstance(event, ContentDelta):
            block = {"type": "text", "text": ""}
        elif isinstance(event, ToolCallStart):
            block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        else:
            return []
        if self._is_open and block["type"] == self._content[-1]["type"] != "tool_use":
            return []
        frames = self._close()
        self._content.append(block)
        self._is_open = True
        frames.append(_event("content_block_start", index=len(self._content) - 1, content_block=block))
        return [*frames, _event("ping")] if len(self._content) == 1 else frames

    def _close(self) -> list[bytes]:
        if not self._is_open:
            return []
        self._is_open = False
        index = len(self._content) - 1
        frames = [_event("content_block_stop", index=index)]
        if self._content[-1]["type"] == "thinking":
            delta = {"type": "signature_delta", "signature": self._signature("".join(self._thoughts))}
            frames.insert(0, _event("content_block_delta", index=index, delta=delta))
        return frames

    def _input(self, arguments: str) -> dict[str, Any]:
        found = input_of(arguments)
        return {} if self._official and not _is_complete(arguments) else found

    def _signature(self, thoughts: str) -> str:
        return self.outcome.id if self._shows_thoughts else carry(thoughts)

    def _delta(self, done: Done) -> bytes:
        delta = {"stop_reason": stop_reason(done.message), "stop_sequence": done.message.stop_sequence}
        usage = usage_of(self.outcome.usage, official=self._official)
        return _event("message_delta", delta=delta, usage=usage, **self._told())

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self.outcome.id, "type": "message", "role": "assistant", "model": self.asked.model,
            "content": content, "stop_reason": reason, "stop_sequence": sequence, "usage": usage,
        }  # fmt: skip

    def _told(self) -> dict[str, Any]:
        return {} if self._official else self.told()


def usage_of(usage: Usage, *, official: bool) -> dict[str, Any]:
    """Usage in Anthropic's words: `input_tokens` are those that had to be computed."""
    found: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "service_tier": "standard",
    }
    return found if official else {**found, "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}}


def stop_reason(message: Message) -> str:
    """Why an answer ended, in Anthropic's words; a loop that was cut is a length reached."""
    if message.finish_reason == "stop" and message.stop_sequence is not None:
        return "stop_sequence"
    return _STOP_REASONS.get(message.finish_reason, "end_turn")


def input_of(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object.

    Of arguments that were cut short, what is complete: the same as Anthropic's own client makes of a stream.
    """
    try:
        value = pydantic_core.from_json(arguments, allow_partial=True)
    except ValueError:
        try:
            value = json.loads(arguments)  # it takes half of a surrogate pair, too
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _is_complete(arguments: str) -> bool:
    try:
        pydantic_core.from_json(arguments)
    except ValueError:
        return False
    return True


def _event(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)


def _hides_thoughts(body: dict[str, Any]) -> bool:
    thinking = body.get("thinking")
    return isinstance(thinking, dict) and thinking.get("display") == "omitted"
