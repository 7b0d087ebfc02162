"""OpenAI's completions: plain text continued, echoed with its log probabilities, or filled in the middle."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome.answer import Reader, TextReader, TokenLog
from pyrosome.chat import Tokenizer
from pyrosome.chat.events import ContentDelta, Done, Event, Message, Usage
from pyrosome.engine.request import Request as EngineRequest
from pyrosome.engine.request import TokenEvent
from pyrosome.server.caller import GENERATE, Caller
from pyrosome.server.exchange import Asked, Exchange, Said, StillHere
from pyrosome.server.group import Group
from pyrosome.server.logprobs import TextLogprobs, prompt_entries
from pyrosome.server.openai_chat import finish_reason, usage_of
from pyrosome.server.openai_schema import RENDERED, TEXT, TEXT_ANSWER
from pyrosome.server.openapi import described
from pyrosome.server.problems import OPENAI, Problem
from pyrosome.server.routes import add, answered, body_of, caller_of, paths, priority_of, salt_of, service_of
from pyrosome.server.service import Service
from pyrosome.server.shape import DONE, KEEP_ALIVE, Shape, fingerprint, frame
from pyrosome.server.text_request import TextPrompt, TextRequest, text_request

MODE = "text"


def router() -> APIRouter:
    """The routes of completions."""
    routes = APIRouter(tags=["completions"])
    for suffix, route, summary, ok in (
        ("/completions", _create, "Continue a text", TEXT_ANSWER),
        ("/completions/render", _render, "Show the ids of a prompt", RENDERED),
    ):
        add(routes, paths(suffix), route, summary=summary, **described(TEXT, ok=ok))
    return routes


async def _create(request: Request) -> Response:
    caller = await caller_of(request, GENERATE)
    body = await body_of(request)
    service = service_of(request)
    model = service.name_for(body.get("model"))
    wanted = await asyncio.to_thread(text_request, service, body)
    exchanges = _exchanges(request, service, caller, body, wanted, model)
    shape = TextShape(exchanges, wanted, service.chat.tokenizer)
    one = exchanges[0] if len(exchanges) == 1 else Group(exchanges)
    return await answered(one, shape, stream=wanted.stream, mode=MODE)


async def _render(request: Request) -> Response:
    """A prompt's ids and text, or where there are several a list of them; nothing is generated."""
    caller = await caller_of(request, GENERATE)
    body = await body_of(request)
    service = service_of(request)
    service.name_for(body.get("model"))
    shown = await asyncio.to_thread(_shown, service, body, caller)
    return JSONResponse(shown[0] if len(shown) == 1 else {"object": "list", "data": shown})


def _shown(service: Service, body: dict[str, Any], caller: Caller) -> list[dict[str, Any]]:
    wanted = text_request(service, body)
    return [
        {
            "prompt": service.chat.tokenizer.decode(prompt.ids),
            "token_ids": list(prompt.ids),
            "sampling": {**dataclasses.asdict(wanted.params), "max_tokens": wanted.max_tokens},
            "mode": MODE,
            "constraint": dataclasses.asdict(wanted.constraint) if wanted.constraint else None,
            "starts_in": "content",
            "continues": True,
            "salt": bool(caller.salt),
        }
        for prompt in wanted.prompts
    ]


def _exchanges(
    request: Request, service: Service, caller: Caller, body: dict[str, Any], wanted: TextRequest, model: str
) -> list[Exchange]:
    salt, priority, name = salt_of(caller, body), priority_of(body), service.new_id("cmpl-")
    exchanges = []
    for number, prompt in enumerate(wanted.prompts):
        asked = EngineRequest(
            f"{name}-{number}" if number else name, prompt.ids, wanted.params, priority=priority, salt=salt,
            constraint=wanted.constraint, progress=True,
        )  # fmt: skip
        readers = tuple(_reader(service, wanted, prompt) for _ in range(wanted.params.n))
        exchanges.append(
            Exchange(service, Asked(asked, readers, caller, request.url.path, "completions", model, MODE, body))
        )
    return exchanges


def _reader(service: Service, wanted: TextRequest, prompt: TextPrompt) -> Reader:
    if not wanted.max_tokens:
        return NoText(len(prompt.ids))
    return TextReader(service.chat.tokenizer, wanted.params, len(prompt.ids))


class NoText:
    """Reads a completion of no tokens: the engine gives one, and the prompt is all that is wanted."""

    is_over = False

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self.ids: list[int] = []

    def feed(self, event: TokenEvent) -> list[tuple[Event, list[TokenLog]]]:
        """Nothing."""
        return []

    def end(self, reason: str) -> list[tuple[Event, list[TokenLog]]]:
        """Nothing."""
        return []

    def done(self) -> Done:
        """No text."""
        return Done(Message("", "", (), "length"), Usage(self._num_prompt, 0, 0))


