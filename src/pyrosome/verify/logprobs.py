"""Stored log probabilities of the same weights, held against what this engine gives for the same tokens.

Whoever recorded them ran other kernels, so bits cannot be asked for: differences of an average token are, and the same
best token wherever the record leaves no doubt.
Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrosome.chat import Tokenizer
from pyrosome.chat.parser import THINK_END
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.recorded import Step, Token, Vector, read_vectors
from pyrosome.verify.subject import Subject, asked, forced

CHECK = "logprobs"
# Kernels that round alike and add in other orders flip codes of quantised inputs, and a logit moves with each.  nano by
# its definitions is 0.03 nats from nano by its kernels, and 0.002 in divergence; without its roundings, which no other
# deployment differs by, 0.07 and 0.011 (docs/verify-checks.md).
MEAN_NATS = 0.1  # of a chosen token's log probability
KL_NATS = 0.03  # over the tokens recorded, all others taken as one
AGREEMENT = 0.98  # of positions at which the record's best token is clear
CLEAR = 0.5  # nats between the record's best two, from where they count
LEAST = -20.0  # logarithms are cut there: of what is that rare nobody's last bits say anything
_SHOWN = 3
_MOST_BARS = 40


@dataclasses.dataclass(frozen=True)
class Known:
    """A vector as ids: prompt and answer, and for each step of the answer what was recorded."""

    where: str
    prompt: tuple[int, ...]
    steps: tuple[tuple[int, float | None, dict[int, float]], ...]  # (id, its log probability, those of others)
    counted: int  # tokens of the prompt as the record has them; 0: not told

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *(token for token, _, _ in self.steps))


@dataclasses.dataclass(frozen=True)
class Gap:
    """One token: what the record and this engine say of it."""

    apart: float  # ours less theirs, nats
    kl: float | None  # None: the record has no other token
    is_clear: bool  # whether the record leaves no doubt which token is best
    agrees: bool  # whether this engine has the same one


def check(wanted: Wanted) -> Iterator[Finding]:
    """Findings about the vectors of `wanted.logprobs`.

    Raises:
        RequestError: the file is malformed; the message names the line.  Or no such numerics.
    """
    if wanted.logprobs is None:
        detail = "left out: no stored log probabilities were given; with --logprobs FILE they are compared"
        yield Finding(CHECK, "stored log probabilities", None, detail)
        return
    vectors = read_vectors(wanted.logprobs)
    yield from asked(wanted, CHECK, functools.partial(_found, wanted.logprobs, vectors))


def _found(path: Path, vectors: Sequence[Vector], subject: Subject) -> Iterator[Finding]:
    known: list[Known] = []
    for vector in vectors:
        try:
            known.append(as_ids(vector, subject))
        except _Unread as error:
            yield Finding(CHECK, f"{path.name}, {vector.where}", False, str(error))
        except RequestError as error:
            raise RequestError(f"{path}, {vector.where}: {error}") from None
    if told := [k for k in known if k.counted]:
        yield _counts(told)
    if known:
        yield from judged([(k, list(gaps(subject, k))) for k in known])


def _counts(known: Sequence[Known]) -> Finding:
    """Whether prompts have the tokens that were counted where they were answered."""
    wrong = [f"{k.where}: {len(k.prompt)} here and {k.counted} there" for k in known if len(k.prompt) != k.counted]
    detail = f"{len(known) - len(wrong)} of {len(known)} prompts have as many tokens as were counted for the record"
    if wrong:
        detail += f" ({'; '.join(wrong[:_SHOWN])}): the template, its mode or the tokenizer differ"
    return Finding(CHECK, "prompts", not wrong, detail, {"differing": wrong})


class _Unread(Exception):
    """A vector that means nothing to this model, which is worth knowing."""


def as_ids(vector: Vector, subject: Subject) -> Known:
    """A vector with its prompt rendered and its tokens looked up.

    Raises:
        RequestError: a request that cannot be rendered, an id outside the vocabulary, or more than the model has
            positions for.
    """
    prompt, opens_thoughts = _prompt(vector, subject)
    steps = vector.steps
    if opens_thoughts:
        if not vector.reasoning:
            raise RequestError(
                "the request thinks, and the record has no logprobs.reasoning_content: it cannot be followed"
            )
        end = subject.tokenizer.id_of(THINK_END)
        assert end is not None  # or there were no template
        steps = (*vector.reasoning, *((Step(end, None), *steps) if steps else ()))
    found = tuple((_id(s.token, subject), s.logprob, {_id(t, subject): p for t, p in s.tops}) for s in steps)
    known = Known(vector.where, prompt, found, vector.prompt_tokens)
    config = subject.model.config
    if outside := [i for i in (*known.ids, *(i for *_, tops in found for i in tops)) if i >= config.vocab_size]:
        raise RequestError(f"token {outside[0]} is outside this model's vocabulary of {config.vocab_size}")
    if len(known.ids) > config.max_position_embeddings:
        raise ContextTooLong(len(known.ids), config.max_position_embeddings, "leave this record out")
    return known


def _prompt(vector: Vector, subject: Subject) -> tuple[tuple[int, ...], bool]:
    """(ids, whether they leave thoughts open)."""
    if vector.ids is not None:
        return vector.ids, False
    if vector.text is not None:
        return tuple(subject.encode(vector.text)), False
    body = dict(vector.body or {})
    if isinstance(body.get("thinking"), str):  # as `LLM.chat` has it
        prompt = subject.chat_template.conversation(body["messages"], body["thinking"], body.get("tools"))
    else:
        prompt = subject.chat_template.render(body)
    return prompt.ids, prompt.start == "reasoning"


def _id(token: Token, subject: Subject) -> int:
    if isinstance(token, int):
        return token
    if (found := _by_bytes(subject.tokenizer).get(token)) is None:
        text = token.decode("utf-8", "backslashreplace")
        raise _Unread(f"the tokenizer has no token {text!r}: the record was made with another one")
    return found


@functools.lru_cache(1)
def _by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ids by what they stand for; of two alike the first."""
    found: dict[bytes, int] = {}
    for token in range(tokenizer.vocab_size):
        found.setdefault(tokenizer.token_bytes(token), token)
    return found


