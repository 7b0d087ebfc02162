"""Samples as token ids, and what learning each token is worth.

Conversations are rendered by the chat encoding itself, so a network is trained on the very ids it will be asked with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pyrosome.chat.chat import ASSISTANT, BEGIN, THINK, Chat
from pyrosome.chat.parser import END, THINK_END
from pyrosome.errors import RequestError
from pyrosome.tasks.sample import Sample


class Encoded(NamedTuple):
    """One sample; the three lists are of one length.

    `weight[i]` is what predicting ids[i] from those before it counts, 0 of the first; `answer[i]` says whether
    ids[i] is part of an answer that can be right or wrong (reasoning and the end of the sentence are not).
    """

    ids: list[int]
    weight: list[float]
    answer: list[bool]
    kind: str


class Encoder:
    """Encodes samples with the tokenizer in `directory`.

    Args:
        directory: has `tokenizer.json`, and perhaps a checkpoint's `config.json` (see `Chat`).
        background: the weight of tokens that are no part of an answer.

    Raises:
        CheckpointError: no usable tokenizer, or one that lacks the chat encoding's control tokens.
    """

    def __init__(self, directory: Path, background: float = 0.1) -> None:
        self.directory, self.background = directory, background
        self.chat = Chat(directory)
        self.tokenizer = self.chat.tokenizer
        bos, eos, assistant, think, end = (self.tokenizer.id_of(t) for t in (BEGIN, END, ASSISTANT, THINK, THINK_END))
        assert bos is not None and eos is not None  # Chat has seen that they are there
        self.bos, self.eos = bos, eos
        self._assistant, self._think, self._think_end = assistant, think, end

    def __call__(self, sample: Sample) -> Encoded:
        """The sample's ids, weights and answers.

        Raises:
            RequestError: the sample has neither text nor messages, or its last message is not the assistant's.
        """
        if sample.messages:
            return self._conversation(sample)
        if not sample.text:
            raise RequestError(f"a sample of kind {sample.kind!r} was to be encoded and has neither messages nor text")
        return self._plain(sample)

    def _plain(self, sample: Sample) -> Encoded:
        tokens = self.tokenizer.encode(sample.text)
        answer = [False] * (len(tokens) + 2)
        offset = (lambda n: n) if sample.text.isascii() else (lambda n: len(sample.text[:n].encode()))
        ranges = iter([(offset(a), offset(b)) for a, b in sample.answers])
        first, end = next(ranges, (0, 0))
        at = 0
        for n, token in enumerate(tokens, 1):
            if not end:
                break
            start, at = at, at + len(self.tokenizer.token_bytes(token))
            answer[n] = at > first and start < end
            if at >= end:
                first, end = next(ranges, (0, 0))
        other = 1.0 if sample.kind == "text" else self.background
        weight = [1.0 if a else other for a in answer]
        # A passage ends where it was cut off: nothing before that tells.
        weight[0], weight[-1] = 0.0, self.background
        return Encoded([self.bos, *tokens, self.eos], weight, answer, sample.kind)

    def _conversation(self, sample: Sample) -> Encoded:
        if sample.messages[-1].get("role") != "assistant":
            raise RequestError(
                f"a sample of kind {sample.kind!r} was to be encoded; its last message is from "
                f"{sample.messages[-1].get('role')!r}, and the assistant's is what there is to learn"
            )
        ids = self._rendered(sample)
        weight, answer = [self.background] * len(ids), [False] * len(ids)
        weight[0] = 0.0
        # An answer is open from the cue (the assistant's role and <think> or </think>) to the end of its sentence.
        cue, state = (self._think_end if sample.thinking == "off" else self._think), ""
        exact = False
        for n, token in enumerate(ids):
            if state == "cue":
                exact = token == cue  # else history: thoughts before the last question are left out of it
                state = "reasoning" if token == self._think else "content"
                continue
            if token == self._assistant:
                state = "cue"
            elif state:
                weight[n] = 1.0
                answer[n] = state == "content" and token != self.eos and exact
                if token == self._think_end:
                    state = "content"
                elif token == self.eos:
                    state = ""
        return Encoded(ids, weight, answer, sample.kind)

    def _rendered(self, sample: Sample) -> list[int]:
        """Ids of the conversation up to the end of its last answer."""
        body: dict[str, Any] = {"messages": list(sample.messages), "add_generation_prompt": False}
        body["thinking"] = {"type": "disabled" if sample.thinking == "off" else "enabled"}
        if sample.thinking != "off":
            body["reasoning_effort"] = sample.thinking
        if sample.tools:
            body["tools"] = list(sample.tools)
        return list(self.chat.render(body).ids)
