"""Passages of real text predicted: nats per token and bits per byte, beside what counting gives.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrosome.errors import RequestError
from pyrosome.evals.ngram import NGram
from pyrosome.evals.shares import ratio
from pyrosome.evals.subject import Subject
from pyrosome.evals.watch import Watch, gathered
from pyrosome.tasks.text import Text

CHARS = 1024
TRAIN_CHARS = 4_000_000
ORDERS = {"unigram": 1, "5-gram": 5}


class Passage(NamedTuple):
    """A part of a document, from the beginning of a line."""

    document: int
    text: str


def passages(documents: Sequence[str], chars: int) -> list[Passage]:
    """All of `documents` in parts of at most `chars` characters, cut between lines where there is one; none twice."""
    out = []
    for number, text in enumerate(documents):
        start = 0
        while start < len(text):
            stop = start + chars
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            if text[start:stop].strip():
                out.append(Passage(number, text[start:stop]))
            start = stop
    return out


def text(
    subject: Subject,
    n: int = 256,
    seed: int = 0,
    chars: int = CHARS,
    train_chars: int = TRAIN_CHARS,
    found: Text | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Predict `n` held-out passages of up to `chars` characters; figures as plain data, with standard errors.

    Args:
        train_chars: of training passages, that n-gram models are counted on.
        found: the documents; None: those of this machine.

    Raises:
        RequestError: no corpus was found, or there are fewer held-out passages.
        ContextTooLong: a passage is longer than the model's context.
    """
    watch, found = watch or Watch(), found or Text()
    held = passages(found.documents[True], chars)
    if len(held) < n:
        raise RequestError(f"{n} passages were asked for and {len(held)} of {chars} characters are held out")
    rng = random.Random(f"text/{seed}")
    asked = rng.sample(held, n)
    ids = [subject.encode(p.text) for p in asked]
    nats = gathered(watch, "passages", n, _predicted(subject, ids))
    costs: dict[str, list[float]] = {"model": nats}
    if nats:
        train = passages(found.documents[False], chars)
        rng.shuffle(train)
        texts = [subject.encode(p.text) for p in _first(train, train_chars)]
        for name, order in ORDERS.items():
            counted = NGram(order, subject.model.config.vocab_size, texts)
            costs[name] = [float(counted.nats(one).sum()) for one in ids[: len(nats)]]
    asked, ids = asked[: len(nats)], ids[: len(nats)]
    return {
        "chars": chars,
        "train_chars": train_chars,
        "corpora": {c.name: c.licence for c in found.corpora},
        "n": len(asked),
        "documents": len({p.document for p in asked}),
        "tokens": sum(len(i) - 1 for i in ids),
        "bytes": sum(len(p.text.encode()) for p in asked),
        "results": [_figures(name, cost, asked, ids) for name, cost in costs.items() if nats],
        "margins": [
            _figures(f"{name} - model", [b - a for a, b in zip(nats, cost, strict=True)], asked, ids)
            for name, cost in costs.items()
            if name != "model"
        ],
    }


def _predicted(subject: Subject, ids: Sequence[list[int]]) -> Generator[float, None, None]:
    """Nats of each passage, given its beginning-of-sentence id."""
    for one in ids:
        yield cost_of(subject.model.logits, one)


def cost_of(logits: Callable[[list[int]], Tensor], ids: list[int]) -> float:
    """Nats of all ids after the first, by a network's logits [T, V]."""
    logits_TV = logits(ids[:-1]).double()
    at_T1 = torch.tensor(ids[1:])[:, None]
    return float((logits_TV.logsumexp(1) - logits_TV.gather(1, at_T1)[:, 0]).sum())


def _first(train: Sequence[Passage], chars: int) -> list[Passage]:
    out, left = [], chars
    for passage in train:
        if left <= 0:
            break
        out.append(passage)
        left -= len(passage.text)
    return out


def _figures(name: str, nats: list[float], asked: Sequence[Passage], ids: Sequence[list[int]]) -> dict[str, Any]:
    documents = [p.document for p in asked]
    token = ratio(nats, [len(i) - 1.0 for i in ids], documents)
    byte = ratio([x / math.log(2) for x in nats], [float(len(p.text.encode())) for p in asked], documents)
    return {
        "name": name,
        "nats_per_token": token.value,
        "nats_per_token_error": _number(token.error),
        "bits_per_byte": byte.value,
        "bits_per_byte_error": _number(byte.error),
    }


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x
