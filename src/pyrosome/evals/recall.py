"""Facts of a ledger found again: each document is asked one question, once.

Nothing asked is in any training sample.  A prompt's length varies around its context so that every remainder by 128
is met equally often: a fault at the border of a compressed row or a cache block would show in one class of lengths.
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pyrosome import tasks
from pyrosome.chat import Prompt
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.evals.ablate import ABLATIONS
from pyrosome.evals.shares import Share, difference
from pyrosome.evals.subject import Answer, Subject, acceptance
from pyrosome.evals.watch import Watch, gathered
from pyrosome.tasks.sample import Sample
from pyrosome.tasks.scoring import is_right
from pyrosome.tasks.words import VALUES

KINDS = ("ledger", "records")
SPREAD = 64  # tokens: prompts are this much shorter to this much longer than their context, all lengths alike
BUCKET = 16  # remainders by 128 that are counted together
ANSWER_TOKENS = 16  # of an answer in the chat encoding; plain text goes on as long as a value and what ends it
_LEAST_WORDS = 12  # of a conversation about a ledger, beside its facts
_PROBES = 3
_STRIDE = 37  # prime to the number of lengths


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """What is asked.

    Attributes:
        contexts: tokens of a prompt, about.
        kind: "ledger" asks in the chat encoding, "records" goes on with plain text.
        n: questions for each context.

    Raises:
        RequestError: a value outside its range; the message names it.
    """

    contexts: tuple[int, ...] = (256, 1024, 8192)
    facts: int = 8
    n: int = 256
    kind: str = "ledger"
    ablations: tuple[str, ...] = ("none",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"recall of kind {self.kind!r} was asked for; there are {', '.join(KINDS)}")
        if self.n < 1 or not self.contexts or not self.ablations:
            raise RequestError("recall needs at least one question, one context and one ablation (none is one)")
        if short := [c for c in self.contexts if c <= SPREAD]:
            raise RequestError(f"a context of {short[0]} tokens was asked for; prompts vary by {SPREAD}: ask for more")
        if unknown := [a for a in self.ablations if a not in ABLATIONS]:
            raise RequestError(f"the ablation {unknown[0]!r} was asked for; there are {', '.join(ABLATIONS)}")


class Case(NamedTuple):
    """One question as a model gets it."""

    sample: Sample
    prompt: Prompt | list[int]
    tokens: int  # of the prompt
    distance: int  # tokens between the fact's last one and the prompt's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one question."""

    tokens: int
    distance: int
    right: bool
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Run:
    """All outcomes of one context under one ablation, in the order of their samples."""

    context: int
    ablation: str
    outcomes: list[Outcome]
    seconds: float


def draw(subject: Subject, task: RecallTask) -> dict[int, list[Sample]]:
    """The samples of each context, sized by this model's tokenizer; the same arguments give the same ones.

    Raises:
        ContextTooLong: the model has no positions for a context.
        RequestError: a context has no room for so many facts.
    """
    longest, most = max(task.contexts) + SPREAD + ANSWER_TOKENS, subject.model.config.max_position_embeddings
    if longest > most:
        raise ContextTooLong(
            longest, most, f"prompts vary by {SPREAD} tokens around a context of {max(task.contexts)}: ask for less"
        )
    return {context: _drawn(subject, task, context) for context in dict.fromkeys(task.contexts)}


def _drawn(subject: Subject, task: RecallTask, context: int) -> list[Sample]:
    name = f"recall/{task.kind}/{context}/{task.facts}/{task.seed}"

    def make(number: int | str, length: int) -> Sample:
        rng = random.Random(f"{name}/{number}")
        return tasks.make(task.kind, rng, length, heldout=True, facts=task.facts, asks=1)

    # Lengths are in words, and contexts in tokens: find the length that gives the context, and the slope there.
    length, tokens, scale = context, 0, 1.0
    for probe in range(_PROBES):
        tokens = case_of(subject, make(f"probe {probe}", length)).tokens
        scale = tokens / length
        length, before = max(1, round(length + (context - tokens) / scale)), length
    tokens += round((length - before) * scale)
    lengths = [round(length + (context + shift - tokens) / scale) for shift in shifts(task.n)]
    if min(lengths) < 3 * task.facts + _LEAST_WORDS:
        needed = round((3 * task.facts + _LEAST_WORDS) * scale) + SPREAD
        raise RequestError(
            f"{task.facts} facts were asked for in {context} tokens, and with this tokenizer they need a context of "
            f"{needed} or more; ask for fewer facts or a longer context"
        )
    return [make(i, n) for i, n in enumerate(lengths)]


