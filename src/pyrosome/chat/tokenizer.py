"""A checkpoint's own tokenizer, in the official `tokenizer.json` format."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pyrosome.errors import CheckpointError

FILE_NAME = "tokenizer.json"


class Tokenizer:
    """Text to ids and back.  Adds neither beginning- nor end-of-sentence ids.

    Strings of control tokens (roles, thinking, tools) in ordinary text are encoded as plain characters: what a
    user writes can never forge a role.  Only `allow_special=True` (templates) turns them into control tokens.

    The library's tokenizer is built once, without the control tokens: those are looked up here, both ways, so a
    6 MB file is not held (and its merges not indexed) twice.
    """

    def __init__(self, file: Path) -> None:
        try:
            added, rest = _split_added(file.read_text(encoding="utf-8"))
            self._added: dict[str, int] = {t["content"]: t["id"] for t in added}
            self._plain = tokenizers.Tokenizer.from_str(rest)
            decoder = type(self._plain.decoder).__name__
        except FileNotFoundError:
            raise CheckpointError(
                f"{FILE_NAME} was looked for in {file.parent} and is not there; put the checkpoint's tokenizer beside "
                "its weights, or pass token ids"
            ) from None
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise CheckpointError(f"{file} is not a usable tokenizer ({error}); download it again") from None
        if decoder != "ByteLevel":
            raise CheckpointError(
                f"{file} has a decoder of type {decoder}; a ByteLevel one, as the official tokenizer has, was expected"
            )
        self._control_bytes = {i: s.encode() for s, i in self._added.items()}
        self._bytes: dict[int, bytes] = dict(self._control_bytes)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of the checkpoint in directory `path`.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return cls(Path(path) / FILE_NAME)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, control tokens included; the network's vocabulary may be larger."""
        new = sum(self._plain.token_to_id(s) is None for s in self._added)
        return self._plain.get_vocab_size(with_added_tokens=True) + new

    def id_of(self, token: str) -> int | None:
        """Id of a control token by its string; None where this tokenizer has no such token."""
        return self._added.get(token)

    @property
    def control_tokens(self) -> dict[str, int]:
        """Every control token's string and id."""
        return dict(self._added)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`; control-token strings count as such only with `allow_special`."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        if not allow_special or not self._added:
            return self._plain_ids(text)
        ids: list[int] = []
        at = 0
        for found in self._control.finditer(text):
            ids += [*self._plain_ids(text[at : found.start()]), self._added[found.group()]]
            at = found.end()
        return ids + self._plain_ids(text[at:])

    def encode_spans(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of `text` whose ranges `control` (ascending) spell control tokens; all other text is plain.

        Each run of text between two control tokens is encoded in one piece, whatever parts it was put together from.

        Raises:
            CheckpointError: this tokenizer lacks one of those tokens.
        """
        ids: list[int] = []
        at = 0
        for first, end in control:
            token = self._added.get(text[first:end])
            if token is None:
                raise CheckpointError(f"the tokenizer has no token {text[first:end]!r}, which the prompt needs")
            ids += [*self.encode(text[at:first]), token]
            at = end
        return ids + self.encode(text[at:])

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for, perhaps part of a character; none for an id it does not know."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = _bytes_of(self._plain.id_to_token(token) or "") if token >= 0 else b""
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))))

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []


def _split_added(text: str) -> tuple[list[Any], str]:
    """The added tokens of a tokenizer file, and the file without them.

    The official file lists them before its vocabulary, so the 6 MB of that need not be read and written again here.
    """
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    if found and found.start() < text.find('"model"'):
        added, end = json.JSONDecoder().raw_decode(text, found.end())
        return added, f"{text[: found.end()]}[]{text[end:]}"
    values = json.loads(text)
    return values.get("added_tokens") or [], json.dumps({**values, "added_tokens": []})


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[c] for c in token)
    except KeyError:  # not written in the byte alphabet: the token is its own text
        return token.encode()
