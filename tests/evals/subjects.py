"""Models to be evaluated: a small random one, and one that answers by rule and computes nothing."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from pyrosome.chat import Tokenizer
from pyrosome.config import ModelConfig
from pyrosome.engine.request import Ended, Request, Timeline, TokenEvent
from pyrosome.evals.subject import Subject
from pyrosome.options import EngineOptions
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import tiny
from pyrosome.train.tokenizer import save_tokenizer, task_words, train_tokenizer

VOCABULARY = 1280
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{tool}">\n'
    '<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def config(**changes) -> ModelConfig:
    """The tiny shape over a vocabulary in which every word of the tasks is one token."""
    return tiny((0, 4, 128), vocab_size=VOCABULARY, max_position_embeddings=4096, **changes)


@functools.cache
def checkpoint(seed: int = 0) -> Path:
    """A random network with a tokenizer of the tasks' words; made once, and shared."""
    path = Path(_home().name) / f"tiny-{seed}"
    random_checkpoint(path, config(), seed, "bf16")
    save_tokenizer(train_tokenizer((), VOCABULARY, task_words(VOCABULARY)), path)
    return path


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="pyrosome-evals-")


class Oracle(Subject):
    """Answers by `rule`, from a prompt's text to what is said; control tokens in it count as such.

    `asked` has what was asked: (prompt, request).  Each answer reports `drafts` (drafted, accepted).
    """

    def __init__(self, rule: Callable[[str], str], drafts: tuple[int, int] = (4, 3), **changes) -> None:
        self.rule, self.drafts = rule, drafts
        self.tokenizer = Tokenizer.from_dir(checkpoint())
        known = {"path": checkpoint(), "config": config(**changes), "kv_format": "f32", "numerics": "exact"}
        self.model = SimpleNamespace(**known)
        self.options = EngineOptions(max_sequences=2)
        self._numbers = itertools.count()
        self.asked: list[tuple[str, Request]] = []
        self.jobs: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def opened(self, context, *, ablation="none", seed=0, reuse=False):
        self._check_context(context)
        self.jobs.append((context, ablation))
        self.reuse = reuse
        yield

    def submit(self, request):
        prompt = self.tokenizer.decode(request.ids)
        self.asked.append((prompt, request))
        ids = self.tokenizer.encode(self.rule(prompt), allow_special=True)
        ids = [*ids, self.model.config.eos_token_id][: request.params.max_tokens]
        return Events(request, ids, self.model.config.eos_token_id, self.drafts)


class Events:
    """The events of an answer that is there at once."""

    def __init__(self, request, ids, eos, drafts):
        end = "stop" if ids[-1] == eos else "length"
        timeline = Timeline(drafted=(drafts[0],), accepted=(drafts[1],))
        events = [TokenEvent(request.id, 0, t, {}, t == eos) for t in ids]
        self.events = iter([*events, Ended(request.id, 0, end, len(ids), timeline=timeline)])

    def __iter__(self):
        return self.events

    def close(self):
        self.events = iter(())
