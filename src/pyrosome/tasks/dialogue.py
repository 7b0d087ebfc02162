"""Short exchanges and instructions about the form of an answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from pyrosome.tasks.heldout import is_held_out
from pyrosome.tasks.sample import Sample, assistant, checked_thinking, user
from pyrosome.tasks.words import NAMES

Exchange = tuple[str, str]

# Said in training only: there is nothing in them to hold out.
_FIXED: tuple[Exchange, ...] = (
    ("hello", "hello ! ask me about a ledger ."),
    ("good morning", "good morning ! ask me about a ledger ."),
    ("who are you", "i am a small model . i find facts in a ledger ."),
    ("what can you do", "i find facts in a ledger , do small sums and look up names ."),
    ("thank you", "you are welcome ."),
    ("good night", "good night !"),
)


def dialogue(rng: random.Random, length: int, heldout: bool, *, thinking: str = "off") -> Sample:
    """One exchange from a dozen kinds; thinking, the reasoning is one fixed line.  `length` is not filled."""
    checked_thinking(thinking)
    if not heldout and rng.random() < len(_FIXED) / (len(_FIXED) + len(_SLOTTED)):
        question, answer = rng.choice(_FIXED)
    else:
        question, answer = rng.choice(_SLOTTED)(rng)
        while is_held_out(question) != heldout:
            question, answer = rng.choice(_SLOTTED)(rng)
    messages = (user(question), assistant(answer, "no sum , no look up", thinking))
    return Sample("dialogue", messages, thinking, about={"expected": answer, "question": question})


def _say(rng: random.Random) -> Exchange:
    name = rng.choice(NAMES)
    return f"say {name}", name


def _twice(rng: random.Random) -> Exchange:
    name = rng.choice(NAMES)
    return f"say {name} twice", f"{name} {name}"


def _count_to(rng: random.Random) -> Exchange:
    last = rng.randint(2, 20)
    return f"count to {last}", " ".join(map(str, range(1, last + 1)))


def _count_from(rng: random.Random) -> Exchange:
    first = rng.randint(1, 80)
    last = first + rng.randint(2, 9)
    return f"count from {first} to {last}", " ".join(map(str, range(first, last + 1)))


def _after(rng: random.Random) -> Exchange:
    number = rng.randint(1, 98)
    return f"what is after {number}", str(number + 1)


def _before(rng: random.Random) -> Exchange:
    number = rng.randint(1, 98)
    return f"what is before {number}", str(number - 1)


def _larger(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    return f"large or small : {a} , {b} ?", f"{max(a, b)} is large , {min(a, b)} is small"


def _first(rng: random.Random) -> Exchange:
    names = rng.sample(NAMES, rng.randint(2, 5))
    return f"first of {' '.join(names)}", names[0]


def _last(rng: random.Random) -> Exchange:
    names = rng.sample(NAMES, rng.randint(2, 5))
    return f"last of {' '.join(names)}", names[-1]


def _turned(rng: random.Random) -> Exchange:
    names = rng.sample(NAMES, rng.randint(2, 4))
    return f"turn around {' '.join(names)}", " ".join(reversed(names))


_SLOTTED: tuple[Callable[[random.Random], Exchange], ...] = (
    _say, _twice, _count_to, _count_from, _after, _before, _larger, _first, _last, _turned,
)  # fmt: skip
