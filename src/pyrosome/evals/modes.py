"""Sums with and without thought: how often each mode is right, and what the thinking costs."""

from __future__ import annotations

import random
from typing import Any

from pyrosome import tasks
from pyrosome.errors import RequestError
from pyrosome.evals.distinct import distinct
from pyrosome.evals.shares import Share, difference
from pyrosome.evals.subject import Answer, Subject, acceptance
from pyrosome.evals.watch import Watch, gathered
from pyrosome.tasks.sample import THINKING, Sample
from pyrosome.tasks.scoring import is_right

MAX_TOKENS = 128


def questions(n: int, seed: int, terms: int = 2) -> list[Sample]:
    """`n` held-out sums of `terms` numbers, no question twice.

    Raises:
        RequestError: there are not so many.
    """
    rng = random.Random(f"modes/{seed}" if terms == 2 else f"modes/{seed}/{terms}")
    return distinct(n, lambda: tasks.make("sums", rng, 1, heldout=True, terms=terms), "sums")


def modes(
    subject: Subject,
    n: int = 256,
    seed: int = 0,
    thinking: tuple[str, ...] = THINKING,
    max_tokens: int = MAX_TOKENS,
    watch: Watch | None = None,
    terms: int = 2,
) -> dict[str, Any]:
    """Ask the same `n` held-out sums of `terms` numbers in each mode; figures as plain data.

    Raises:
        RequestError: there is no such mode, or there are not so many sums.
    """
    if unknown := [m for m in thinking if m not in THINKING]:
        raise RequestError(f"the mode {unknown[0]!r} was asked for; there are {', '.join(THINKING)}")
    watch, asked = watch or Watch(), questions(n, seed, terms)
    answers: dict[str, list[Answer]] = {}
    for mode in thinking:
        answers[mode] = _answered(subject, asked, mode, max_tokens, watch)
    right = {mode: [is_right(s, a.message.content) for s, a in zip(asked, found, strict=False)]
             for mode, found in answers.items()}  # fmt: skip
    return {
        "max_tokens": max_tokens,
        "results": [_summary(mode, answers[mode], right[mode]) for mode in thinking if answers[mode]],
        "margins": [_margin(mode, over, right) for mode, over in _pairs(thinking) if right[mode] and right[over]],
    }


def _answered(subject: Subject, asked: list[Sample], mode: str, max_tokens: int, watch: Watch) -> list[Answer]:
    prompts = [subject.chat_template.conversation(s.messages[:1], mode) for s in asked]
    room = max(len(p.ids) for p in prompts) + max_tokens
    with subject.opened(room, reuse=True):
        return gathered(watch, f"thinking {mode}", len(asked), subject.answers(prompts, max_tokens))


def _summary(mode: str, answers: list[Answer], right: list[bool]) -> dict[str, Any]:
    thoughts = sorted(a.thought_tokens for a in answers)
    return {
        "thinking": mode,
        "right": Share.of(right).as_dict(),
        "thought_tokens": {
            "mean": sum(thoughts) / len(thoughts),
            "median": thoughts[len(thoughts) // 2],
            "most": thoughts[-1],
        },
        "cut": Share.of(a.message.finish_reason == "length" for a in answers).as_dict(),
        "drafts": acceptance(answers).as_dict(),
    }


def _pairs(thinking: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every mode against each that thinks less."""
    order = [m for m in THINKING if m in thinking]
    return [(more, less) for i, more in enumerate(order) for less in order[:i]]


def _margin(mode: str, over: str, right: dict[str, list[bool]]) -> dict[str, Any]:
    both = min(len(right[mode]), len(right[over]))
    more, less = Share.of(right[mode]), Share.of(right[over])
    found = difference(right[mode][:both], right[over][:both])
    return {"thinking": mode, "over": over, **found, "apart": more.low > less.high or less.low > more.high}
