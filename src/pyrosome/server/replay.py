"""What the model wrote is what its history renders.

A model may write a turn otherwise than the template would: a word in other tokens, JSON with other spaces, a call with
other line breaks.  A client sends back what the turn means, and the template writes that in its own way, so the model
would see what it never said, and the prefix that is computed already would end there.  Here each turn is remembered by
the ids the template gives it, and put back as it was written.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import threading
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from pyrosome.answer import ChatReader
from pyrosome.chat import Chat, Message
from pyrosome.chat.prompt import Prompt
from pyrosome.errors import PyrosomeError
from pyrosome.server.problems import where

if TYPE_CHECKING:
    from pyrosome.server.exchange import Exchange, Outcome
    from pyrosome.server.problems import Problem

log = logging.getLogger(__name__)

MAX_TOKENS = 4 << 20  # remembered, over all accounts
MAX_TURNS = 1 << 16  # of which the shortest take more memory for being there than for their tokens
LONGEST_LEARN_S = 2.0  # that a prompt waits for turns of its account that are being remembered

_END = "<｜end▁of▁sentence｜>"
_ASK: dict[str, Any] = {"role": "user", "content": "-"}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}


class Replay:
    """A watcher that remembers turns, and puts them back into prompts.  Within one salt only.

    Args:
        max_tokens, max_turns: as many are remembered; the turns that were not asked for longest go first.
    """

    def __init__(self, chat: Chat, *, max_tokens: int = MAX_TOKENS, max_turns: int = MAX_TURNS) -> None:
        self._chat, self._max_tokens, self._max_turns = chat, max_tokens, max_turns
        token = chat.tokenizer.id_of
        self._assistant, self._end = token("<｜Assistant｜>"), token(_END)
        self._think_end, marker = token("</think>"), token("｜DSML｜")
        # Control tokens that belong to a turn.  Another one, had the model written it, would forge a role.
        self._control = set(chat.tokenizer.control_tokens.values()) - {self._think_end, marker}
        self._turns: collections.OrderedDict[bytes, array[int]] = collections.OrderedDict()
        self._salts: collections.Counter[str] = collections.Counter()
        self._salt_of: dict[bytes, str] = {}
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "pyrosome-replay")
        self._learning: dict[Future[None], str] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens remembered."""
        return self._num_tokens

    # What it is told

    def taken(self, exchange: Exchange) -> None:
        """Nothing yet."""

    def waited(self, num_tokens: int, seconds: float) -> None:
        """Nothing."""

    def refused(self, path: str, problem: Problem) -> None:
        """Nothing."""

    def ended(self, outcome: Outcome) -> None:
        """Remember what was said, in a thread of its own."""
        for reader, done in zip(outcome.asked.readers, outcome.dones, strict=True):
            if isinstance(reader, ChatReader) and done and _is_whole(done.message):
                self.learn(outcome.asked.request.salt, reader.prompt, reader.ids, done.message)

    def learn(self, salt: str, prompt: Prompt, ids: Sequence[int], message: Message) -> None:
        """Remember that `message`, the answer to `prompt`, was written as `ids`; its end token is not among them."""
        learning = self._worker.submit(self._learn, salt, prompt, list(ids), message)
        with self._lock:
            self._learning[learning] = salt
        learning.add_done_callback(self._learned)

    def put_back(self, salt: str, prompt: Prompt) -> Prompt:
        """The prompt with its turns as the model wrote them, where that is remembered."""
        with self._lock:
            pending = [f for f, of in self._learning.items() if of == salt]
        wait(pending, LONGEST_LEARN_S)  # the turn before this one may have ended a moment ago
        if not self._salts[salt]:
            return prompt
        ids: list[int] = []
        at = 0
        for first, end in self._segments(prompt.ids):
            written = self._recall(salt, prompt.ids[first - 1 : end])
            if written is not None:
                ids += [*prompt.ids[at:first], *written]
                at = end
        if not at:
            return prompt
        return dataclasses.replace(prompt, ids=(*ids, *prompt.ids[at:]))

    def close(self) -> None:
        """Remember no more."""
        self._worker.shutdown(cancel_futures=True)

    # In its own thread

    def _learn(self, salt: str, prompt: Prompt, ids: list[int], message: Message) -> None:
        lead = self._lead(prompt.ids)
        if lead is None or not self._control.isdisjoint(ids):
            return
        written = [*lead, *ids]
        try:
            forms = [(self._written(message, thinking=prompt.thinking, keep=True), written)]
            if prompt.thinking and not message.tool_calls and self._think_end in written:
                after = written[written.index(self._think_end) + 1 :]
                forms.append((self._written(message, thinking=True, keep=False), after))
        except PyrosomeError as error:  # what cannot be part of a history need not be remembered
            log.debug("a turn is not remembered: %s", type(error).__name__)
            return
        for template, turn in forms:
            if template and list(template[1:]) != turn:
                self._remember(salt, template, turn)

    def _written(self, message: Message, *, thinking: bool, keep: bool) -> tuple[int, ...]:
        """The turn as the template writes it, the cue's last token before it."""
        turn = message.to_dict()
        results = [{"role": "tool", "tool_call_id": c.id, "content": "-"} for c in message.tool_calls]
        body: dict[str, Any] = {"messages": [_ASK, turn, *(results or [_ASK])], "max_tokens": 1}
        body["thinking"] = {"type": "enabled" if thinking else "disabled"}
        if keep or message.tool_calls:  # with tools the template keeps all thoughts
            body["tools"] = [_TOOL]
        ids = self._chat.render(body).ids
        first, end = next(self._segments(ids), (0, 0))
        return ids[first - 1 : end] if first else ()

    def _learned(self, learning: Future[None]) -> None:
        with self._lock:
            self._learning.pop(learning, None)
        if not learning.cancelled() and (error := learning.exception()):
            log.error("a turn could not be remembered: %s at\n%s", type(error).__name__, where(error))

    # Turns within ids

    def _segments(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each complete assistant turn lies, its cue and its end token left out."""
        begin = 0
        for at, token in enumerate(ids):
            if token == self._assistant:
                begin = at + 2
            elif token == self._end and 0 < begin <= at:
                yield begin, at
                begin = 0

    def _lead(self, ids: Sequence[int]) -> Sequence[int] | None:
        """What of the turn that is being written the prompt holds already; None: it opens no turn."""
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] == self._assistant:
                return ids[at + 2 :]
            if ids[at] == self._end:
                break
        return None

    # The memory

    def _recall(self, salt: str, template: Sequence[int]) -> array[int] | None:
        key = _key(salt, template)
        with self._lock:
            if (found := self._turns.get(key)) is not None:
                self._turns.move_to_end(key)
            return found

    def _remember(self, salt: str, template: Sequence[int], written: Sequence[int]) -> None:
        key, turn = _key(salt, template), array("I", written)
        with self._lock:
            self._forget(key)
            self._turns[key], self._salt_of[key] = turn, salt
            self._salts[salt] += 1
            self._num_tokens += len(turn)
            while self._num_tokens > self._max_tokens or len(self._turns) > self._max_turns:
                self._forget(next(iter(self._turns)))

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        if turn is None:
            return
        salt = self._salt_of.pop(key)
        self._num_tokens -= len(turn)
        self._salts[salt] -= 1
        if not self._salts[salt]:
            del self._salts[salt]


def _is_whole(message: Message) -> bool:
    """Whether the answer holds all that was written, and ended by itself."""
    return message.finish_reason in ("stop", "tool_calls") and message.stop_sequence is None


def _key(salt: str, template: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(array("I", template).tobytes(), digest_size=24, key=hashlib.sha256(salt.encode()).digest())
    return digest.digest()
