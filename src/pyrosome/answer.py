"""One completion's tokens, read as an answer: what `LLM` and the server share between the engine and `chat`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from pyrosome.chat import Chat, Message, Tokenizer
from pyrosome.chat.attribution import Attribution
from pyrosome.chat.chat import DSML
from pyrosome.chat.events import ContentDelta, Done, Event, ReasoningDelta, Usage
from pyrosome.chat.parser import THINK_END
from pyrosome.chat.prompt import Prompt
from pyrosome.engine.request import Request, TokenEvent
from pyrosome.options import SamplingParams
from pyrosome.output import GrowingText


def chat_request(
    request_id: str, prompt: Prompt, chat: Chat, params: SamplingParams | None = None, *, context: int, **changes: Any
) -> Request:
    """A rendered prompt as the engine takes it: what binds its answer, and where the next turn parts from it.

    Args:
        context: tokens there is room for, prompt included.
        changes: fields of `Request`, which go before these.
    """
    limit = min(prompt.max_tokens, max(1, context - len(prompt.ids)))
    # Stop strings are of the answer's text alone, so the reader looks for them.
    params = dataclasses.replace(params, stop=()) if params else prompt.sampling_params(max_tokens=limit)
    think_end = chat.tokenizer.id_of("</think>") if prompt.start == "reasoning" else None
    fields: dict[str, Any] = {
        "constraint": prompt.constraint, "never_empty": True, "think_end": think_end, "stable": chat.stable(prompt),
    }  # fmt: skip
    return Request(request_id, prompt.ids, params, **{**fields, **changes})


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLog:
    """A token that was said, with the log probabilities that were asked for: its own, and the top ones."""

    token: int
    logprobs: dict[int, float]


class Reader(Protocol):
    """Reads one completion.  After `Ended`, or once it `is_over`, `done` is the whole of it."""

    ids: list[int]  # the tokens read, as the model wrote them, without the end token

    @property
    def is_over(self) -> bool: ...
    def feed(self, event: TokenEvent) -> list[tuple[Event, list[TokenLog]]]: ...
    def end(self, reason: str) -> list[tuple[Event, list[TokenLog]]]: ...
    def done(self) -> Done: ...


class ChatReader:
    """Thoughts, answer and tool calls.  Whatever follows complete calls or a stop string need not be computed.

    Attributes:
        prompt: what is answered.
        ids: the tokens read, as the model wrote them, without the end token.
        reads_calls: whether tool calls are looked for; where they are not, their markup is text like any other.
    """

    def __init__(self, chat: Chat, prompt: Prompt, end_token: int) -> None:
        self.prompt = prompt
        self._parser, self.reads_calls = chat.parser(prompt), prompt.parse_tools
        self._end_token, self._num_prompt = end_token, len(prompt.ids)
        marks = [chat.tokenizer.id_of(t) for t in (DSML, THINK_END)]
        self._attribution: Attribution[TokenLog] = Attribution(chat.tokenizer, marks)
        self.ids: list[int] = []
        self.cached_tokens = 0

    @property
    def is_over(self) -> bool:
        """Whether no further token can change the answer."""
        return self._parser.finished or self._parser.calls_closed

    def feed(self, event: TokenEvent) -> list[tuple[Event, list[TokenLog]]]:
        """Take a token; what it settles, each part with the tokens it is made of where log probabilities came."""
        if event.reuse:
            self.cached_tokens = event.reuse.reused_tokens
        if self.is_over or (event.token == self._end_token) != event.is_end_token:
            return []  # the client's own end tokens are no part of the answer
        if not event.is_end_token:
            self.ids.append(event.token)
            if event.logprobs:
                self._attribution.add(event.token, TokenLog(event.token, event.logprobs))
        return self._said(self._parser.feed([event.token]))

    def end(self, reason: str) -> list[tuple[Event, list[TokenLog]]]:
        """No more tokens come, for that reason; what was held back."""
        return self._said(self._parser.flush(reason))

    def done(self) -> Done:
        """The whole answer and its usage."""
        parser = self._parser
        message = parser.close("stop")
        usage = Usage(self._num_prompt, parser.completion_tokens, parser.reasoning_tokens, self.cached_tokens)
        return Done(message, usage)

    def _said(self, events: list[Event]) -> list[tuple[Event, list[TokenLog]]]:
        # The markup of a call is nobody's text.
        return [
            (e, self._attribution.take(e.text) if isinstance(e, ReasoningDelta | ContentDelta) else []) for e in events
        ]


class TextReader:
    """Plain text, cut before the first stop string.

    Where log probabilities came, the end token's come last, with no text: it was chosen as every other token was.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, num_prompt: int) -> None:
        self._text, self._num_prompt = GrowingText(tokenizer, params), num_prompt
        self._num_tokens, self._reason, self.cached_tokens = 0, "stop", 0
        self._attribution: Attribution[TokenLog] = Attribution(tokenizer)
        self._end_log: list[TokenLog] = []
        self.ids: list[int] = []

    @property
    def is_over(self) -> bool:
        """Whether a stop string was found."""
        return self._text.done

    def feed(self, event: TokenEvent) -> list[tuple[Event, list[TokenLog]]]:
        """Take a token; the text that no later one can change."""
        if event.reuse:
            self.cached_tokens = event.reuse.reused_tokens
        if self.is_over:
            return []
        self._num_tokens += not event.is_end_token
        if not event.is_end_token:
            self.ids.append(event.token)
            if event.logprobs:
                self._attribution.add(event.token, TokenLog(event.token, event.logprobs))
        elif event.logprobs:
            self._end_log = [TokenLog(event.token, event.logprobs)]
        self._text.feed(event)
        return self._said()

    def end(self, reason: str) -> list[tuple[Event, list[TokenLog]]]:
        """No more tokens come."""
        if not self.is_over:
            self._reason = reason
            self._text.finish()
        said = self._said()
        last = [] if self._text.is_cut else [*self._attribution.rest(), *self._end_log]
        self._end_log = []
        return [*said, *([(ContentDelta(""), last)] if last else [])]

    def done(self) -> Done:
        """The whole text and its usage."""
        reason = "stop" if self._text.is_cut else self._reason
        return Done(
            Message("", self._text.text, (), reason), Usage(self._num_prompt, self._num_tokens, 0, self.cached_tokens)
        )

    def _said(self) -> list[tuple[Event, list[TokenLog]]]:
        text = self._text.take()
        return [(ContentDelta(text), self._attribution.take(text))] if text else []


def events_of(said: Iterable[tuple[Event, list[TokenLog]]]) -> list[Event]:
    """The events alone."""
    return [event for event, _ in said]
