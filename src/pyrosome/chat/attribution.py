"""Which tokens a piece of an answer is made of.

A parser holds text back and drops some of it (markup, newlines before a call, a stop string), so tokens and pieces do
not come in step.  They are put together by their text: what no piece holds was dropped.
"""

from __future__ import annotations

import collections
from collections.abc import Container
from typing import Generic, NamedTuple, TypeVar

from pyrosome.chat.detokenize import Detokenizer
from pyrosome.chat.tokenizer import Tokenizer

T = TypeVar("T")


class _Waiting(NamedTuple, Generic[T]):
    text: str  # of the token, that no piece has held yet
    item: T | None  # None: it was given with an earlier piece
    is_mark: bool = False


class Attribution(Generic[T]):
    """Takes an item with each token, and gives the items of a piece of text.

    Args:
        marks: control tokens the parser acts on: an answer has their text from its start or not at all, and a
            character that is not complete is given up before them.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Container[int | None] = ()) -> None:
        self._detokenizer, self._tokenizer, self._marks = Detokenizer(tokenizer), tokenizer, marks
        self._waiting: collections.deque[_Waiting[T]] = collections.deque()

    def add(self, token: int, item: T) -> None:
        """Take the next token."""
        if token in self._marks:
            if given_up := self._detokenizer.close():
                self._waiting.append(_Waiting(given_up, None))
            self._waiting.append(_Waiting(self._tokenizer.decode([token]), item, True))
        else:
            self._waiting.append(_Waiting(self._detokenizer.feed([token]), item))

    def take(self, text: str) -> list[T]:
        """Items of the tokens that `text`, the next piece, holds text of; those dropped before it are forgotten."""
        found: list[T] = []
        begun: list[T] = []  # tokens that end within a character
        at = 0
        while at < len(text) and self._waiting:
            token = self._waiting.popleft()
            items = [] if token.item is None else [token.item]
            if not token.text:
                begun += items
                continue
            size, left = _overlap(text, at, token)
            if left and token.is_mark and any(_overlap(text, at, later)[0] for later in self._waiting):
                continue  # the text begins as a mark does that was dropped
            if size:
                found += begun + items
                at += size
            if left:
                self._waiting.appendleft(_Waiting(left, None, token.is_mark))
            begun = []
        return found + (begun if at < len(text) else [])  # a character that was never completed

    def rest(self) -> list[T]:
        """Items of the tokens no piece held any text of."""
        found = [token.item for token in self._waiting if token.item is not None]
        self._waiting.clear()
        return found


def _overlap(text: str, at: int, token: _Waiting[T]) -> tuple[int, str]:
    """How many characters of `text` from `at` on are the token's, and what is left of it for the next piece."""
    for dropped in range(1 if token.is_mark else len(token.text)):
        own = token.text[dropped:]
        if text.startswith(own, at):
            return len(own), ""
        rest = len(text) - at
        if rest < len(own) and own.startswith(text[at:]):
            return rest, own[rest:]
    return 0, ""
