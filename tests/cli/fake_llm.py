"""The command with a stand-in for the model: `python -m tests.cli.fake_llm chat ...`.

It answers at once and by rule, and needs no torch, so that a terminal session takes half a second:

    think            thoughts before the answer (in every mode but off)
    slow             words until it is stopped, a hundredth of a second apart; `stuck` is one step that takes for ever
    only thoughts    like slow, and all of it thoughts
    escape           an answer with control characters
    length           an answer that was cut
    fail             a RequestError instead of an answer
    messages         the conversation as the model sees it, as JSON; `params` the sampling it was given
    options          those of the engine, as JSON (as a prompt too); at its end a line says that it was closed
    anything else    "You said: ..."
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from types import ModuleType, SimpleNamespace

from pyrosome.errors import CheckpointError, RequestError
from pyrosome.options import SamplingParams

CONTEXT = 1000


class FakeLLM:
    def __init__(self, path, numerics="trained", kv_format=None, *, options, progress=None):
        self.options, self.was_asked = dataclasses.asdict(options), False
        if not str(path).startswith("builtin:"):
            raise CheckpointError(f"{path} does not exist; give the directory of a checkpoint")
        if "long-load" in str(path):
            for shard in range(1, 4):
                if progress:
                    progress(shard << 30, 3 << 30, f"shard {shard}")
                time.sleep(0.3)
        config = SimpleNamespace(max_position_embeddings=CONTEXT)
        self.model = SimpleNamespace(config=config, numerics=numerics, kv_format=kv_format or "fp8")
        self.tokenizer = SimpleNamespace(encode=str.split)
        self.chat_template = SimpleNamespace(conversation=self._prompt)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.was_asked:
            sys.stderr.write("closed\n")

    @staticmethod
    def _prompt(messages, thinking):
        def sampling_params(**changes):
            return SamplingParams(**{"temperature": 1.0, "top_p": 0.95, **changes})

        limit = 300 if thinking == "off" else 8000
        return SimpleNamespace(ids=[0] * 10 * len(messages), max_tokens=limit, sampling_params=sampling_params)

    def encode(self, text):
        return text.split()

    def kv_bytes(self, context=0):
        return {"per_token": 2.5, "sequence": 100 + 10 * context}

    def stream(self, prompt, params=None):
        self.was_asked = prompt == "options"
        for number, word in enumerate([json.dumps(self.options)] if self.was_asked else _words(prompt)):
            yield SimpleNamespace(text=word, token_ids=[number], finish_reason=None)
        yield SimpleNamespace(text="", token_ids=[1], finish_reason="stop")

    def chat_stream(self, messages, thinking="off", tools=None, params=None):
        from pyrosome.chat.events import ContentDelta, Done, Message, ReasoningDelta, Usage

        said = messages[-1]["content"]
        if said == "fail":
            raise RequestError("the model will not answer that")
        reasoning = content = ""
        if said == "only thoughts":
            for word in _words("slow"):
                yield ReasoningDelta(word)
        if thinking != "off" and ("think" in said or said == "slow"):
            for word in ("thought ", f"{thinking} ", "hard"):
                reasoning += word
                yield ReasoningDelta(word)
        self.was_asked = said == "options"
        known = {"messages": messages, "params": dataclasses.asdict(params) if params else None}
        known["options"] = self.options
        for word in [json.dumps(known[said])] if said in known else _words(said):
            content += word
            yield ContentDelta(word)
        reason = "length" if said == "length" else "stop"
        yield Done(Message(reasoning, content, (), reason), Usage(10 * len(messages), 7, len(reasoning.split())))


def _words(said):
    if said == "slow":
        for number in range(100_000):
            time.sleep(0.01)
            yield f"word{number} "
    elif said == "stuck":
        yield "begun "
        sys.stderr.write("at work\n")
        sys.stderr.flush()
        while not signal.getsignal(signal.SIGINT).__self__.asked:  # two signals at once would be one
            time.sleep(0.01)
        sys.stderr.write("asked\n")
        sys.stderr.flush()
        while True:  # a signal's handler returns here
            time.sleep(1000)
    elif said == "escape":
        yield "red \x1b[31mtext\x07\rback"
    else:
        yield "You said:"
        yield from (f" {word}" for word in said.split())


def main():
    stand_in = ModuleType("pyrosome.llm")
    stand_in.LLM = FakeLLM
    sys.modules["pyrosome.llm"] = stand_in
    from pyrosome.cli import main as command

    command()


if __name__ == "__main__":
    main()
