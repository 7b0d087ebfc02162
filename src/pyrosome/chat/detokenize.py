"""Text as it grows: never half a character, never a change to what was given out."""

from __future__ import annotations

from collections.abc import Sequence

from pyrosome.chat.tokenizer import Tokenizer

_BROKEN = "\ufffd"
# A character has at most 4 bytes, so of any 4 tokens held back the first cannot be waiting for the rest.
_MAX_HELD = 4


class Detokenizer:
    """Feeds ids, yields text that no later id can change; what it yields joins up to `Tokenizer.decode` of all ids.

    Only the tokens since the last whole character are decoded again, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """Take ids; return the text they complete."""
        return "".join(self._feed(i) for i in ids)

    def _feed(self, token: int) -> str:
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if not text.endswith(_BROKEN):
            self._held.clear()
            return text
        if len(self._held) < _MAX_HELD:
            return ""
        # Long enough to tell a broken byte from an unfinished character: give out what is settled.
        for first in range(1, len(self._held)):
            head, tail = self._tokenizer.decode(self._held[:first]), self._tokenizer.decode(self._held[first:])
            if head + tail == text:
                del self._held[:first]
                return head
        return ""

    def close(self) -> str:
        """Text still held back: an unfinished character becomes U+FFFD."""
        text = self._tokenizer.decode(self._held)
        self._held.clear()
        return text
