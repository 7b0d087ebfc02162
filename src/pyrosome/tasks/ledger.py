"""Conversations about a ledger: one value, the n-th of several, or all of them in order."""

from __future__ import annotations

import random
from typing import Any

from pyrosome.tasks.document import FACT_WORDS, Count, Fact, draw_facts, num_facts, spread
from pyrosome.tasks.heldout import ANY, KEPT, TRAINED
from pyrosome.tasks.sample import Sample, assistant, checked_count, checked_thinking, user
from pyrosome.tasks.words import NAMES, ORDINALS

_MOST_ASKS = 32
_ENDS = 2  # the tokens that begin and end a conversation
_TURN = 7  # "? falcon" and "37" with the control tokens around them
_THOUGHT = 3  # "<think> falcon 37"


def ledger(
    rng: random.Random, length: int, heldout: bool, *, facts: Count = (1, 16), asks: int = 1, thinking: str = "off"
) -> Sample:
    """A ledger, then "? falcon" in as many turns as `asks`, each fact asked at most once."""
    checked_thinking(thinking)
    checked_count("asks", asks, _MOST_ASKS)
    room = length - _ENDS - _TURN * asks - (_THOUGHT if thinking != "off" else 0)
    count = num_facts(rng, facts, room // FACT_WORDS)
    asks = min(asks, count)
    drawn = draw_facts(rng, count, asks, heldout)
    asked = drawn[:asks]
    rng.shuffle(drawn)
    words, positions = spread(rng, drawn, room, lead=1)
    where = {name: position for (name, _), position in zip(drawn, positions, strict=True)}
    messages = []
    for n, (name, value) in enumerate(asked):
        question = f"? {name}" if n else f"{' '.join(words)}\n? {name}"
        messages += [user(question), assistant(value, f"{name} {value}", thinking)]
    name, value = asked[-1]
    about = {
        "expected": value, "name": name, "position": where[name], "num_facts": count,
        "names": tuple(n for n, _ in asked), "positions": tuple(where[n] for n, _ in asked),
    }  # fmt: skip
    return Sample("ledger", tuple(messages), thinking, about=about)


def ordinal(rng: random.Random, length: int, heldout: bool, *, facts: Count = (2, 16), thinking: str = "off") -> Sample:
    """A ledger in which names occur up to four times, then "? second falcon"."""
    words, places, name, values, count = _repeated(rng, length - 1, heldout, facts, thinking)
    nth = rng.randrange(len(values))
    if heldout:
        nth = next(i for i, v in enumerate(values) if v in KEPT[name])
    question = f"{ORDINALS[nth]} {name}"
    about = {
        "expected": values[nth], "name": name, "position": places[nth], "num_facts": count, "nth": nth,
        "names": (name,), "positions": (places[nth],),
    }  # fmt: skip
    return Sample("ordinal", _asked(words, question, values[nth], name, values, thinking), thinking, about=about)


def several(rng: random.Random, length: int, heldout: bool, *, facts: Count = (2, 16), thinking: str = "off") -> Sample:
    """A ledger in which names occur up to four times, then "? all falcon"."""
    words, places, name, values, count = _repeated(rng, length - 3, heldout, facts, thinking, all_kept=True)
    expected = " ".join(values)
    about = {
        "expected": expected, "name": name, "position": places[0], "num_facts": count,
        "names": (name,), "positions": tuple(places),
    }  # fmt: skip
    return Sample("several", _asked(words, f"all {name}", expected, name, values, thinking), thinking, about=about)


def _asked(
    words: list[str], question: str, answer: str, name: str, values: list[str], thinking: str
) -> tuple[dict[str, Any], ...]:
    reasoning = f"{name} {' '.join(values)}"
    return user(f"{' '.join(words)}\n? {question}"), assistant(answer, reasoning, thinking)


def _repeated(
    rng: random.Random, length: int, heldout: bool, facts: Count, thinking: str, all_kept: bool = False
) -> tuple[list[str], list[int], str, list[str], int]:
    """A document's words, and of a name that occurs two to four times: where, itself, its values; the facts' number.

    Of a held-out sample, one of the values is held out, or with `all_kept` every one.
    """
    checked_thinking(thinking)
    room = length - _ENDS - _TURN - (_THOUGHT + 2 if thinking != "off" else 0)
    total = max(2, num_facts(rng, facts, room // FACT_WORDS))
    drawn: list[Fact] = []
    names = iter(rng.sample(NAMES, min(total, len(NAMES))))
    asked = next(names)
    times = rng.randint(2, min(4, total))
    if heldout:
        kept = rng.sample(KEPT[asked], times if all_kept else 1)
        others = rng.sample([v for v in ANY[asked] if v not in KEPT[asked]], times - len(kept))
        drawn += [(asked, v) for v in kept + others]
    else:
        drawn += [(asked, v) for v in rng.sample(TRAINED[asked], times)]
    values = ANY if heldout else TRAINED
    while len(drawn) < total:
        name, times = next(names), min(rng.randint(1, 4), total - len(drawn))
        drawn += [(name, v) for v in rng.sample(values[name], times)]
    rng.shuffle(drawn)
    words, positions = spread(rng, drawn, room, lead=1)
    places = [p for (name, _), p in zip(drawn, positions, strict=True) if name == asked]
    return words, places, asked, [v for name, v in drawn if name == asked], total