def shifts(n: int) -> list[int]:
    """How much longer than their context `n` prompts are: each length equally often, a few spread over all of them.

    Neighbours differ widely, so that a part of the prompts is like the whole.
    """
    lengths = 2 * SPREAD
    return [(i * _STRIDE % lengths if n >= lengths else i * lengths // n) - SPREAD for i in range(n)]


def case_of(subject: Subject, sample: Sample) -> Case:
    """A sample as this model is asked it: up to where its one answer begins."""
    prompt: Prompt | list[int]
    if sample.messages:
        prompt = subject.chat_template.conversation(sample.messages[:1], "off")
        text, ids = sample.messages[0]["content"], prompt.ids
        lead = len(ids) - 2 - len(subject.tokenizer.encode(text))  # the template's tokens before the text: 2 follow it
    else:
        text, lead = sample.text[: sample.answers[0][0]], 1
        prompt = ids = subject.encode(text)  # type: ignore[assignment]
    fact = text[: _end_of_word(text, sample.about["position"] + 1)]
    return Case(sample, prompt, len(ids), len(ids) - lead - len(subject.tokenizer.encode(fact)))


def _end_of_word(text: str, number: int) -> int:
    for n, found in enumerate(re.finditer(r"\S+", text)):
        if n == number:
            return found.end()
    raise ValueError(f"there is no word {number}")


def is_recalled(sample: Sample, answer: Answer) -> bool:
    """Whether an answer is the fact's value; of plain text, which goes on, the word that follows."""
    said = answer.message.content
    return is_right(sample, said if sample.messages else " ".join(said.split()[:1]))


def measure(
    subject: Subject, task: RecallTask, samples: dict[int, list[Sample]], watch: Watch | None = None
) -> list[Run]:
    """Ask all of `samples` under each ablation; ends early, with what there is, where the watch is stopped."""
    watch, runs = watch or Watch(), []
    for context, drawn in samples.items():
        for ablation in task.ablations:
            if not watch.stopped:
                began = time.monotonic()
                outcomes = _asked(subject, task, drawn, context, ablation, watch)
                runs.append(Run(context, ablation, outcomes, time.monotonic() - began))
    return runs


def _asked(
    subject: Subject, task: RecallTask, drawn: list[Sample], context: int, ablation: str, watch: Watch
) -> list[Outcome]:
    cases: list[Case] = []

    def prompts() -> Iterator[Prompt | list[int]]:
        for sample in drawn:  # one after the other: all of them at once would take more memory than the model
            case = case_of(subject, sample)
            cases.append(case._replace(prompt=[]))
            yield case.prompt

    longest = max(case_of(subject, s).tokens for s in (drawn[0], drawn[-1], max(drawn, key=_size)))
    room = max(longest, context + SPREAD) + SPREAD + ANSWER_TOKENS
    room = min(room, subject.model.config.max_position_embeddings)
    most = ANSWER_TOKENS if task.kind == "ledger" else len(subject.tokenizer.encode(f" {VALUES[0]} ;"))
    with subject.opened(room, ablation=ablation, seed=task.seed):
        label = f"{context} tokens" + (f", {ablation}" if ablation != "none" else "")
        answers = gathered(watch, label, len(drawn), subject.answers(prompts(), most))
    return [
        Outcome(case.tokens, case.distance, is_recalled(case.sample, answer), answer)
        for case, answer in zip(cases, answers, strict=False)
    ]


def _size(sample: Sample) -> int:
    return len(sample.text) + sum(len(m["content"]) for m in sample.messages)


def summary(run: Run, window: int) -> dict[str, Any]:
    """A run's figures as plain data; `window` is the tokens that are seen exactly, the last one included."""
    o = run.outcomes
    by_mod4 = {str(r): _share(x for x in o if x.tokens % 4 == r) for r in range(4)}
    by_mod128 = {
        f"{r}-{r + BUCKET - 1}": _share(x for x in o if x.tokens % 128 // BUCKET == r // BUCKET)
        for r in range(0, 128, BUCKET)
    }
    return {
        "context": run.context,
        "ablation": run.ablation,
        "tokens": [min((x.tokens for x in o), default=0), max((x.tokens for x in o), default=0)],
        "right": _share(o),
        "in_window": _share(x for x in o if x.distance < window),
        "beyond_window": _share(x for x in o if x.distance >= window),
        "by_distance": _quartiles(o),
        "by_mod4": by_mod4,
        "by_mod128": by_mod128,
        "drafts": acceptance(x.answer for x in o).as_dict(),
        "seconds": round(run.seconds, 1),
    }


def _share(outcomes: Any) -> dict[str, Any]:
    return Share.of(x.right for x in outcomes).as_dict()


def _quartiles(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Shares by how far back the fact stands, nearest first, in four groups of one size."""
    ordered, n = sorted(outcomes, key=lambda x: x.distance), len(outcomes)
    groups = [ordered[n * i // 4 : n * (i + 1) // 4] for i in range(4)]
    return [{"from": g[0].distance, "to": g[-1].distance, **_share(g)} for g in groups if g]


def compared(first: Sequence[Run], second: Sequence[Run]) -> list[dict[str, Any]]:
    """Paired differences (first minus second) of runs over the same samples, as far as both went."""
    out = []
    for a, b in zip(first, second, strict=False):
        pairs = list(zip(a.outcomes, b.outcomes, strict=False))
        found = difference([x.right for x, _ in pairs], [y.right for _, y in pairs])
        out.append({"context": a.context, "ablation": a.ablation, **found})
    return out


def over_none(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each ablation changes: paired differences to the whole model, where that was asked too."""
    whole = {r.context: r for r in runs if r.ablation == "none"}
    pairs = [(r, whole[r.context]) for r in runs if r.ablation != "none" and r.context in whole]
    return compared([r for r, _ in pairs], [w for _, w in pairs])
