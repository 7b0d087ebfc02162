"""Plain text: a ledger, then questions " ? falcon 37 ;" that answer themselves."""

from __future__ import annotations

import random

from pyrosome.tasks.document import FACT_WORDS, Count, draw_facts, num_facts, spread
from pyrosome.tasks.sample import Sample, checked_count

_ASK_WORDS = 4
_MOST_ASKS = 32
_ENDS = 2  # the tokens that begin and end every text


def records(
    rng: random.Random, length: int, heldout: bool, *, facts: Count = (1, 16), asks: int | None = None
) -> Sample:
    """A document of `facts` facts and `asks` questions, each fact asked at most once.

    Args:
        asks: questions at the end; by default all facts, or as many as there is room for, at most 32.
    """
    room = length - _ENDS
    if asks is None:
        few = room // (FACT_WORDS + _ASK_WORDS)
        fit = few if few <= _MOST_ASKS else (room - _MOST_ASKS * _ASK_WORDS) // FACT_WORDS
        count = num_facts(rng, facts, fit)
        num_asks = max(1, min(count, _MOST_ASKS, (room - FACT_WORDS * count) // _ASK_WORDS))
    else:
        checked_count("asks", asks, _MOST_ASKS)
        count = num_facts(rng, facts, (room - _ASK_WORDS * asks) // FACT_WORDS)
        num_asks = min(asks, count)
    drawn = draw_facts(rng, count, num_asks, heldout)
    asked = drawn[:num_asks]
    rng.shuffle(drawn)
    words, positions = spread(rng, drawn, room - _ASK_WORDS * num_asks)
    where = {name: position for (name, _), position in zip(drawn, positions, strict=True)}
    text = " " + " ".join(words)
    answers = []
    for name, value in asked:
        text += f" ? {name}"
        answers.append((len(text), len(text) + 1 + len(value)))
        text += f" {value} ;"
    name, value = asked[-1]
    about = {
        "expected": value, "name": name, "position": where[name], "num_facts": count,
        "names": tuple(n for n, _ in asked), "positions": tuple(where[n] for n, _ in asked),
    }  # fmt: skip
    return Sample("records", text=text, answers=tuple(answers), about=about)
