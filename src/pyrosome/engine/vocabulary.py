"""What each id of a checkpoint's tokenizer stands for, as grammars need it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyrosome.errors import RequestError

DSML = "｜DSML｜"  # the control token in every tag of a tool call


class Vocabulary:
    """A byte-level tokenizer as llguidance wants it, and a text's ids without control tokens.

    Every added token is a control token here, as in the template, whatever its file says of it: so no grammar's text
    can match one, and none is made of text that spells it.

    Raises:
        RequestError: the file is no such tokenizer, or knows more ids than the network.
    """

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, path: Path, size: int, eos_id: int) -> None:
        self._path, self.eos_token_id = path, eos_id
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            self.control = {t["id"]: str(t["content"]) for t in file["added_tokens"]}
            plain: dict[str, int] = {t: i for t, i in file["model"]["vocab"].items() if i not in self.control}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"a constraint was asked for and {path} is no usable tokenizer: {error!r}") from None
        known = 1 + max([*self.control, *plain.values()])
        if known > size:
            raise RequestError(
                f"a constraint was asked for; the tokenizer knows {known} ids and the network {size}: they do not go "
                "together"
            )
        self.tokens = [b""] * size
        for text, i in plain.items():
            self.tokens[i] = _bytes_of(text)
        for i, text in self.control.items():
            self.tokens[i] = text.encode()
        self.special_token_ids = sorted(self.control)
        self.dsml = next((i for i, text in self.control.items() if text == DSML), -1)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _encoder(self) -> Any:
        import tokenizers

        file = json.loads(self._path.read_text(encoding="utf-8"))
        return tokenizers.Tokenizer.from_str(json.dumps({**file, "added_tokens": []}))

    def is_blank(self, token: int) -> bool:
        """Whether its text is white space, or nothing."""
        return not self.tokens[token].decode("utf-8", "replace").strip()

    def ends_with(self, ids: Iterable[int], text: bytes) -> bool:
        """Whether the text of `ids` does."""
        return b"".join(self.tokens[i] for i in ids).endswith(text)


# The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {b: b for b in _SHOWN} | {256 + n: b for n, b in enumerate(b for b in range(256) if b not in _SHOWN)}


def _bytes_of(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # not written in the byte alphabet: the token is its own text
        return token.encode()
