"""What a generation gives: text cut where it should be, tokens, and why it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from pyrosome import errors
from pyrosome.chat import Detokenizer, Tokenizer
from pyrosome.engine.request import Ended, Event, Reuse, Timeline, TokenEvent
from pyrosome.errors import EngineError, PyrosomeError
from pyrosome.options import SamplingParams


@dataclasses.dataclass(frozen=True)
class Output:
    """One finished generation."""

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]] | None  # per token: its own and the top ones asked for; raw model distribution
    finish_reason: str  # "stop", "length", "repetition" or "error"
    cached_tokens: int = 0  # of the prompt, that did not have to be computed
    error: str = ""  # what went wrong, for "error": the other requests go on
    # What was found computed already, and why not more.
    reuse: Reuse | None = dataclasses.field(default=None, compare=False, repr=False)
    # When what happened; None: it ended by a stop string.
    timeline: Timeline | None = dataclasses.field(default=None, compare=False, repr=False)
    prompt_logprobs: list[dict[int, float]] | None = None  # as `logprobs`, for the prompt's tokens from the second on


@dataclasses.dataclass(frozen=True)
class Piece:
    """A streamed part of a generation: text that no later token can change."""

    text: str
    token_ids: list[int]
    finish_reason: str | None


def collect(events: Iterable[Event], tokenizer: Tokenizer, params: SamplingParams) -> list[Output]:
    """All completions of one request; reads no further once every text has reached a stop string."""
    texts = [GrowingText(tokenizer, params) for _ in range(params.n)]
    tokens: list[list[TokenEvent]] = [[] for _ in texts]
    ends: list[Ended | None] = [None] * params.n
    for event in events:
        text = texts[event.index]
        if isinstance(event, Ended):
            ends[event.index] = event
            text.finish()
        elif not text.done:
            tokens[event.index].append(event)
            text.feed(event)
            if all(t.done for t in texts):
                break
    return [_output(*each, params) for each in zip(texts, tokens, ends, strict=True)]


def pieces(events: Iterable[Event], tokenizer: Tokenizer, params: SamplingParams) -> Iterator[Piece]:
    """One completion as it grows.

    Raises:
        EngineError: the generation failed on the way.
    """
    text = GrowingText(tokenizer, params)
    for event in events:
        if isinstance(event, Ended):
            raise_failed(event)
            text.finish()
            yield Piece(text.take(), [], event.reason)
            return
        if text.feed(event):
            yield Piece(text.take(), [event.token], "stop")
            return
        yield Piece(text.take(), [event.token], None)


class GrowingText:
    """One request's text: detokenised as it grows, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stop = params.stop
        self.hold = max((len(s) for s in params.stop), default=1) - 1
        self.text, self.taken, self.done, self.is_cut = "", 0, False, False
        self.searched = 0  # no stop string begins before this

    def feed(self, event: TokenEvent) -> bool:
        """Take a token; True where its text completes a stop string."""
        if not event.is_end_token:
            self.text += self.detokenizer.feed([event.token])
        return self._search()

    def finish(self) -> None:
        """No token follows."""
        if not self.done:
            self.text += self.detokenizer.close()
            self._search()
            self.done = True

    def _search(self) -> bool:
        found = [at for s in self.stop if (at := self.text.find(s, self.searched)) >= 0]
        self.searched = max(0, len(self.text) - self.hold)
        if found:
            self.text, self.done, self.is_cut = self.text[: min(found)], True, True
        return bool(found)

    def take(self) -> str:
        """Text that can no longer change: all but what may be the beginning of a stop string."""
        end = len(self.text) if self.done else max(self.taken, len(self.text) - self.hold)
        piece, self.taken = self.text[self.taken : end], end
        return piece


def _output(text: GrowingText, tokens: list[TokenEvent], end: Ended | None, params: SamplingParams) -> Output:
    logprobs = None if params.logprobs is None else [e.logprobs for e in tokens]
    reason = "stop" if end is None or text.is_cut else end.reason
    ids = [e.token for e in tokens]
    reuse = end.reuse if end else tokens[0].reuse if tokens else None
    cached, error = reuse.reused_tokens if reuse else 0, end.error if end else ""
    return Output(ids, text.text, logprobs, reason, cached, error, reuse, end.timeline if end else None)


def raise_failed(end: Ended) -> None:
    """Raise what a generation failed with, if it did."""
    if end.reason == "error":
        raise fault_of(end)


def fault_of(end: Ended) -> PyrosomeError:
    """What a generation failed with, as the class that says whose fault it is."""
    kind = getattr(errors, end.error_type, EngineError)
    # A class with a message of its own making is raised as its base.
    fits = isinstance(kind, type) and issubclass(kind, PyrosomeError) and kind.__init__ is PyrosomeError.__init__
    return (kind if fits else EngineError)(end.error)
