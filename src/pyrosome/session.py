"""Sessions as objects: a sequence that stays, to be gone on with, forked, cut back, saved and restored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pyrosome.chat import Chat, Message, Tokenizer
from pyrosome.chat.events import Done, Event
from pyrosome.chat.prompt import Prompt
from pyrosome.engine.request import Request
from pyrosome.engine.worker import EngineThread, EventStream
from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams
from pyrosome.output import Output, Piece, collect, pieces

_numbers = itertools.count()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Host(Protocol):
    """What a session needs of the `LLM` that made it."""

    tokenizer: Tokenizer

    @property
    def engine(self) -> EngineThread: ...
    @property
    def chat_template(self) -> Chat: ...
    def submit(self, request: Request) -> EventStream: ...
    def request(self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any) -> Request: ...
    def answer(self, prompt: Prompt, request: Request) -> Iterator[Event]: ...


class Session:
    """What was said so far, kept computed; made by `LLM.session` and `LLM.restore`.

        s = llm.session("Once upon a time")
        s.generate(SamplingParams(max_tokens=8))
        other = s.fork()  # shares everything computed
        s.rewind(4)       # the last four tokens were never said
        s.save("tale.session")

    An idle session may be set aside for want of memory; it is brought back when it goes on.
    """

    def __init__(self, llm: Host, session_id: str) -> None:
        self._llm, self.id = llm, session_id
        self.messages: list[dict[str, Any]] = []  # of `chat`, answers included

    @property
    def ids(self) -> list[int]:
        """Every token: given and generated."""
        return list(self._call("session_ids"))

    @property
    def text(self) -> str:
        """All of it as text."""
        return self._llm.tokenizer.decode(self.ids)

    def extend(self, more: str | Sequence[int] | Sequence[dict[str, Any]]) -> int:
        """Append text, ids, or messages of a conversation; returns how many tokens there are.

        Messages are kept for the next `chat`; text and ids are appended at once, and computed with the next turn.

        Raises:
            RequestError: an id outside the vocabulary, or something generating in this session.
            ContextTooLong: more tokens than the engine's cache has room for.
        """
        if not isinstance(more, str) and len(more) and isinstance(more[0], dict):
            self.messages += [dict(m) for m in more if isinstance(m, dict)]
            return len(self.ids)
        ids = self._llm.tokenizer.encode(more) if isinstance(more, str) else list(more)  # type: ignore[arg-type]
        return int(self._call("session_extend", ids=ids))

    def generate(self, params: SamplingParams | None = None) -> Output:
        """Go on from where it stands; what is said becomes part of the session.

        Raises:
            RequestError: nothing was said yet, something is generating in this session, or `n` is not 1.
        """
        request = self._request((), params)
        with self._llm.submit(request) as events:
            return collect(events, self._llm.tokenizer, request.params)[0]

    def stream(self, params: SamplingParams | None = None) -> Iterator[Piece]:
        """As `generate`, piece by piece; closing the iterator stops it, and what was said until then stays."""
        request = self._request((), params)
        with self._llm.submit(request) as events:
            yield from pieces(events, self._llm.tokenizer, request.params)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] = (),
        thinking: str = "high",
        tools: Sequence[dict[str, Any]] | None = None,
        params: SamplingParams | None = None,
    ) -> Message:
        """Append messages and answer; the answer is appended too.  What turns share is not computed again."""
        asked = [*self.messages, *(dict(m) for m in messages)]
        prompt = self._llm.chat_template.conversation(asked, thinking, tools, stop=params.stop if params else ())
        held = self.ids
        common = min(common_prefix(held, prompt.ids), len(prompt.ids) - 1)
        self.rewind(len(held) - common)
        request = self._llm.request(prompt, params, session=self.id)
        request = dataclasses.replace(request, ids=request.ids[common:], stable=max(0, (request.stable or 0) - common))
        done = [e for e in self._llm.answer(prompt, request) if isinstance(e, Done)]
        self.messages = [*asked, done[0].message.to_dict()]
        return done[0].message

    def fork(self) -> Session:
        """A second session with the same past.  Nothing is copied before one of the two goes on."""
        twin = Session(self._llm, self._call("session_fork"))
        twin.messages = [dict(m) for m in self.messages]
        return twin

    def rewind(self, num_tokens: int) -> int:
        """Take the last `num_tokens` back; returns how many tokens the next turn computes again.

        Raises:
            RequestError: fewer tokens than that were said, or something is generating in this session.
        """
        return int(self._call("session_rewind", num_tokens=num_tokens))

    def save(self, path: str | Path) -> int:
        """Write the session to a file: tokens, messages and all that was computed; returns its bytes.

        The file is complete or not there: a crash while it is written leaves an older one as it was.

        Raises:
            DoesNotFit: the disk is full.
            CheckpointError: the file cannot be written.
        """
        notes = {"messages": self.messages}
        return int(self._call("session_save", path=str(Path(path).absolute()), notes=notes))

    def close(self) -> None:
        """Give back what it holds of the cache."""
        self._call("session_close")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, ids: Sequence[int], params: SamplingParams | None) -> Request:
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"a session goes on in one way and n is {params.n}; fork it for more")
        return Request(f"session-{next(_numbers)}", tuple(ids), params, session=self.id)

    def _call(self, name: str, **arguments: Any) -> Any:
        return self._llm.engine.call(name, session=self.id, **arguments)
