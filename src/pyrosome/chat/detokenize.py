"""Text as it grows: never half a character, never a change to what was given out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pyrosome.chat.tokenizer import Tokenizer

_DECODER = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Feeds ids, yields text that no later id can change; what it yields joins up to `Tokenizer.decode` of all ids.

    Only the bytes of an unfinished character are held back, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._decoder = _DECODER("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Take ids; return the text they complete."""
        return self._decoder.decode(b"".join(map(self._bytes_of, ids)))

    def close(self) -> str:
        """Text still held back: an unfinished character becomes U+FFFD."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
