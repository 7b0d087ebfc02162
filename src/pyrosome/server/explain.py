"""How a request's prompt was found in the cache, and why not more of it, for clients that ask by `X-Cache-Explain: 1`.

It is known with the first token.  A whole answer has it in a header; a stream in a comment before that token, in
JSON both; and where the protocol's answer has a field of our own, it is in there too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

if TYPE_CHECKING:
    from pyrosome.server.exchange import Exchange, Outcome
    from pyrosome.server.group import Group

HEADER = "x-cache-explain"


def is_asked(headers: Headers) -> bool:
    """Whether a request asks for it."""
    return headers.get(HEADER, "").strip().lower() in ("1", "true", "yes", "on")


def told(outcome: Outcome) -> dict[str, Any] | None:
    """How the cache was used; None where that was not asked for, or is not known yet.

    `reused_tokens` of the prompt were not computed, `computed_tokens` were.  `matched_tokens` were found as an unbroken
    chain of blocks, of which `replayed_tokens`, in tokens through the whole network, had to be computed again for want
    of their state.  `limit` and `reason` say why it was not more, `stream` which cache stream that was for.
    """
    reuse = outcome.reuse
    if not outcome.explains or not reuse.prompt_tokens:
        return None
    return {
        "prompt_tokens": reuse.prompt_tokens, "reused_tokens": reuse.reused_tokens,
        "computed_tokens": reuse.prompt_tokens - reuse.reused_tokens, "matched_tokens": reuse.matched_tokens,
        "replayed_tokens": reuse.replayed_tokens, "limit": reuse.limit, "stream": reuse.stream, "reason": reuse.reason,
    }  # fmt: skip


def beside(outcome: Outcome) -> dict[str, Any]:
    """The field of an answer that tells it; none where there is nothing to tell."""
    found = told(outcome)
    return {"cache": found} if found else {}


class Telling:
    """What one answer tells of it, once.  Of a request with several prompts it is a list."""

    def __init__(self, exchange: Exchange | Group) -> None:
        exchanges = getattr(exchange, "exchanges", None)
        self._is_list = exchanges is not None
        self._outcomes: list[Outcome] = [e.outcome for e in exchanges] if exchanges else [exchange.outcome]
        self._is_told = False

    def header(self) -> dict[str, str]:
        """The header of a whole answer."""
        text = self._text()
        return {HEADER: text} if text else {}

    def comment(self) -> list[bytes]:
        """The comment in a stream, as soon as it is known."""
        if self._is_told or not (text := self._text()):
            return []
        self._is_told = True
        return [f": {HEADER} {text}\n\n".encode()]

    def _text(self) -> str:
        """In ASCII and one line; "": it is not known of all prompts yet, or nobody asked."""
        found = [told(o) for o in self._outcomes]
        return json.dumps(found if self._is_list else found[0]) if all(found) else ""
