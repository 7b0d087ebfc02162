"""Whether a fact is found again whatever the length of its prompt: a fault at the border of a compressed row, of a
window or of a cache block shows as recall that depends on the length modulo 4 or 128.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.config import CSA_RATIO
from pyrosome.errors import EngineError
from pyrosome.evals import recall
from pyrosome.evals.shares import Share
from pyrosome.evals.subject import Subject as Evaluated
from pyrosome.evals.watch import Watch, gathered
from pyrosome.verify import haystack
from pyrosome.verify.chance import DRAWS, chance_of
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.subject import Subject, asked

CHECK = "needle"
LEVEL = 1e-3  # a difference that chance gives more rarely is called one
# Of the built-in model, in the chat encoding: 0.977 of 256 at 256 tokens, 0.988 at 1,024 (docs/models.md).
FLOOR = 0.90
# Of official weights, assumed: a text of this length and a question for one of its sentences is easy for any model that
# chats; weights or an engine that are at fault fall far below.
FLOOR_OFFICIAL = 0.75
TOO_LOW = 0.2  # with recall below, a length that does worse cannot be told from the others
BUCKET = 16  # remainders by 128 that are counted together
BORDER = 2  # tokens on either side of a block's border that are near it
_ANSWER = 16  # tokens
# (tokens of a prompt, about; questions), quick and not
_BUILTIN = {True: ((256, 128),), False: ((256, 256), (1024, 256))}
_PLAIN = {True: ((512, 64),), False: ((512, 128), (2048, 128))}


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question: tokens of its prompt, tokens after the fact, and whether the answer was right."""

    tokens: int
    distance: int
    right: bool


def check(wanted: Wanted) -> Iterator[Finding]:
    """For each length of prompts: recall, and whether it depends on the length's remainder.

    Raises:
        RequestError: no such numerics.
    """
    yield from asked(wanted, CHECK, functools.partial(_found, wanted))


def _found(wanted: Wanted, subject: Subject) -> Iterator[Finding]:
    if not subject.has_tokenizer:
        yield Finding(CHECK, "recall", None, "left out: there is no tokenizer to ask in; name one's directory")
        return
    floor = None
    if subject.is_builtin:
        floor = FLOOR
    elif subject.is_official:
        floor = FLOOR_OFFICIAL
    ask, watch = of_ledgers if subject.is_builtin else of_sentences, _Telling(wanted)
    for context, n in (_BUILTIN if subject.is_builtin else _PLAIN)[wanted.quick]:
        most = subject.model.config.max_position_embeddings
        if context + recall.SPREAD + _ANSWER > most:
            detail = f"left out: prompts of up to {context + recall.SPREAD} tokens, and the model has {most} positions"
            yield Finding(CHECK, f"recall at {context} tokens", None, detail)
            continue
        yield from judged(ask(subject, context, n, wanted.seed, watch), context, floor, wanted.seed)


