"""A checkpoint's own tokenizer, in the official `tokenizer.json` format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pyrosome.errors import CheckpointError

FILE_NAME = "tokenizer.json"


class Tokenizer:
    """Text to ids and back.  Adds neither beginning- nor end-of-sentence ids.

    Strings of control tokens (roles, thinking, tools) in ordinary text are encoded as plain characters: what a
    user writes can never forge a role.  Only `allow_special=True` (templates) turns them into control tokens.
    """

    def __init__(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            values = json.loads(text)
            self._inner = tokenizers.Tokenizer.from_str(text)
            added = {t["content"]: t["id"] for t in values.get("added_tokens", [])}
            plain = tokenizers.Tokenizer.from_str(json.dumps({**values, "added_tokens": []}))
        except FileNotFoundError:
            raise CheckpointError(
                f"{FILE_NAME} was looked for in {file.parent} and is not there; put the checkpoint's tokenizer beside "
                "its weights, or pass token ids"
            ) from None
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise CheckpointError(f"{file} is not a usable tokenizer ({error}); download it again") from None
        self._plain, self._added = plain, added
        self._control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of the checkpoint in directory `path`.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return cls(Path(path) / FILE_NAME)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, control tokens included; the network's vocabulary may be larger."""
        return self._inner.get_vocab_size(with_added_tokens=True)

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
        if not allow_special or self._control is None:
            return self._plain_ids(text)
        ids: list[int] = []
        at = 0
        for found in self._control.finditer(text):
            ids += [*self._plain_ids(text[at : found.start()]), self._added[found.group()]]
            at = found.end()
        return ids + self._plain_ids(text[at:])

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)
