"""Fields of OpenAI's and vLLM's requests that would change an answer and are not carried out here.

Whoever sends one is told: an answer that quietly leaves a wish out looks like one that heeds it.
"""

from __future__ import annotations

from reprlib import repr as shown
from typing import Any

from pyrosome.errors import RequestError

# Values that wish for nothing, and what to do instead.
_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (({},), "a grammar (structured_outputs) rules tokens out"),
    "bad_words": (([],), "a grammar (structured_outputs) rules words out"),
    "allowed_token_ids": (([],), "a grammar (structured_outputs) rules tokens out"),
    "logits_processors": (([],), "leave it out"),
    "use_beam_search": ((False,), "n gives several answers"),
    "length_penalty": ((0, 1), "it is of beam search, which there is none of"),
    "truncate_prompt_tokens": ((), "shorten the prompt before it is sent"),
    "functions": (([],), "send the same as tools"),
}


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Look for such wishes.

    Raises:
        RequestError: naming the first.
    """
    for name, (harmless, instead) in _FIELDS.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise RequestError(f"{name} is {shown(value)}, which is not supported here; {instead}")
    modalities = body.get("modalities")
    if isinstance(modalities, list) and any(m != "text" for m in modalities):
        raise RequestError(f"modalities are {shown(modalities)}; this model writes text alone")