class _Telling(Watch):
    """Tells how many questions are answered."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__()
        self._wanted, self._done, self._total = wanted, 0, 0

    def begin(self, what: str, total: int) -> None:
        self._done, self._total = 0, total

    def advance(self) -> None:
        self._done += 1
        self._wanted.tell(self._done, self._total, "needle: questions answered")


def of_ledgers(subject: Evaluated, context: int, n: int, seed: int, watch: Watch | None = None) -> list[Answered]:
    """What the built-in model was taught: one of 8 facts of a ledger, held out."""
    task, watch = recall.RecallTask((context,), n=n, seed=seed), watch or Watch()
    (run,) = recall.measure(subject, task, recall.draw(subject, task), watch)
    _go_on(watch)
    return [Answered(o.tokens, o.distance, o.right) for o in run.outcomes]


def _go_on(watch: Watch) -> None:
    """Stop where somebody asked to: of half the questions nothing is told."""
    if watch.stopped:
        raise KeyboardInterrupt


def of_sentences(subject: Evaluated, context: int, n: int, seed: int, watch: Watch | None = None) -> list[Answered]:
    """A fact among plain sentences, asked for in a conversation that does not think."""
    drawn = haystack.drawn(subject, context, n, seed)
    room = max(len(prompt.ids) for _, prompt, _ in drawn) + _ANSWER
    watch = watch or Watch()
    with subject.opened(room):
        asked_for = subject.answers((prompt for _, prompt, _ in drawn), _ANSWER)
        answers = gathered(watch, f"{context} tokens", n, asked_for)
    _go_on(watch)
    return [
        Answered(len(prompt.ids), after, one.is_right(answer.message.content))
        for (one, prompt, after), answer in zip(drawn, answers, strict=True)
    ]


def judged(answered: Sequence[Answered], context: int, floor: float | None, seed: int = 0) -> Iterator[Finding]:
    """Recall against its floor, then for each way of sorting lengths whether classes differ by more than chance."""
    if not answered:
        raise EngineError(f"no question about {context} tokens was answered")
    share = Share.of(a.right for a in answered)
    what, told = f"recall at {context} tokens", _told(share)
    figures = {"context": context, "recall": share.as_dict(), "floor": floor, "plots": [_by_depth(answered, context)]}
    low = share.hits < TOO_LOW * share.n
    if floor is None:
        detail = f"{told}; nothing is known of what this model should reach"
        yield Finding(CHECK, what, None if low else True, detail, figures)
    else:
        yield Finding(CHECK, what, share.hits >= floor * share.n, f"{told}, at least {floor} is asked", figures)
    for by, class_of in SORTED.items():
        what = f"recall at {context} tokens, {by}"
        if low:
            yield Finding(CHECK, what, None, f"{told}: too low to see whether some lengths do worse")
        else:
            yield _independent(answered, what, class_of, seed)


def _independent(answered: Sequence[Answered], what: str, class_of: Callable[[Answered], str], seed: int) -> Finding:
    names = sorted({class_of(a) for a in answered}, key=_by_number)
    shares = {c: Share.of(a.right for a in answered if class_of(a) == c) for c in names}
    chance = chance_of([s.hits for s in shares.values()], [s.n for s in shares.values()], seed)
    worst = min(shares, key=lambda c: shares[c].hits / shares[c].n)
    least = " or less" if chance <= 1 / (DRAWS + 1) else ""
    detail = (
        f"worst where {worst}: {_told(shares[worst])}; classes that are alike differ as much with probability "
        f"{chance:.2g}{least}, and below {LEVEL:g} they are called different"
    )
    plot = {
        "title": what, "kind": "bars", "x": names, "y_title": "recall",
        "series": {"recall": [s.hits / s.n for s in shares.values()]},
        "low": {"recall": [s.low for s in shares.values()]}, "high": {"recall": [s.high for s in shares.values()]},
    }  # fmt: skip
    classes = {c: s.as_dict() for c, s in shares.items()}
    return Finding(CHECK, what, chance >= LEVEL, detail, {"classes": classes, "chance": chance, "plots": [plot]})


def _told(share: Share) -> str:
    return f"{share.hits / share.n:.3f} [{share.low:.3f}, {share.high:.3f}] of {share.n}"


def _by_depth(answered: Sequence[Answered], context: int) -> dict[str, Any]:
    ordered = sorted(answered, key=lambda a: a.distance)
    edges = [len(ordered) * i // 4 for i in range(5)]
    groups = [ordered[a:b] for a, b in itertools.pairwise(edges) if b > a]
    shares = [Share.of(a.right for a in g) for g in groups]
    return {
        "title": f"recall at {context} tokens, by tokens after the fact", "kind": "bars", "y_title": "recall",
        "x": [f"{g[0].distance}-{g[-1].distance}" for g in groups],
        "series": {"recall": [s.hits / s.n for s in shares]},
        "low": {"recall": [s.low for s in shares]}, "high": {"recall": [s.high for s in shares]},
    }  # fmt: skip


def _by_number(name: str) -> tuple[int, str]:
    """Classes in order of what they are called by."""
    number = re.search(r"is (\d+)", name)
    return int(number[1]) if number else -1, name


def _length_mod4(a: Answered) -> str:
    return f"length mod {CSA_RATIO} is {a.tokens % CSA_RATIO}"


def _length_mod128(a: Answered) -> str:
    first = a.tokens % BLOCK_TOKENS // BUCKET * BUCKET
    return f"length mod {BLOCK_TOKENS} is {first} to {first + BUCKET - 1}"


def _border(a: Answered) -> str:
    beside = (a.tokens + BORDER) % BLOCK_TOKENS <= 2 * BORDER
    return "a block's border is near" if beside else "a block's border is far"


def _fact_mod4(a: Answered) -> str:
    return f"the fact's place mod {CSA_RATIO} is {(a.tokens - a.distance) % CSA_RATIO}"


SORTED: dict[str, Callable[[Answered], str]] = {
    f"by length mod {CSA_RATIO}": _length_mod4,
    f"by length mod {BLOCK_TOKENS}": _length_mod128,
    "beside a block's border": _border,
    f"by the fact's place mod {CSA_RATIO}": _fact_mod4,
}
