"""Texts to be predicted and gone on with: what a model was taught where that is known, sentences, or ids at random."""

from __future__ import annotations

import random

from pyrosome import tasks
from pyrosome.verify import haystack
from pyrosome.verify.subject import Subject

_FACTS, _ASKS = 8, 4


def texts(subject: Subject, rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Ids of `count` prompts of about `length` tokens: ledgers with some questions answered and one to answer for the
    built-in model, sentences and a question for others, ids of the vocabulary at random without a tokenizer."""
    most = subject.model.config.max_position_embeddings
    length = min(length, most)
    if not subject.has_tokenizer:
        return [[rng.randrange(subject.model.config.vocab_size) for _ in range(length)] for _ in range(count)]
    if subject.is_builtin:
        samples = [tasks.make("ledger", rng, length, heldout=True, facts=_FACTS, asks=_ASKS) for _ in range(count)]
        prompts = [subject.chat_template.conversation(s.messages[:-1], "off") for s in samples]
    else:
        prompts = [haystack.drawn(subject, length, 1, rng.getrandbits(32))[0][1] for _ in range(count)]
    return [list(prompt.ids[:most]) for prompt in prompts]
