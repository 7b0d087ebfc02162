"""Which effort texts a checkpoint was trained with.  Read from its files, never guessed from its name.

| effort asked | "preview" (the April release) | "0731" (the July and August releases) |
|---|---|---|
| low  | nothing | nothing |
| high | nothing | "Absolute maximum ..." |
| max  | "Absolute maximum ..." | "Beyond maximum ..." |
"""

from __future__ import annotations

import json
from pathlib import Path

from pyrosome.errors import RequestError

PREVIEW, JULY = "preview", "0731"

# The renderer knows the later texts only: what to ask it for, so that it writes what this checkpoint was trained with.
RENDERED_EFFORT = {
    PREVIEW: {"low": "low", "high": "low", "max": "high"},
    JULY: {"low": "low", "high": "high", "max": "max"},
}
_FIRST_TEXT, _LATER_TEXT = "Reasoning Effort: Absolute maximum", "Reasoning Effort: Beyond maximum"


def dialect_of(directory: Path) -> str:
    """The dialect of the checkpoint in `directory`.

    Its own encoding code decides, by the texts it holds; else draft-head keys of the later releases in `config.json`;
    else it is taken for a preview, whose prompts carry the fewest instructions.
    """
    texts = [_read(f) for f in sorted((directory / "encoding").glob("*.py"))]
    if any(_LATER_TEXT in t for t in texts):
        return JULY
    if any(_FIRST_TEXT in t for t in texts):
        return PREVIEW
    try:
        config = json.loads(_read(directory / "config.json") or "{}")
    except ValueError:
        config = {}
    later = isinstance(config, dict) and any(k.startswith("dspark_") and v is not None for k, v in config.items())
    return JULY if later else PREVIEW


def checked(dialect: str) -> str:
    """`dialect` if there is such a one.

    Raises:
        RequestError
    """
    if dialect not in RENDERED_EFFORT:
        raise RequestError(f"dialect {dialect!r} was asked for; there are {', '.join(map(repr, RENDERED_EFFORT))}")
    return dialect


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