def gaps(subject: Subject, known: Known) -> Iterator[Gap]:
    """Token by token, those that nothing was recorded of left out; the record's own tokens are what is gone on from."""
    steps = iter(known.steps)
    for rows_RV in forced(subject.model, known.ids[:-1], len(known.prompt) - 1):
        for logits_V, (token, logprob, tops) in zip(rows_RV, steps, strict=False):
            if logprob is not None:
                yield gap(logits_V, token, logprob, tops)


def gap(logits_V: Tensor, token: int, logprob: float, tops: dict[int, float]) -> Gap:
    """What a row of logits says of what was recorded in its place.

    Of a token that was recorded alone, all others together are the second best: so it counts only where nothing else
    can be better.
    """
    ours_V = logits_V.double().log_softmax(-1)
    apart = max(float(ours_V[token]), LEAST) - max(logprob, LEAST)
    named = {token: logprob, **tops}
    ranked = sorted(named.values(), reverse=True)
    second = ranked[1] if len(ranked) > 1 else math.log(max(1 - math.exp(ranked[0]), 0.0) or math.exp(LEAST))
    is_clear = ranked[0] - second >= CLEAR
    agrees = int(ours_V.argmax()) == max(named, key=lambda t: named[t])
    return Gap(apart, _divergence(named, ours_V) if tops else None, is_clear, agrees)


def _divergence(named: dict[int, float], ours_V: Tensor) -> float:
    """Kullback-Leibler from the record to this engine, every token that is not named taken as one: no more than of the
    whole distributions."""
    p = [math.exp(x) for x in named.values()]
    q = [float(ours_V[t].exp()) for t in named]
    p.append(max(0.0, 1 - math.fsum(p)))
    q.append(max(0.0, 1 - math.fsum(q)))
    tiny = math.exp(LEAST)
    return math.fsum(a * (math.log(max(a, tiny)) - math.log(max(b, tiny))) for a, b in zip(p, q, strict=True))


def judged(found: Sequence[tuple[Known, list[Gap]]]) -> Iterator[Finding]:
    """All vectors together, against the bounds; the worst of them named."""
    all_gaps = [g for _, gs in found for g in gs]
    if not all_gaps or not all(math.isfinite(g.apart) for g in all_gaps):
        broken = sum(not math.isfinite(g.apart) for g in all_gaps)
        detail = f"of {len(all_gaps)} recorded tokens {broken} have a log probability here that is no number"
        yield Finding(CHECK, "chosen tokens", False if broken else None, detail, {"tokens": len(all_gaps)})
        return
    means = {k.where: _mean([abs(g.apart) for g in gs]) for k, gs in found if gs}
    yield _chosen(all_gaps, means)
    clear = [g for g in all_gaps if g.is_clear]
    agreeing = sum(g.agrees for g in clear)
    figures = {"clear": len(clear), "agreeing": agreeing, "all_agreeing": sum(g.agrees for g in all_gaps)}
    detail = (
        f"the same at {agreeing} of {len(clear)} positions where the record is clear by {CLEAR} nats, at least "
        f"{AGREEMENT:g} of them is asked; at {figures['all_agreeing']} of all {len(all_gaps)}"
    )
    yield Finding(CHECK, "best tokens", agreeing >= AGREEMENT * len(clear) if clear else None, detail, figures)
    divergences = [g.kl for g in all_gaps if g.kl is not None]
    if divergences:
        mean = _mean(divergences)
        detail = (
            f"{mean:.3g} nats apart over {len(divergences)} tokens with others beside them, at most {KL_NATS:g} allowed"
        )
        yield Finding(CHECK, "distributions", mean <= KL_NATS, detail, {"mean": mean, "max": max(divergences)})
    else:
        yield Finding(CHECK, "distributions", None, "left out: the record has no top_logprobs")


def _chosen(all_gaps: Sequence[Gap], means: dict[str, float]) -> Finding:
    mean, bias = _mean([abs(g.apart) for g in all_gaps]), _mean([g.apart for g in all_gaps])
    worst = max(means, key=lambda where: means[where])
    detail = (
        f"{len(all_gaps)} tokens of {len(means)} records: {mean:.3g} nats apart on average, at most {MEAN_NATS:g} "
        f"allowed (ours less theirs {bias:+.2g}); {means[worst]:.3g} in {worst or 'the record'}"
    )
    shown = dict(list(means.items())[:_MOST_BARS])
    plot: dict[str, Any] = {
        "title": "log probabilities of chosen tokens, by record", "kind": "bars", "x": list(shown), "bound": MEAN_NATS,
        "y_title": "nats apart", "series": {"mean": list(shown.values())},
    }  # fmt: skip
    figures = {"tokens": len(all_gaps), "mean": mean, "bias": bias, "by_record": means, "plots": [plot]}
    return Finding(CHECK, "chosen tokens", mean <= MEAN_NATS, detail, figures)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
