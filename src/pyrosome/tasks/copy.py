"""Words to give back as they stand: after "copy :", or between quotation marks in a document."""

from __future__ import annotations

import random

from pyrosome.errors import RequestError
from pyrosome.tasks.heldout import is_held_out
from pyrosome.tasks.sample import Sample, assistant, user
from pyrosome.tasks.words import FILLER, NAMES, VALUES

_ENDS = 7  # "copy :" and the control tokens
_QUOTE_ENDS = 10  # the marks, "? quote" and the control tokens
_LEAST, _MOST = 3, 24
_ANY = NAMES + FILLER + VALUES
_FIRST = NAMES + VALUES


def copy(rng: random.Random, length: int, heldout: bool, *, words: int | tuple[int, int] = (_LEAST, _MOST)) -> Sample:
    """ "copy : w1 ... wn" -> "w1 ... wn"; `words` is n or a range of it, cut to what fits `length`."""
    passage = _passage(rng, _size(rng, words, (length - _ENDS) // 2), heldout, _ANY)
    return Sample("copy", (user(f"copy : {passage}"), assistant(passage, "", "off")), about={"expected": passage})


def quote(rng: random.Random, length: int, heldout: bool, *, words: int | tuple[int, int] = (_LEAST, _MOST)) -> Sample:
    """A document with one passage between quotation marks, then "? quote" -> the passage."""
    passage = _passage(rng, _size(rng, words, (length - _QUOTE_ENDS - 1) // 2), heldout, _FIRST + FILLER)
    size = passage.count(" ") + 1
    fillers = rng.choices(FILLER, k=max(1, length - _QUOTE_ENDS - 2 * size))
    at = rng.randint(1, len(fillers))
    document = " ".join([*fillers[:at], '"', passage, '"', *fillers[at:]])
    about = {"expected": passage, "position": at + 1}
    return Sample("quote", (user(f"{document}\n? quote"), assistant(passage, "", "off")), about=about)


def _size(rng: random.Random, words: int | tuple[int, int], fit: int) -> int:
    ends = words if isinstance(words, tuple | list) else (words, words)
    if not all(isinstance(n, int) for n in ends) or len(ends) != 2 or not _LEAST <= ends[0] <= ends[1] <= _MOST:
        raise RequestError(f"words = {words!r} was asked for; it is a number or range from {_LEAST} to {_MOST}")
    if isinstance(words, int):
        return words
    fit = max(fit, _LEAST)
    return rng.randint(min(ends[0], fit), min(ends[1], fit))


def _passage(rng: random.Random, size: int, heldout: bool, words: tuple[str, ...]) -> str:
    while True:  # one in eight is held out
        # the first word stands without a space before it, which the tokenizer has as one token only for these
        passage = [rng.choice(_FIRST), *rng.choices(words, k=size - 1)]
        if is_held_out(*passage) == heldout:
            return " ".join(passage)
