"""OpenAI's chat completions, as DeepSeek's API speaks them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pyrosome.answer import TokenLog
from pyrosome.chat import Tokenizer
from pyrosome.chat.events import ContentDelta, Done, Event, Message, ReasoningDelta, ToolCallDelta, ToolCallStart, Usage
from pyrosome.chat.prompt import Prompt
from pyrosome.server.caller import GENERATE
from pyrosome.server.exchange import Exchange, Said, StillHere
from pyrosome.server.logprobs import prompt_entries, token_entries
from pyrosome.server.openai_schema import CHAT, CHAT_ANSWER, RENDERED
from pyrosome.server.openapi import described
from pyrosome.server.problems import OPENAI, Problem
from pyrosome.server.routes import (
    add,
    answered,
    body_of,
    caller_of,
    chat_exchange,
    must_be_bool,
    paths,
    rendered,
    service_of,
)
from pyrosome.server.service import Service
from pyrosome.server.shape import DONE, KEEP_ALIVE, Shape, fingerprint, frame, progress_of
from pyrosome.server.unsupported import refuse_unsupported


def router() -> APIRouter:
    """The routes of chat completions."""
    routes = APIRouter(tags=["chat completions"])

    async def create(request: Request) -> Response:
        caller = await caller_of(request, GENERATE)
        body = await body_of(request)
        service = service_of(request)
        form = chat_form(service, body)
        prompt, exchange = await chat_exchange(request, body, caller, "chat_completions", "chatcmpl-")
        shape = ChatShape(exchange, form.of(prompt), service.chat.tokenizer)
        return await answered(exchange, shape, stream=prompt.stream, mode=prompt.mode)

    async def render(request: Request) -> Response:
        return await rendered(request, "chat_completions", chat_form)

    for suffix, route, summary, ok in (
        ("/chat/completions", create, "Answer a conversation", CHAT_ANSWER),
        ("/chat/completions/render", render, "Show the prompt of a conversation", RENDERED),
    ):
        add(routes, paths(suffix), route, summary=summary, **described(CHAT, ok=ok))
    return routes


@dataclasses.dataclass(frozen=True, slots=True)
class ChatForm:
    """What an answer holds, and in which words."""

    thinks: bool = False  # thoughts are expected
    shows_thoughts: bool = True  # and given
    reasoning_field: bool = False  # as `reasoning` too
    official: bool = False  # to the letter of DeepSeek's API: nothing beside
    usage: bool = True  # on the last chunk of a stream
    trailing_usage: bool = False  # or in a chunk of its own, as OpenAI sends it where it is asked for
    token_ids: bool = False  # the prompt's ids and the answer's, and its text as the model wrote it
    top_logprobs: int | None = None  # so many beside each token's own log probability; None: not even that
    prompt_logprobs: bool = False
    keep_alive_s: float = 10.0  # while thoughts that are not given are written, a sign of life so often

    def of(self, prompt: Prompt) -> ChatForm:
        """For the answer to a prompt."""
        sampling = prompt.sampling
        top = (sampling.top_logprobs or 0) if sampling.logprobs else None
        return dataclasses.replace(self, thinks=prompt.thinking, top_logprobs=top)


def chat_form(service: Service, body: dict[str, Any]) -> ChatForm:
    """The form a request asks for.

    Raises:
        RequestError: a field of a wrong type, or one that is not carried out here.
    """
    options = service.options
    if options.compat:
        return ChatForm(official=True)
    refuse_unsupported(body)
    stream_options, reasoning = body.get("stream_options"), body.get("reasoning")
    asks = stream_options.get("include_usage") if isinstance(stream_options, dict) else None
    is_excluded = isinstance(reasoning, dict) and reasoning.get("exclude") is True
    hides = body.get("include_reasoning") is not None and not must_be_bool(body, "include_reasoning")
    return ChatForm(
        shows_thoughts=not (hides or is_excluded),
        reasoning_field=options.reasoning_field,
        usage=asks is not False,
        trailing_usage=asks is True,
        token_ids=must_be_bool(body, "return_token_ids"),
        prompt_logprobs=body.get("prompt_logprobs") is not None,
        keep_alive_s=options.keep_alive_s,
    )


class ChatShape(Shape):
    """`chat.completion` and its chunks."""

    def __init__(self, exchange: Exchange, form: ChatForm, tokenizer: Tokenizer) -> None:
        super().__init__(exchange)
        self._form, self._tokenizer = form, tokenizer
        self._thoughts = form.thinks and form.shows_thoughts
        self._num_told = [0] * len(self.asked.readers)  # ids of each answer that were given with a chunk
        self._spoke = time.monotonic()

    # A stream

    def begin(self) -> list[bytes]:
        """The role, of every choice."""
        chunks = []
        for index in range(len(self.asked.readers)):
            extra = self._prompt_told() if index == 0 and self._form.token_ids else {}
            chunks.append(self._chunk(index, {"role": "assistant", **self._idle()}, extra=extra))
        return chunks

    def said(self, said: Said) -> list[bytes]:
        """A part of an answer, as a chunk; nothing for thoughts that are not shown."""
        event = said.event
        if isinstance(event, Done):
            return [self._finish(said.index, event)]
        if isinstance(event, ReasoningDelta) and not self._thoughts:
            return self._unheard()
        self._spoke = time.monotonic()
        return [self._chunk(said.index, self._delta(event), logprobs=self._logprobs_of(said))]

    def still_here(self, here: StillHere) -> list[bytes]:
        """A comment, and an idle delta where the official API sends none, since clients' deadlines heed no comments."""
        comment = progress_of(here) or KEEP_ALIVE
        return [comment, *([] if self._form.official else [self._chunk(0, self._idle())])]

    def end(self) -> list[bytes]:
        """Usage, where it was asked for, and the end."""
        if not self._form.trailing_usage:
            return [DONE]
        return [frame({**self._head(), "choices": [], "usage": self._usage()}), DONE]

    def failed(self, problem: Problem) -> list[bytes]:
        """An error chunk, and the end."""
        return [frame(problem.body(OPENAI)), DONE]

    # The answer in one piece

    def whole(self) -> dict[str, Any]:
        """The `chat.completion`."""
        done = enumerate(self.outcome.messages)
        body = {**self._head("chat.completion"), "choices": [self._choice(n, m) for n, m in done]}
        body["usage"] = self._usage()
        return body | (self._prompt_told() if self._form.token_ids else {}) | self._told()

    def _choice(self, index: int, message: Message) -> dict[str, Any]:
        written: dict[str, Any] = {"role": "assistant", "content": message.content}
        if self._thoughts:
            written |= self._thought(message.reasoning)
        if message.tool_calls:
            written["tool_calls"] = [
                {"index": n, "id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for n, c in enumerate(message.tool_calls)
            ]
        choice = {"index": index, "message": written, "logprobs": self._all_logprobs(index)}
        return choice | {"finish_reason": finish_reason(message)} | self._ended(index, message)

    def _all_logprobs(self, index: int) -> dict[str, Any] | None:
        if self._form.top_logprobs is None:
            return None
        logs = self.outcome.logs[index]
        found = {"content": [log for kind, log in logs if kind == "content"]}
        if self._thoughts:
            found["reasoning_content"] = [log for kind, log in logs if kind == "reasoning"]
        # The official API leaves out the list of a channel nothing was said in; OpenAI's always has `content`.
        kept = {k: self._entries(v) for k, v in found.items() if v or not self._form.official}
        return kept or None

    # Parts

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, ReasoningDelta):
            return {"content": None, **self._thought(event.text)}
        if isinstance(event, ContentDelta):
            return {"content": event.text} | self._no_thought()
        if isinstance(event, ToolCallStart):
            call = {"index": event.index, "id": event.id, "type": "function"}
            return {"tool_calls": [call | {"function": {"name": event.name, "arguments": ""}}]}
        assert isinstance(event, ToolCallDelta)
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}

    def _finish(self, index: int, done: Done) -> bytes:
        is_last = index == len(self.asked.readers) - 1
        extra: dict[str, Any] = {}
        if is_last and self._form.usage and not self._form.trailing_usage:
            extra["usage"] = self._usage()
        if is_last:
            extra |= self._told()
        reason, delta = finish_reason(done.message), {"content": "", **self._no_thought()}
        return self._chunk(index, delta, reason=reason, ended=self._ended(index, done.message), extra=extra)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        ended: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if self._form.token_ids:
            ids = self.asked.readers[index].ids
            choice["token_ids"], self._num_told[index] = ids[self._num_told[index] :], len(ids)
        usage = {"usage": None} if self._form.trailing_usage else {}
        return frame({**self._head(), "choices": [choice | (ended or {})], **usage, **(extra or {})})

    def _unheard(self) -> list[bytes]:
        if time.monotonic() - self._spoke < self._form.keep_alive_s:
            return []
        self._spoke = time.monotonic()
        return [b": keep-alive\n\n", self._chunk(0, self._idle())]

    def _idle(self) -> dict[str, Any]:
        return {"content": None, **self._thought("")} if self._thoughts else {"content": ""}

    def _thought(self, text: str | None) -> dict[str, Any]:
        return {"reasoning_content": text} | ({"reasoning": text} if self._form.reasoning_field else {})

    def _no_thought(self) -> dict[str, Any]:
        return self._thought(None) if self._thoughts else {}

    def _logprobs_of(self, said: Said) -> dict[str, Any] | None:
        if self._form.top_logprobs is None or not said.tokens:
            return None
        name = "reasoning_content" if isinstance(said.event, ReasoningDelta) else "content"
        return {name: self._entries(said.tokens)}

    def _entries(self, logs: list[TokenLog] | Any) -> list[dict[str, Any]]:
        return token_entries(self._tokenizer, logs, self._form.top_logprobs or 0)

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {
            "id": self.outcome.id, "object": kind, "created": self.outcome.created, "model": self.asked.model,
            "system_fingerprint": fingerprint(self.outcome),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.outcome.usage, thinks=self._form.thinks)

    def _ended(self, index: int, message: Message) -> dict[str, Any]:
        """What is told of an answer beside why it ended."""
        found: dict[str, Any] = {}
        if self._form.official:
            return found
        if stop := "repetition" if message.finish_reason == "repetition" else message.stop_sequence:
            found["stop_reason"] = stop
        if message.malformed:
            found["malformed"] = list(message.malformed)
        if self._form.token_ids:
            ids = self.asked.readers[index].ids
            found |= {"token_ids": ids[self._num_told[index] :], "raw_text": self._tokenizer.decode(ids)}
        return found

    def _told(self) -> dict[str, Any]:
        if self._form.official:
            return {}
        found = self.told()
        if self._form.prompt_logprobs:
            found["prompt_logprobs"] = prompt_entries(self._tokenizer, self.outcome.prompt_logprobs)
        return found

    def _prompt_told(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.asked.request.ids)}


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
