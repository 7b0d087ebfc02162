"""OpenAI's chat completions, as DeepSeek's API speaks them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pyrosome.chat.events import ContentDelta, Done, Message, ReasoningDelta, ToolCallDelta, ToolCallStart, Usage
from pyrosome.server.caller import GENERATE
from pyrosome.server.exchange import Exchange, Said, StillHere
from pyrosome.server.problems import OPENAI, Problem
from pyrosome.server.routes import answered, body_of, caller_of, chat_exchange, paths, rendered, service_of
from pyrosome.server.shape import Shape, fingerprint, frame


def router() -> APIRouter:
    """The routes of chat completions."""
    routes = APIRouter(tags=["chat completions"])

    async def create(request: Request) -> Response:
        caller = await caller_of(request, GENERATE)
        body = await body_of(request)
        prompt, exchange = await chat_exchange(request, body, caller, "chat_completions", "chatcmpl-")
        options = service_of(request).options
        shape = ChatShape(
            exchange,
            thinks=prompt.thinking,
            trailing_usage=_includes_usage(body) and not options.compat,
            reasoning_field=options.reasoning_field,
            tells=not options.compat,
        )
        return await answered(exchange, shape, stream=prompt.stream, mode=prompt.mode)

    async def render(request: Request) -> Response:
        return await rendered(request, "chat_completions")

    for n, path in enumerate(paths("/chat/completions")):
        routes.add_api_route(path, create, methods=["POST"], include_in_schema=n == 0, summary="Answer a conversation")
    for n, path in enumerate(paths("/chat/completions/render")):
        routes.add_api_route(path, render, methods=["POST"], include_in_schema=n == 0, summary="Show its prompt")
    return routes


class ChatShape(Shape):
    """`chat.completion` and its chunks.

    Args:
        thinks: thoughts are expected.
        trailing_usage: usage comes in a chunk of its own, without choices, as OpenAI sends it where it is asked for.
        reasoning_field: thoughts are given as `reasoning` too.
        tells: the effective mode and seed are told.
    """

    def __init__(
        self, exchange: Exchange, *, thinks: bool, trailing_usage: bool, reasoning_field: bool, tells: bool
    ) -> None:
        super().__init__(exchange)
        self._thinks, self._trailing_usage, self._reasoning_field = thinks, trailing_usage, reasoning_field
        self._tells = tells
        self._num_calls = [0] * len(self.asked.readers)

    def begin(self) -> list[bytes]:
        """The role, of every choice."""
        delta: dict[str, Any] = {"role": "assistant", "content": "" if not self._thinks else None}
        if self._thinks:
            delta |= self._thought("")
        return [self._chunk(i, delta) for i in range(len(self.asked.readers))]

    def said(self, said: Said) -> list[bytes]:
        """A part of an answer, as a chunk."""
        event = said.event
        if isinstance(event, ReasoningDelta):
            return [self._chunk(said.index, {"content": None, **self._thought(event.text)}, said=said)]
        if isinstance(event, ContentDelta):
            delta = {"content": event.text} | ({"reasoning_content": None} if self._thinks else {})
            return [self._chunk(said.index, delta, said=said)]
        if isinstance(event, ToolCallStart):
            call = {"index": event.index, "id": event.id, "type": "function"}
            return [
                self._chunk(said.index, {"tool_calls": [call | {"function": {"name": event.name, "arguments": ""}}]})
            ]
        if isinstance(event, ToolCallDelta):
            call = {"index": event.index, "function": {"arguments": event.arguments}}
            return [self._chunk(said.index, {"tool_calls": [call]})]
        if isinstance(event, Done):
            is_last = said.index == len(self.asked.readers) - 1
            extra: dict[str, Any] = {}
            if is_last and not self._trailing_usage:
                extra["usage"] = usage_of(self.outcome.usage, thinks=self._thinks)
            if is_last and self._tells:
                extra["pyrosome"] = self._told()
            reason = finish_reason(event.message)
            return [self._chunk(said.index, {"content": ""}, reason=reason, extra=extra)]
        return []

    def still_here(self, here: StillHere) -> list[bytes]:
        """A comment, and an empty delta, since clients' deadlines do not heed comments."""
        progress = here.progress
        text = f": {progress.computed_tokens} of {progress.prompt_tokens} prompt tokens\n\n" if progress else ""
        return [text.encode() or b": keep-alive\n\n", self._chunk(0, {})]

    def end(self) -> list[bytes]:
        """Usage, where it was asked for, and the end."""
        last = [b"data: [DONE]\n\n"]
        if self._trailing_usage:
            usage = usage_of(self.outcome.usage, thinks=self._thinks)
            last.insert(0, frame({**self._head(), "choices": [], "usage": usage}))
        return last

    def failed(self, problem: Problem) -> list[bytes]:
        """An error chunk, and the end."""
        return [frame(problem.body(OPENAI)), b"data: [DONE]\n\n"]

    def whole(self) -> dict[str, Any]:
        """The `chat.completion`."""
        choices = []
        for index, message in enumerate(self.outcome.messages):
            written: dict[str, Any] = {"role": "assistant", "content": message.content}
            if self._thinks:
                written |= self._thought(message.reasoning)
            if message.tool_calls:
                written["tool_calls"] = [
                    {"index": n, "id": c.id, "type": "function",
                     "function": {"name": c.name, "arguments": c.arguments}}
                    for n, c in enumerate(message.tool_calls)
                ]  # fmt: skip
            choices.append(
                {"index": index, "message": written, "logprobs": None, "finish_reason": finish_reason(message)}
            )
        body = {**self._head("chat.completion"), "choices": choices}
        body["usage"] = usage_of(self.outcome.usage, thinks=self._thinks)
        return body | ({"pyrosome": self._told()} if self._tells else {})

    def _thought(self, text: str) -> dict[str, Any]:
        return {"reasoning_content": text} | ({"reasoning": text} if self._reasoning_field else {})

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {
            "id": self.outcome.id, "object": kind, "created": self.outcome.created, "model": self.asked.model,
            "system_fingerprint": fingerprint(self.outcome),
        }  # fmt: skip

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        said: Said | None = None,
        reason: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return frame({**self._head(), "choices": [choice], **(extra or {})})

    def _told(self) -> dict[str, Any]:
        return {"mode": self.asked.mode, "seed": self.outcome.seed}


def usage_of(usage: Usage, *, thinks: bool) -> dict[str, Any]:
    """Usage, with DeepSeek's and OpenAI's names for what the cache gave."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
    if thinks:
        found["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return found


def finish_reason(message: Message) -> str:
    """OpenAI's name for why an answer ended; a loop that was cut is a length reached."""
    return {"repetition": "length", "abort": "stop"}.get(message.finish_reason, message.finish_reason)


def _includes_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True