class TextShape(Shape):
    """`text_completion`, whole and in pieces.

    Args:
        exchanges: one for each prompt; their completions are numbered one prompt after the other.
    """

    def __init__(self, exchanges: Sequence[Exchange], wanted: TextRequest, tokenizer: Tokenizer) -> None:
        super().__init__(exchanges[0])
        self._exchanges, self._wanted, self._tokenizer = exchanges, wanted, tokenizer
        count = len(exchanges) * wanted.params.n
        self._lists = [TextLogprobs(tokenizer) for _ in range(count)]
        self._has_begun, self._num_told = [False] * count, [0] * count
        self._left = count

    def said(self, said: Said) -> list[bytes]:
        """A piece of a completion; its prompt before the first one, where it is echoed."""
        frames = self._echo(said.index)
        if isinstance(said.event, Done):
            return [*frames, self._finish(said.index, said.event.message)]
        assert isinstance(said.event, ContentDelta)
        logprobs = None if self._wanted.params.logprobs is None else self._lists[said.index].answer(said.tokens)
        return [*frames, self._chunk(said.index, said.event.text, logprobs)]

    def still_here(self, here: StillHere) -> list[bytes]:
        """A comment, and an empty piece, since clients' deadlines heed no comments."""
        return [KEEP_ALIVE, self._chunk(0, "")]

    def end(self) -> list[bytes]:
        """Usage, where it was asked for, and the end."""
        return [
            *([frame({**self._head(), "choices": [], "usage": self._usage()})] if self._wanted.usage else []),
            DONE,
        ]

    def failed(self, problem: Problem) -> list[bytes]:
        """An error chunk, and the end."""
        return [frame(problem.body(OPENAI)), DONE]

    def whole(self) -> dict[str, Any]:
        """The `text_completion`."""
        choices = [
            self._choice(number * self._wanted.params.n + n, exchange, n, message)
            for number, exchange in enumerate(self._exchanges)
            for n, message in enumerate(exchange.outcome.messages)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(), **self.told()}

    def _choice(self, index: int, exchange: Exchange, n: int, message: Message) -> dict[str, Any]:
        text, lists = self._echoed(index) if self._wanted.echo else ("", None)
        logprobs = None
        if self._wanted.params.logprobs is not None:
            logprobs = self._lists[index].answer(log for _, log in exchange.outcome.logs[n])
            logprobs = {name: (lists or {}).get(name, []) + rest for name, rest in logprobs.items()}
        choice = {"text": text + message.content, "index": index, "logprobs": logprobs}
        return choice | {"finish_reason": finish_reason(message)} | self._ended(index, message)

    def _echo(self, index: int) -> list[bytes]:
        if self._has_begun[index] or not self._wanted.echo:
            return []
        self._has_begun[index] = True
        return [self._chunk(index, *self._echoed(index))]

    def _echoed(self, index: int) -> tuple[str, dict[str, list[Any]] | None]:
        """The prompt of a completion as it is echoed, and its log probabilities; of its first token there is none."""
        number = index // self._wanted.params.n
        prompt, outcome = self._wanted.prompts[number], self._exchanges[number].outcome
        ids = prompt.ids[prompt.echoed]
        lists = None
        if self._wanted.params.logprobs is not None and ids:
            known = [None, *outcome.prompt_logprobs][prompt.echoed]
            lists = self._lists[index].prompt(ids, [None, *known[1:]])
        return self._tokenizer.decode(ids), lists

    def _finish(self, index: int, message: Message) -> bytes:
        self._left -= 1
        ended = self._ended(index, message)
        return self._chunk(
            index, "", reason=finish_reason(message), ended=ended, told={} if self._left else self.told()
        )

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, list[Any]] | None = None,
        *,
        reason: str | None = None,
        ended: dict[str, Any] | None = None,
        told: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        if self._wanted.token_ids:
            ids = self._reader(index).ids
            choice["token_ids"], self._num_told[index] = ids[self._num_told[index] :], len(ids)
        usage = {"usage": None} if self._wanted.usage else {}
        return frame({**self._head(), "choices": [choice | (ended or {})], **usage, **(told or {})})

    def _reader(self, index: int) -> Reader:
        number, n = divmod(index, self._wanted.params.n)
        return self._exchanges[number].asked.readers[n]

    def _ended(self, index: int, message: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"stop_reason": "repetition"} if message.finish_reason == "repetition" else {}
        number = index // self._wanted.params.n
        if self._wanted.token_ids:
            found["token_ids"] = self._reader(index).ids[self._num_told[index] :]
            found["prompt_token_ids"] = list(self._wanted.prompts[number].ids)
        if self._wanted.prompt_logprobs:
            found["prompt_logprobs"] = prompt_entries(self._tokenizer, self._exchanges[number].outcome.prompt_logprobs)
        return found

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.outcome.id, "object": "text_completion", "created": self.outcome.created,
            "model": self.asked.model, "system_fingerprint": fingerprint(self.outcome),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        each = [e.outcome.usage for e in self._exchanges]
        return usage_of(
            Usage(
                sum(u.prompt_tokens for u in each),
                sum(u.completion_tokens for u in each),
                0,
                sum(u.cached_tokens for u in each),
            ),
            thinks=False,
        )
