"""Real text for training, read from packages that are installed here; none of it is kept in this package."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from pyrosome.errors import RequestError
from pyrosome.tasks.sample import Sample

_DOC = Path("/usr/share/doc")
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
_HELD_OUT_OF = 16
_UNSHOWN = ("script", "style")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files of one source, in sorted order; `num_bytes` as they lie on disk."""

    name: str
    licence: str
    root: Path
    files: tuple[Path, ...]
    num_bytes: int


def corpora(stdlib: Path | None = None, doc: Path = _DOC) -> list[Corpus]:
    """The sources found here: Python's standard library, its documentation, SQLite's documentation.

    Args:
        stdlib: directory of the standard library; the running Python's where None.
        doc: where Debian packages put their documentation.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    code = (f for f in stdlib.rglob("*.py") if not _NOT_PROSE & set(f.relative_to(stdlib).parts))
    manuals = {p.resolve() for p in doc.glob("python3*/html/_sources")}
    found = [
        _corpus("python-stdlib", "PSF-2.0", stdlib, code),
        *(_corpus("python-doc", "PSF-2.0", m, m.rglob("*.rst.txt")) for m in sorted(manuals)),
        _corpus("sqlite-doc", "public domain", doc / "sqlite3", (doc / "sqlite3").rglob("*.html")),
    ]
    return [c for c in found if c.files]


class Text:
    """Documents of some corpora; one file in sixteen is held out, by its path in its corpus.

    Lines with characters outside ASCII, and files that are not UTF-8, are left out.

    Raises:
        RequestError: no corpus was found, or there is no text in one of the two parts.
    """

    def __init__(self, found: Sequence[Corpus] | None = None) -> None:
        self.corpora = corpora() if found is None else list(found)
        if not self.corpora:
            raise RequestError(
                "text was asked for and no corpus was found on this machine; install python3-doc or sqlite3-doc, a "
                "Python with its standard library, or leave text out of the mix"
            )
        documents: dict[bool, list[str]] = {False: [], True: []}
        for corpus in self.corpora:
            for path in corpus.files:
                relative = path.relative_to(corpus.root).as_posix()
                if text := _read(path):
                    documents[zlib.crc32(relative.encode()) % _HELD_OUT_OF == 0].append(text)
        self.documents = {part: tuple(texts) for part, texts in documents.items()}
        for part, texts in self.documents.items():
            if not texts:
                raise RequestError(
                    f"text was asked for and {', '.join(c.name for c in self.corpora)} holds none "
                    f"{'to hold out' if part else 'to train with'} ({sum(len(c.files) for c in self.corpora)} files); "
                    "install a larger corpus, python3-doc for one, or leave text out of the mix"
                )
        self._ends = {p: list(itertools.accumulate(map(len, texts))) for p, texts in self.documents.items()}

    def passage(self, rng: random.Random, num_chars: int, heldout: bool = False) -> str:
        """A passage of `num_chars` characters that begins with a line; shorter where its document is.

        Every document is chosen as often as it is long.
        """
        text = rng.choices(self.documents[heldout], cum_weights=self._ends[heldout])[0]
        start = rng.randint(0, max(0, len(text) - num_chars))
        start = text.rfind("\n", 0, start) + 1
        return text[start : start + num_chars]

    def sample(self, rng: random.Random, num_chars: int, heldout: bool = False) -> Sample:
        """A passage as a sample of kind "text", every token of which is to be learnt."""
        return Sample("text", text=self.passage(rng, num_chars, heldout), about={"expected": ""})


def _corpus(name: str, licence: str, root: Path, files: Iterator[Path]) -> Corpus:
    kept = tuple(sorted(f for f in files if f.is_file()))
    return Corpus(name, licence, root, kept, sum(f.stat().st_size for f in kept))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    if path.suffix == ".html":
        page = _Page()
        page.feed(text)
        text = page.text()
    if not text.isascii():
        text = "".join(line for line in text.splitlines(keepends=True) if line.isascii())
    return text if text.strip() else ""


class _Page(HTMLParser):
    """What a browser would show of a page, as plain text."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _UNSHOWN

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _UNSHOWN and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data)

    def text(self) -> str:
        return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(self._parts)).strip() + "\n"
