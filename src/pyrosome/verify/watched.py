"""What a model says by one way of computing it: tokens, and the logits they were chosen from.

Shape letters: R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.streams import plan_cache
from pyrosome.engine.loaded import LoadedModel
from pyrosome.engine.request import Ended, Request, Reuse, TokenEvent
from pyrosome.engine.speculate import StepCost
from pyrosome.errors import EngineError
from pyrosome.options import EngineOptions, SamplingParams

SPAN_ROWS = 64  # of a span, at its end, that are kept where all would take more than ROW_BYTES
ROW_BYTES = 64 << 20  # of one prompt's logits
TOLERANCE, CLEAR = 1e-4, 1e-3  # of logits, and of the best two's difference, where bits are not promised
_GRAIN = 256  # tokens: what a cache holds is counted in pages of so many


@dataclasses.dataclass(frozen=True)
class Said:
    """What one route said of one prompt.

    Attributes:
        label: the route's own case: "131 tokens, cut at 128".
        ids: of the whole prompt, whatever part of it this route had computed before.
        rows: logits [V] by position of the token they follow; those the route happened to give.
        tokens: chosen greedily after the prompt.
        fault: what shows that the route was not taken at all; "" where it was.
        about: what is to be told of the route as a whole so far.
        warns: whether somebody should look at that.
    """

    label: str
    ids: tuple[int, ...]
    rows: Mapping[int, Tensor]
    tokens: tuple[int, ...]
    fault: str = ""
    about: str = ""
    warns: bool = False


@dataclasses.dataclass(frozen=True)
class Compared:
    """How one route's answer stands to the plain one's."""

    rows: int
    differing: int  # rows of which some bit is another
    worst: float  # largest difference of two logits
    fault: str  # "" where the promise is kept


def in_spans(
    model: LoadedModel, ids: Sequence[int], cuts: Iterable[int], then: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Logits by position of `ids` computed in spans that end at the cuts, then of `then`, token by token.

    The cache starts out poisoned.  Of a long span the last rows are kept.
    """
    edges = [*dict.fromkeys([0, *cuts, len(ids)]), *range(len(ids) + 1, len(ids) + len(then) + 1)]
    whole = [*ids, *then]
    found: dict[int, Tensor] = {}
    runner = model.runner(1, len(whole))
    runner.pool.poison()
    sequence = runner.open()
    for first, stop in pairwise(edges):
        (rows_RV,), _, _ = runner.forward([(sequence, whole[first:stop])], [_kept(model, stop - first)])
        found |= _by_position(rows_RV, stop)
    return found


def greedy(model: LoadedModel, ids: Sequence[int], count: int) -> Said:
    """What all other routes are held to: the prompt in one span, then the best token, `count` times."""
    runner = model.runner(1, len(ids) + count)
    runner.pool.poison()
    sequence, piece = runner.open(), list(ids)
    tokens: list[int] = []
    rows: dict[int, Tensor] = {}
    for _ in range(count):
        (rows_RV,), _, _ = runner.forward([(sequence, piece)], [_kept(model, len(piece))])
        rows |= _by_position(rows_RV, sequence.length)
        piece = [int(rows_RV[-1].argmax())]
        tokens += piece
    return Said(f"{len(ids)} tokens", tuple(ids), rows, tuple(tokens))


def _kept(model: LoadedModel, length: int) -> int:
    """Rows that are kept of a span of so many tokens."""
    return length if 4 * length * model.config.vocab_size <= ROW_BYTES else min(length, SPAN_ROWS)


def _by_position(rows_RV: Tensor, stop: int) -> dict[int, Tensor]:
    """Rows by position, of a span that ends before `stop`."""
    return {stop - len(rows_RV) + i: row_V for i, row_V in enumerate(rows_RV)}


class _FreeDrafts(StepCost):
    """Every step costs the same, so that drafts are made whether they pay or not."""

    def seconds(self, num_drafts: int) -> float:
        return 1.0


