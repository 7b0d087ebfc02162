"""Log probabilities as OpenAI's clients read them: of chat completions and responses, and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyrosome.answer import TokenLog
from pyrosome.chat import Detokenizer, Tokenizer

LEAST = -9999.0  # stands for what JSON cannot write: the log of nothing


def token_entries(tokenizer: Tokenizer, tokens: Iterable[TokenLog], num_top: int) -> list[dict[str, Any]]:
    """`[{token, logprob, bytes, top_logprobs}]`."""
    return [
        _entry(tokenizer, log.token, log.logprobs[log.token])
        | {"top_logprobs": [_entry(tokenizer, t, p) for t, p in top(log.logprobs, num_top)]}
        for log in tokens
    ]


def top(logprobs: Mapping[int, float], most: int) -> list[tuple[int, float]]:
    """The most probable tokens, best first; the chosen one is among them only if it is one of them."""
    return sorted(logprobs.items(), key=lambda item: -item[1])[:most]


def prompt_entries(tokenizer: Tokenizer, logprobs: Iterable[Mapping[int, float]]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token, then for each what is known, by id as text."""
    return [None] + [
        {str(t): {"logprob": max(p, LEAST), "decoded_token": spelled(tokenizer, t)} for t, p in each.items()}
        for each in logprobs
    ]


def spelled(tokenizer: Tokenizer, token: int, prefix: str = "") -> str:
    """A token as text; one that is no text by itself, such as part of a character, by its bytes."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{b:02x}" for b in raw)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": spelled(tokenizer, token), "logprob": max(logprob, LEAST), "bytes": list(raw)}


class TextLogprobs:
    """The lists of a completion, or of its pieces one after the other; offsets are in characters of its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._offset = tokenizer, 0
        self._detokenizer = Detokenizer(tokenizer)

    def prompt(self, ids: Iterable[int], known: Iterable[Mapping[int, float] | None]) -> dict[str, list[Any]]:
        """Of a prompt that is part of the text, with what is known of each of its tokens; None: nothing."""
        lists = self._lists(zip(ids, known, strict=True))
        self._offset += len(self._detokenizer.close())
        return lists

    def answer(self, tokens: Iterable[TokenLog]) -> dict[str, list[Any]]:
        """Of the next tokens of the answer."""
        return self._lists((log.token, log.logprobs) for log in tokens)

    def _lists(self, tokens: Iterable[tuple[int, Mapping[int, float] | None]]) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, known in tokens:
            lists["tokens"].append(self._spelled(token))
            lists["token_logprobs"].append(None if known is None else max(known[token], LEAST))
            tops = None if known is None else {self._spelled(t): max(p, LEAST) for t, p in top(known, len(known))}
            lists["top_logprobs"].append(tops)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.feed([token]))
        return lists

    def _spelled(self, token: int) -> str:
        return spelled(self._tokenizer, token, "bytes:")
