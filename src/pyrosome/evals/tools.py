"""Tool calls: whether one is made where it should be, in good form and right, and what follows its result."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from pyrosome import tasks
from pyrosome.chat import Message
from pyrosome.evals.distinct import distinct
from pyrosome.evals.modes import MAX_TOKENS
from pyrosome.evals.shares import Share
from pyrosome.evals.subject import Answer, Subject, acceptance
from pyrosome.evals.watch import Watch, gathered
from pyrosome.tasks.sample import Sample
from pyrosome.tasks.scoring import is_right
from pyrosome.tasks.words import NAMES

MANNERS = ("free", "grammar")


def questions(n: int, seed: int, *, calls: bool) -> list[Sample]:
    """`n` samples that need the tool or do not, no question twice.

    Raises:
        RequestError: there are not so many.
    """
    rng = random.Random(f"tools/{calls}/{seed}")
    share = 0.0 if calls else 1.0
    what = "look-ups" if calls else "questions that need no tool"
    return distinct(n, lambda: tasks.make("tool", rng, 1, heldout=True, direct=share), what)


@dataclasses.dataclass(frozen=True)
class Call:
    """What an answer made of a question that needs the tool."""

    is_made: bool
    is_well_formed: bool
    is_right: bool


def judged(sample: Sample, message: Message) -> Call:
    """A call is well formed if nothing in the answer is out of order, its tool is declared and its arguments fit it.

    It is right if it is the only one, well formed, and asks for the name that was to be looked up.
    """
    calls, declared = message.tool_calls, [t["function"]["name"] for t in sample.tools]
    asked = [_arguments(c.arguments) for c in calls]
    good = bool(calls) and message.finish_reason == "tool_calls" and not message.malformed
    good = good and all(c.name in declared for c in calls)
    good = good and all(a is not None and list(a) == ["name"] and isinstance(a["name"], str) for a in asked)
    return Call(bool(calls), good, good and len(calls) == 1 and asked[0] == {"name": sample.about["name"]})


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def tools(
    subject: Subject,
    n: int = len(NAMES),
    seed: int = 0,
    thinking: str = "off",
    max_tokens: int = MAX_TOKENS,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Ask `n` questions that need the tool and `n` that do not, free and under the grammar of the tool.

    Raises:
        RequestError: there are not so many, or no such mode.
    """
    watch = watch or Watch()
    samples = [*questions(n, seed, calls=True), *questions(n, seed, calls=False)]
    first = [s.messages[:1] for s in samples]
    results = []
    for manner in MANNERS:
        answers = _answered(subject, samples, first, thinking, manner, max_tokens, watch)
        pairs = list(zip(samples, answers, strict=False))
        looked_up = [(s, a, judged(s, a.message)) for s, a in pairs if s.about["calls"]]
        direct = [(s, a) for s, a in pairs if not s.about["calls"]]
        right = [(s, a) for s, a, call in looked_up if call.is_right]
        # What is said to the result is asked of right calls alone: nobody has a result for others.
        history = [[s.messages[0], a.message.to_dict(), _result(s, a.message)] for s, a in right]
        final = _answered(subject, [s for s, _ in right], history, thinking, manner, max_tokens, watch)
        ends = [not b.message.tool_calls and is_right(s, b.message.content)
                for (s, _), b in zip(right, final, strict=False)]  # fmt: skip
        if not looked_up:
            break
        cut = len(right) - len(ends)  # right calls whose second answer was not waited for
        results.append(
            {
                "manner": manner,
                "called": Share.of(call.is_made for *_, call in looked_up).as_dict(),
                "well_formed": Share.of(call.is_well_formed for *_, call in looked_up if call.is_made).as_dict(),
                "right": Share.of(call.is_right for *_, call in looked_up).as_dict(),
                "answer_right": Share.of(ends).as_dict(),
                "exchange_right": Share(sum(ends), len(looked_up) - cut).as_dict(),
                "direct_without_call": Share.of(not a.message.tool_calls for _, a in direct).as_dict(),
                "direct_right": Share.of(
                    not a.message.tool_calls and is_right(s, a.message.content) for s, a in direct
                ).as_dict(),
                "drafts": acceptance([*answers, *final]).as_dict(),
            }
        )
    return {"thinking": thinking, "max_tokens": max_tokens, "results": results}


def _result(sample: Sample, message: Message) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": sample.about["expected"]}


def _answered(
    subject: Subject,
    samples: list[Sample],
    messages: list[Any],
    thinking: str,
    manner: str,
    max_tokens: int,
    watch: Watch,
) -> list[Answer]:
    template = subject.chat_template
    prompts = [template.conversation(m, thinking, s.tools) for s, m in zip(samples, messages, strict=True)]
    if not prompts:
        return []
    changes = {"constraint": None} if manner == "free" else {}
    turn = "results" if len(messages[0]) > 1 else "calls"
    with subject.opened(max(len(p.ids) for p in prompts) + max_tokens, reuse=True):
        answers = subject.answers(prompts, max_tokens, **changes)
        return gathered(watch, f"{turn}, {manner}", len(prompts), answers)
