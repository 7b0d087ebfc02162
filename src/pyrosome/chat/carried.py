"""Thoughts as a string that a client keeps and sends back without reading it.

Some clients throw a turn's thoughts away and keep only the opaque string beside them: OpenAI's `encrypted_content`,
Anthropic's `signature`.  So the thoughts are put into it.  It is no secret and proves nothing: a client could as well
send the thoughts themselves.
"""

from __future__ import annotations

import base64
import binascii

_MARK = "thought1."


def carry(thought: str) -> str:
    """The thought as such a string."""
    return _MARK + base64.urlsafe_b64encode(thought.encode("utf-8", "replace")).decode("ascii")


def carried(opaque: object) -> str:
    """The thought in such a string; "" in any other."""
    if not isinstance(opaque, str) or not opaque.startswith(_MARK):
        return ""
    try:
        return base64.b64decode(opaque[len(_MARK) :], altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):  # cut short or changed on its way
        return ""
