"""Where a lightning indexer looked: which tokens of the past the last tokens of a prompt were pointed to.

Shape letters: T tokens, K rows chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from pyrosome.config import CSA_RATIO
from pyrosome.engine.loaded import LoadedModel, check_length
from pyrosome.engine.runner import check_ids
from pyrosome.model.deepseek_v4 import Choice
from pyrosome.model.step import Span, Step
from pyrosome.options import require_integer

STEP_TOKENS = 2048  # of a prompt, computed at once


class Look(NamedTuple):
    """The token at `position` was pointed to the compressed row of tokens first..last, the last one included."""

    layer: int
    position: int
    first: int
    last: int
    score: float  # the indexer's; those of one layer and position compare, no others
    mass: float | None  # attention the row got from all heads together, where the network says so


@dataclasses.dataclass(frozen=True)
class Place:
    """Tokens first..last of the past (the last one included), of rows that overlap or touch, of any layer and token.

    Attributes:
        firsts: (layer, position) of each token that had a row of this place as its best.
        score: the highest of its rows.
    """

    first: int
    last: int
    firsts: tuple[tuple[int, int], ...]
    score: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in which some token had its best row here."""
        return tuple(sorted({layer for layer, _ in self.firsts}))


def csa_layers(model: LoadedModel) -> list[int]:
    """Layers that have an indexer."""
    return [i for i, ratio in enumerate(model.config.layer_ratios) if ratio == CSA_RATIO]


def looks(model: LoadedModel, ids: Sequence[int], last: int = 8) -> list[Look]:
    """The rows that the indexers chose for the last `last` tokens of `ids` (for all, where they are fewer).

    Computed through a cache of its own, as in serving.  A row pools tokens 4r - 4 to 4r + 3, and row 0 the first four;
    a token is pointed to no more rows than the configuration's `index_topk`, and to none before the fourth token.

    Returns: by layer, then by position, then best score first.

    Raises:
        RequestError: no ids, one outside the vocabulary, or `last` below 1.
        ContextTooLong: more ids than the model has positions for.
    """
    ids = list(ids)
    require_integer("last", last, 1)
    check_ids(ids, model.config.vocab_size)
    check_length(len(ids), model.config)
    runner = model.runner(1, len(ids))
    sequence = runner.open()
    until = max(0, len(ids) - last)
    for start in range(0, until, STEP_TOKENS):
        runner.step([(sequence, ids[start : min(start + STEP_TOKENS, until)])])
    # Not by the runner: a step of one token it may have captured, and then nobody is told what was chosen.
    runner.pool.prepare(sequence.holding, until, len(ids))
    step = Step.of([Span(sequence.slot, until, ids[until:])], runner.device)
    with torch.inference_mode():
        choices = model.network(step, cache=runner.pool.layers(step)).scores
    found = zip(csa_layers(model), choices, strict=True)
    return [look for layer, choice in found for look in _looks(layer, until, choice)]


def _looks(layer: int, start: int, choice: Choice) -> Iterable[Look]:
    masses = choice.mass.tolist() if choice.mass is not None else itertools.repeat(itertools.repeat(None))
    for position, rows, scores, mass in zip(
        itertools.count(start), choice.rows.tolist(), choice.score.tolist(), masses, strict=False
    ):
        chosen = [c for c in zip(rows, scores, mass, strict=False) if c[0] >= 0]
        for row, score, got in sorted(chosen, key=lambda c: (-c[1], c[0])):
            first = CSA_RATIO * (row - 1)
            yield Look(layer, position, max(0, first), first + 2 * CSA_RATIO - 1, score, got)


def places(looks: Iterable[Look], within: range | None = None, best: int = 2) -> list[Place]:
    """What `looks` found, as ranges of tokens: those that were most often the best one first, then by score.

    Args:
        within: positions that count; a row that reaches out of them is cut, and one beyond them left out before any
            is called the best.
        best: rows of each layer and token that are taken; with all of them, neighbours would grow together.
    """
    if within is not None:
        looks = (
            x._replace(first=max(x.first, within.start), last=min(x.last, within.stop - 1))
            for x in looks
            if x.first < within.stop and x.last >= within.start
        )
    by_token: dict[tuple[int, int], list[Look]] = {}
    for look in looks:
        by_token.setdefault((look.layer, look.position), []).append(look)
    taken: list[tuple[Look, bool]] = []
    for of_token in by_token.values():
        of_token.sort(key=lambda x: (-x.score, x.first))
        taken += [(look, n == 0) for n, look in enumerate(of_token[:best])]
    taken.sort(key=lambda t: (t[0].first, t[0].last))
    groups: list[list[tuple[Look, bool]]] = []
    end = -2
    for item in taken:
        if item[0].first > end + 1:
            groups.append([])
        groups[-1].append(item)
        end = max(end, item[0].last)
    return sorted(map(_place, groups), key=lambda p: (-len(p.firsts), -p.score, p.first))


def _place(group: list[tuple[Look, bool]]) -> Place:
    firsts = sorted((look.layer, look.position) for look, is_first in group if is_first)
    found = [look for look, _ in group]
    return Place(found[0].first, max(x.last for x in found), tuple(firsts), max(x.score for x in found))
