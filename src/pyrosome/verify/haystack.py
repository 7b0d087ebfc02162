"""A fact among plain sentences, and a question for it: for models that read English."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from pyrosome.chat import Prompt
from pyrosome.evals.recall import shifts
from pyrosome.evals.subject import Subject
from pyrosome.tasks.words import NAMES

FACTS = 4  # the one that is asked for and others like it, or any number in the text would do
_PLACES = ("harbour", "library", "market", "garden", "station", "museum", "bakery", "orchard", "bridge", "mill")
_SENTENCES = (
    "The {a} by the {p} was painted again last spring.",
    "Nobody at the {p} could remember who had left the {a} there.",
    "In the evening a {a} and a {b} were carried past the {p}.",
    "They talked about the {a} for a while, and then walked on to the {p}.",
    "A drawing of the {a} hangs in the {p}, next to one of the {b}.",
    "It rained, so the {b} stayed dry under the roof of the {p}.",
)
_FACT = "The access code of the {name} is {value}."
_QUESTION = "What is the access code of the {name}? Answer with the number alone."
_PROBES = 4


class Needle(NamedTuple):
    """One question about one text.

    Attributes:
        text: the sentences, and the question at their end.
        end: of the fact in `text`, in characters.
        value: what is right.
    """

    text: str
    end: int
    value: str

    def is_right(self, answer: str) -> bool:
        """Whether the answer's only number is the value."""
        return re.findall(r"\d+", answer) == [self.value]


def needle(rng: random.Random, num_words: int, depth: float) -> Needle:
    """A text of so many words beside its facts; the one that is asked for at `depth` (0: the beginning, 1: the end)."""
    names = rng.sample(NAMES, FACTS)
    facts = [(_FACT.format(name=n, value=(v := str(rng.randrange(10_000, 100_000)))), v) for n in names]
    places = [depth, *(rng.random() for _ in facts[1:])]
    words: list[str] = []
    while len(words) < num_words:
        a, b = rng.sample(NAMES, 2)
        words += rng.choice(_SENTENCES).format(a=a, b=b, p=rng.choice(_PLACES)).split()
    words = words[: max(num_words, 1)]
    starts = [0, *(i + 1 for i, w in enumerate(words) if w.endswith("."))]
    starts = [s for s in starts if s < len(words)]
    at = {n: starts[min(int(p * len(starts)), len(starts) - 1)] for n, p in enumerate(places)}
    pieces, end = [], 0
    for i, word in enumerate(words):
        for n in (n for n, place in at.items() if place == i):
            pieces.append(facts[n][0])
            end = end if n else len(" ".join(pieces))
        pieces.append(word)
    text = " ".join(pieces).rstrip(".,") + "."
    return Needle(f"{text}\n\n{_QUESTION.format(name=names[0])}", end, facts[0][1])


def drawn(subject: Subject, context: int, n: int, seed: int) -> list[tuple[Needle, Prompt, int]]:
    """`n` needles with their prompts and the tokens after the fact: lengths around `context`, each residue alike often.

    A length is met within a token or two; which residue it has is counted from the prompt itself.
    """
    found = []
    depths = [(i + 0.5) / n for i in range(n)]
    random.Random(f"haystack/{context}/{seed}/depths").shuffle(depths)
    for number, (shift, depth) in enumerate(zip(shifts(n), depths, strict=True)):
        make = _maker(f"haystack/{context}/{seed}/{number}", depth)
        one, prompt = _of_length(subject, make, context + shift)
        found.append((one, prompt, _after(subject, one)))
    return found


def _maker(name: str, depth: float) -> Callable[[int], Needle]:
    return lambda num_words: needle(random.Random(name), num_words, depth)


def _of_length(subject: Subject, make: Callable[[int], Needle], tokens: int) -> tuple[Needle, Prompt]:
    """The text whose prompt has so many tokens, or nearly."""
    num_words, best = tokens, None
    for _ in range(_PROBES):
        one = make(num_words)
        prompt = subject.chat_template.conversation([{"role": "user", "content": one.text}], "off")
        missing = tokens - len(prompt.ids)
        if best is None or abs(missing) < abs(best[2]):
            best = one, prompt, missing
        if not missing:
            break
        num_words = max(1, num_words + (missing if abs(missing) < 8 else round(missing * num_words / len(prompt.ids))))
    assert best is not None
    return best[0], best[1]


def _after(subject: Subject, one: Needle) -> int:
    """Tokens between the fact and the answer, those of the template not counted."""
    return len(subject.tokenizer.encode(one.text[one.end :]))
