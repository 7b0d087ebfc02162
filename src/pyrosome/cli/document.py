"""A document that is asked about: read from disk, and found again among the tokens of a prompt."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from pyrosome.cli.terminal import decoded, printable
from pyrosome.errors import RequestError

SHIPPED = {"builtin:ledger": "ledger.txt"}  # in the package's folder builtin
_EXCERPT = 120  # characters shown of a place
_CUT = " ... "


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as it is asked about, and the lines of its file.

    Attributes:
        name: as the user gave it.
        text: without line breaks at its end; with `is_joined`, words with one space between them.
        word_lines: of a joined text, the line of each word.
    """

    name: str
    text: str
    is_joined: bool = False
    word_lines: tuple[int, ...] = ()

    @classmethod
    def read(cls, name: str, join: bool | None = None) -> Document:
        """The document of that name: a path, "-" for standard input, or one of `SHIPPED`.

        Args:
            join: put a space in place of line breaks and other white space; None: of a shipped document only.

        Raises:
            RequestError: there is none, it cannot be read, is not UTF-8, or has nothing in it.
        """
        what = "standard input" if name == "-" else name
        raw = sys.stdin.buffer.read() if name == "-" else _bytes(name)
        if b"\0" in raw:
            raise RequestError(f"{what} is not text (it holds a zero byte at {raw.index(0)}); give a text file")
        text = decoded(raw, what)
        if not text.strip():
            raise RequestError(f"{what} is empty ({len(raw)} bytes); there is nothing to ask about: give another file")
        return cls.of(what, text, name in SHIPPED if join is None else join)

    @classmethod
    def of(cls, name: str, text: str, join: bool) -> Document:
        """A document of a text that is at hand."""
        if not join:
            return cls(name, text.rstrip("\n"))
        lines = [line.split() for line in text.split("\n")]
        words = [word for line in lines for word in line]
        return cls(name, " ".join(words), True, tuple(n for n, line in enumerate(lines, 1) for _ in line))

    def lines(self, first: int, stop: int) -> tuple[int, int]:
        """Numbers of the first and the last line, from 1, that characters first..stop-1 stand in; blanks at the ends
        count for what they stand beside."""
        part = self.text[first:stop]
        if part.strip():
            first, stop = first + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())
        if self.is_joined:
            a, b = (min(self.text.count(" ", 0, at), len(self.word_lines) - 1) for at in (first, stop))
            return self.word_lines[a], self.word_lines[b]
        return self.text.count("\n", 0, first) + 1, self.text.count("\n", 0, stop) + 1


class Located:
    """A document among the tokens of a prompt.

    Args:
        before: characters of the prompt's text before the document.
        token_bytes: the bytes an id stands for.

    Attributes:
        tokens: the document's positions in the prompt; one that it shares with what follows is among them.
    """

    def __init__(
        self, document: Document, text: str, before: int, ids: Sequence[int], token_bytes: Callable[[int], bytes]
    ) -> None:
        self.document = document
        self._bytes = document.text.encode()
        self._start = len(text[:before].encode())
        self._ends = list(itertools.accumulate(len(token_bytes(i)) for i in ids))
        stop = bisect.bisect_left(self._ends, self._start + len(self._bytes)) + 1
        self.tokens = range(bisect.bisect_right(self._ends, self._start), stop)

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """The document's characters (first, one past the last) in the tokens at positions first..last of the prompt."""
        start = self._ends[first - 1] - self._start if first else 0
        return self._character(start), self._character(self._ends[last] - self._start)

    def _character(self, byte: int) -> int:
        return len(self._bytes[: max(0, byte)].decode("utf-8", "ignore"))

    def lines(self, first: int, last: int) -> tuple[int, int]:
        """The first and the last line of the file, from 1, in those tokens."""
        return self.document.lines(*self.characters(first, last))

    def excerpt(self, first: int, last: int) -> str:
        """The text of those tokens on one line, its middle left out where it is long."""
        a, b = self.characters(first, last)
        text = printable(" ".join(self.document.text[a:b].split()))
        half = (_EXCERPT - len(_CUT)) // 2
        return text if len(text) <= _EXCERPT else text[:half].rstrip() + _CUT + text[-half:].lstrip()


def _bytes(name: str) -> bytes:
    if name in SHIPPED:
        return (resources.files("pyrosome") / "builtin" / SHIPPED[name]).read_bytes()
    if name.startswith("builtin:"):
        raise RequestError(f"{name} was asked about; built in are {', '.join(SHIPPED)}; or give the path of a file")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            raise RequestError(f"{path} is a directory; give one text file")
        return path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist in {Path.cwd()}; give the path of a text file, or -") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); give the path of a text file, or -") from None
