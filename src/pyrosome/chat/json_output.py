"""The JSON in an answer that was asked for as JSON: the text written round it is left out."""

from __future__ import annotations

import re

_START = re.compile(r"```|[{\[]")
_FENCE = re.compile(r"```[^\n]*\n")


class JsonOutput:
    """Takes content as it grows, gives out the fenced block if one comes first, else all from the first bracket.

    Text with no JSON in it is given out whole at the end: an answer is never lost.
    """

    def __init__(self) -> None:
        self._state = "before"  # then "bare", or "fenced" and "after"
        self._held = ""  # text before the JSON; within it, spaces and backticks that may be the closing fence
        self._quoted = self._escaped = False

    def feed(self, text: str, *, final: bool = False) -> str:
        """Take text; return what of it is the JSON."""
        if self._state == "before":
            text = self._begin(self._held + text)
        if self._state == "bare":
            return text
        out = "".join(map(self._fenced, text)) if self._state == "fenced" else ""
        if final and self._state != "after":
            out, self._held = out + self._held, ""
        return out

    def _begin(self, text: str) -> str:
        self._held = text
        found = _START.search(text)
        if found and found.group() != "```":
            self._state, at = "bare", found.start()
        elif found and (fence := _FENCE.match(text, found.start())):
            self._state, at = "fenced", fence.end()
        else:
            return ""
        self._held = ""
        return text[at:]

    def _fenced(self, c: str) -> str:
        if self._state == "after":
            return ""
        if self._quoted:
            self._quoted = c != '"' or self._escaped
            self._escaped = c == "\\" and not self._escaped
            return c
        if c.isspace() or c == "`":
            self._held += c
            if self._held.endswith("```"):
                self._state, self._held = "after", ""
            return ""
        self._quoted = c == '"'
        out, self._held = self._held + c, ""
        return out
