"""Sums and differences within 0..99, answered at once or in steps."""

from __future__ import annotations

import random

from pyrosome.tasks.heldout import is_held_out, sum_is_held_out
from pyrosome.tasks.sample import Sample, assistant, checked_count, checked_thinking, user

_MOST_ASKS, _MOST_TERMS = 32, 8


def sums(
    rng: random.Random, length: int, heldout: bool, *, thinking: str = "off", asks: int = 1, terms: int = 2
) -> Sample:
    """ "37 + 25" -> "62" in `asks` turns, of `terms` numbers each; thinking, the steps come first.

    `length` is not filled.
    """
    checked_thinking(thinking)
    checked_count("asks", asks, _MOST_ASKS)
    checked_count("terms", terms, _MOST_TERMS, least=2)
    messages = []
    question = answer = ""
    for _ in range(asks):
        question, answer, steps = draw_sum(rng, heldout) if terms == 2 else draw_chain(rng, heldout, terms)
        messages += [user(question), assistant(answer, steps, thinking)]
    return Sample("sums", tuple(messages), thinking, about={"expected": answer, "question": question})


def draw_sum(rng: random.Random, heldout: bool) -> tuple[str, str, str]:
    """A question, its answer and the steps to it."""
    while True:
        op = rng.choice("+-")
        a, b = rng.randrange(100), rng.randrange(100)
        if op == "+" and a + b > 99:
            a, b = 99 - a, 99 - b  # which always fits
        elif op == "-" and b > a:
            a, b = b, a
        if sum_is_held_out(a, op, b) == heldout:
            result = a + b if op == "+" else a - b
            return f"{a} {op} {b}", str(result), steps_of(a, op, b)


def draw_chain(rng: random.Random, heldout: bool, terms: int) -> tuple[str, str, str]:
    """As `draw_sum`, of more numbers, taken from left to right: no result on the way is outside 0..99."""
    while True:
        value = rng.randrange(100)
        question, steps = [str(value)], []
        for _ in range(terms - 1):
            op = rng.choice("+-")
            number = rng.randrange(100 - value) if op == "+" else rng.randrange(value + 1)
            question += [op, str(number)]
            steps.append(steps_of(value, op, number))
            value += number if op == "+" else -number
        if is_held_out(*question) == heldout:
            return " ".join(question), str(value), " ; ".join(steps)


def steps_of(a: int, op: str, b: int) -> str:
    """The way to "a op b" over tens and ones, no number on it outside 0..99.

    A step may be a sum that is held out as a question.
    """
    tens, ones = b - b % 10, b % 10
    if op == "-":
        return f"{a} - {tens} = {a - tens} ; {a - tens} - {ones} = {a - b}"
    high, low = a - a % 10 + tens, a % 10 + ones
    return f"{a - a % 10} + {tens} = {high} ; {a % 10} + {ones} = {low} ; {high} + {low} = {a + b}"