class Watched:
    """An engine whose cache starts out poisoned and whose logits are kept, by request and position.

    Args:
        context: tokens of the longest sequence, its answer included.
        sequences: so many there is room for at once.
        options: fields of `EngineOptions`.
    """

    def __init__(self, model: LoadedModel, context: int, sequences: int, **options: Any) -> None:
        tokens = (sequences + 1) * (-(-context // _GRAIN) + 1) * _GRAIN
        plan = plan_cache(model.config, model.kv_format, sequences, context, cache_tokens=tokens)
        history = sum(plan.page_bytes[r] * n for r, n in plan.num_pages.items())
        chosen: dict[str, Any] = {
            "drafter": "off",
            "max_sequences": sequences,
            "cache_bytes": max(1, history),
            **options,
        }
        self.engine = model.engine(EngineOptions(**chosen))
        self.engine.drafter.cost = _FreeDrafts()
        self.engine.runner.pool.poison()
        self._rows: dict[str, dict[int, Tensor]] = {}
        self._forward = self.engine.runner.forward
        self.engine.runner.forward = self._watch  # type: ignore[method-assign]

    def _watch(self, spans: Any, rows: Sequence[int], **changes: Any) -> Any:
        found = self._forward(spans, rows, **changes)
        names = {id(c.track.sequence): c.request.id for c in self.engine.completions if c.track.sequence}
        for (sequence, _), rows_RV in zip(spans, found[0], strict=True):
            if rows_RV.dim() == 2 and id(sequence) in names:
                self._rows.setdefault(names[id(sequence)], {}).update(_by_position(rows_RV, sequence.length))
        return found

    def ask(self, requests: Sequence[Request]) -> dict[str, tuple[tuple[int, ...], dict[int, Tensor], Reuse]]:
        """All of them at once: of each its tokens, its rows, and what it found computed.

        Raises:
            EngineError: one of them failed, or ended early.
        """
        self._rows.clear()
        for request in requests:
            self.engine.add(request)
        tokens: dict[str, list[int]] = {r.id: [] for r in requests}
        reuse: dict[str, Reuse] = {}
        while self.engine.has_work:
            for event in self.engine.step():
                if isinstance(event, TokenEvent):
                    tokens[event.request].append(event.token)
                elif isinstance(event, Ended):
                    if event.reason == "error":
                        raise EngineError(f"request {event.request}: {event.error}")
                    reuse[event.request] = event.reuse
        for request in requests:
            if len(tokens[request.id]) < request.params.max_tokens:
                said, asked = len(tokens[request.id]), request.params.max_tokens
                raise EngineError(f"request {request.id} ended after {said} of {asked} tokens")
        return {name: (tuple(said), self._rows.get(name, {}), reuse[name]) for name, said in tokens.items()}


def request(name: str, ids: Sequence[int], count: int, session: str = "") -> Request:
    """A greedy request for `count` tokens, whatever they are."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    return Request(name, tuple(ids), params, session=session)


def compare(said: Said, plain: Said, *, bits: bool) -> Compared:
    """Hold a route's answer to the plain one: to the last bit, or within TOLERANCE and the same best tokens.

    Where bits are not promised, two answers may part at a token whose rival is as good; what follows is not compared.
    """
    at = next((i for i, (a, b) in enumerate(zip(said.tokens, plain.tokens, strict=False)) if a != b), None)
    fault = said.fault
    if said.tokens and len(said.tokens) != len(plain.tokens) and at is None:
        fault = fault or f"{len(said.tokens)} tokens were said, and {len(plain.tokens)} plainly"
    if at is not None and (bits or _margin(plain.rows[len(plain.ids) + at - 1]) > CLEAR):
        fault = fault or f"token {at + 1} of the answer is {said.tokens[at]}, and plainly {plain.tokens[at]}"
    last = len(plain.ids) + (len(plain.tokens) if at is None else at)
    rows = [(p, said.rows[p], plain.rows[p]) for p in sorted(said.rows) if p < last and p in plain.rows]
    differing, worst = 0, 0.0
    for position, ours_V, theirs_V in rows:
        apart = float((ours_V - theirs_V).abs().max())
        same = torch.equal(ours_V.view(torch.int32), theirs_V.view(torch.int32))
        differing, worst = differing + (not same), max(worst, apart)
        if not torch.isfinite(ours_V).all():
            fault = fault or f"a logit after position {position} is no number"
        elif not (same if bits else apart <= TOLERANCE):
            fault = fault or f"logits after position {position} differ by {apart:.1e}"
    if not rows:
        fault = fault or "no logits were compared"
    return Compared(len(rows), differing, worst, fault)


def _margin(row_V: Tensor) -> float:
    best = row_V.topk(2).values
    return float(best[0] - best[1])
