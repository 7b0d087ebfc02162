"""Every kernel of a run beside its op's definition, on the same inputs; and runs by definitions alone.

Ops are found through the seam: a version registered in front of all others runs what would have run, runs the
definition on the same arguments, and keeps how far apart the results are.
Shape letters: T tokens, K experts or rows chosen, E experts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrosome.ops.index_topk import index_topk
from pyrosome.ops.route import affinity, route, route_scores
from pyrosome.ops.seam import OPS, Kernel, Op, place_of, use
from pyrosome.ops.store import as_stored, store_rows

# Written bytes, and rows as they will be read back: roundings with no arithmetic before them.
BITWISE = (store_rows.name, as_stored.name)


@dataclasses.dataclass
class Tally:
    """How far one op's kernel was from its definition, over all calls."""

    kernel: str = ""
    calls: int = 0
    num_values: int = 0
    unequal: int = 0  # values that are not the same number
    worst: float = 0.0  # the largest difference of a call, relative to the largest value of its definition
    squares: float = 0.0  # of differences
    wanted_squares: float = 0.0  # of the definition's values
    choices: int = 0  # tokens whose choice was compared
    chosen_otherwise: int = 0
    furthest: float = 0.0  # from a tie, of a choice that came out otherwise, relative to the token's largest score

    @property
    def relative_rms(self) -> float:
        """RMS of the differences over RMS of the definition's values."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.wanted_squares) if self.wanted_squares else math.inf

    def figures(self) -> dict[str, Any]:
        """For a receipt."""
        return {
            "kernel": self.kernel, "calls": self.calls, "worst": self.worst, "relative_rms": self.relative_rms,
            "unequal": self.unequal, "values": self.num_values,
        }  # fmt: skip

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Count two results of one shape."""
        apart, size = difference(got, wanted)
        self.num_values += apart.numel()
        self.unequal += int((apart != 0).sum())
        if apart.numel():
            largest = float(size.max())
            most = float(apart.max())
            self.worst = max(self.worst, most / largest if largest else (math.inf if most else 0.0))
        self.squares += float(apart.double().square().sum())
        self.wanted_squares += float(size.double().square().sum())


@dataclasses.dataclass
class Choices:
    """What router and indexer chose, a span after another."""

    experts: list[Tensor] = dataclasses.field(default_factory=list)  # [T, K]
    affinities: list[Tensor] = dataclasses.field(default_factory=list)  # [T, E], what experts were chosen by
    rows: list[Tensor] = dataclasses.field(default_factory=list)  # [T, K], -1 for none
    row_scores: list[Tensor] = dataclasses.field(default_factory=list)  # [T, K]


class Watch:
    """What a run showed."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.choices = Choices()

    def keep(self, op: Op, args: tuple[Any, ...], result: Any) -> None:
        """Remember what was chosen, where the op chooses."""
        if op is route:
            self.choices.experts.append(result[0])
            self.choices.affinities.append(_affinities(args))
        elif op is index_topk:
            self.choices.row_scores.append(result[0])
            self.choices.rows.append(result[1])


@contextlib.contextmanager
def definitions() -> Iterator[Watch]:
    """Run every op by its definition."""
    watch = Watch()

    def run(op: Op, plain: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = op.definition(*args, **kwargs)
        watch.keep(op, args, result)
        return result

    with _in_place_of_all(run):
        yield watch


@contextlib.contextmanager
def beside() -> Iterator[Watch]:
    """Run what would run, and each kernel's definition beside it.  What is computed is the kernels' alone."""
    watch = Watch()
    within_definition = False

    def run(op: Op, plain: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal within_definition
        if within_definition:
            return op.definition(*args, **kwargs)
        version = plain.pick(place_of(*args[:2]))
        if version.name == "torch":
            result = version.run(*args, **kwargs)
            watch.keep(op, args, result)
            return result
        before = _untouched(op, args)
        result = version.run(*args, **kwargs)
        within_definition = True
        try:
            wanted = op.definition(*before, **kwargs)
            _compare(watch.tallies.setdefault(op.name, Tally(version.name)), op, args, before, result, wanted)
            watch.keep(op, args, result)
        finally:
            within_definition = False
        return result

    with _in_place_of_all(run):
        yield watch


Run = Callable[[Op, Op, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def _in_place_of_all(run: Run) -> Iterator[None]:
    """Have every call of every op go to `run`, with the op, and a copy of it that still picks as before."""
    with contextlib.ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(_in_place_of(op, run))
        yield


@contextlib.contextmanager
def _in_place_of(op: Op, run: Run) -> Iterator[None]:
    plain = copy.copy(op)
    plain.kernels, plain.passed_over = list(op.kernels), {}
    ours = Kernel("beside", lambda _: "", lambda: lambda *args, **kwargs: run(op, plain, args, kwargs), True)
    with use(op, "auto"):  # which forgets what was picked, when it begins and when it ends
        op.kernels.insert(0, ours)
        try:
            yield
        finally:
            op.kernels.remove(ours)


def _untouched(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with copies of what the op writes to."""
    if op is not store_rows:
        return args
    rows, planes, *rest = args
    return (rows, tuple(p.clone() for p in planes), *rest)


def _compare(tally: Tally, op: Op, args: tuple[Any, ...], before: tuple[Any, ...], result: Any, wanted: Any) -> None:
    tally.calls += 1
    if op is store_rows:
        for plane, wanted_plane in zip(args[1], before[1], strict=True):
            tally.add(plane.view(torch.uint8), wanted_plane.view(torch.uint8))
    elif op is index_topk:
        (score, rows), (wanted_score, wanted_rows) = result, wanted
        alike_T = _counted(tally, rows, wanted_rows, row_gaps(rows, score, wanted_rows, wanted_score))
        tally.add(score[alike_T], wanted_score[alike_T])
    elif op is route:
        (experts, weights), (wanted_experts, wanted_weights) = result, wanted
        alike_T = _counted(tally, experts, wanted_experts, expert_gaps(experts, wanted_experts, _affinities(args)))
        tally.add(weights[alike_T], wanted_weights[alike_T])
    else:
        for got, expected in zip(_tensors(result), _tensors(wanted), strict=True):
            tally.add(got, expected)


def _counted(tally: Tally, chosen_TK: Tensor, wanted_TK: Tensor, gap_T: Tensor) -> Tensor:
    """Which tokens chose alike [T]."""
    alike_T = same_choice(chosen_TK, wanted_TK)
    tally.choices += len(alike_T)
    tally.chosen_otherwise += int((~alike_T).sum())
    if not bool(alike_T.all()):
        tally.furthest = max(tally.furthest, float(gap_T[~alike_T].max()))
    return alike_T


def alike(like_TX: Tensor, seen: Choices, meant: Choices) -> tuple[Tensor, float]:
    """(which tokens of two runs chose alike, bool [T]; how far from a tie the furthest of the others was)"""
    alike_T = torch.ones(len(like_TX), dtype=torch.bool, device=like_TX.device)
    furthest, first = 0.0, 0
    for got, want, affinity_TE in zip(seen.experts, meant.experts, meant.affinities, strict=True):
        alike_T[first : first + len(got)] &= same_choice(got, want)
        furthest = max(furthest, float(expert_gaps(got, want, affinity_TE).max()))
        first += len(got)
    first = 0
    for got, score, want, meant_score in zip(seen.rows, seen.row_scores, meant.rows, meant.row_scores, strict=True):
        alike_T[first : first + len(got)] &= same_choice(got, want)
        furthest = max(furthest, float(row_gaps(got, score, want, meant_score).max()))
        first += len(got)
    return alike_T, furthest


def same_choice(chosen_TK: Tensor, wanted_TK: Tensor) -> Tensor:
    """Which tokens chose the same, in whatever order, bool [T]."""
    if chosen_TK.shape != wanted_TK.shape:
        return torch.zeros(len(chosen_TK), dtype=torch.bool)
    return (chosen_TK.sort(dim=1).values == wanted_TK.sort(dim=1).values).all(dim=1)


def expert_gaps(chosen_TK: Tensor, wanted_TK: Tensor, affinity_TE: Tensor) -> Tensor:
    """How far from a tie each token's choice of experts was, float [T]: 0 where the choice is the same.

    Of those the definition chose and this run did not, the best score less the worst of those chosen instead, relative
    to the token's largest score.  By hash nothing is a tie: a difference is infinite.  So is an expert chosen twice.
    """
    if not affinity_TE.numel():
        return torch.where(same_choice(chosen_TK, wanted_TK), 0.0, math.inf)
    lost_TK = wanted_TK.masked_fill((wanted_TK[:, :, None] == chosen_TK[:, None]).any(2), -1)
    gained_TK = chosen_TK.masked_fill((chosen_TK[:, :, None] == wanted_TK[:, None]).any(2), -1)
    lost = affinity_TE.gather(1, lost_TK.clamp(min=0)).masked_fill(lost_TK < 0, -math.inf).amax(1)
    gained = affinity_TE.gather(1, gained_TK.clamp(min=0)).masked_fill(gained_TK < 0, math.inf).amin(1)
    gap_T = (lost - gained).masked_fill(_has_twice(chosen_TK), math.inf)
    return _relative(gap_T, affinity_TE, same_choice(chosen_TK, wanted_TK))


def row_gaps(chosen_TK: Tensor, score_TK: Tensor, wanted_TK: Tensor, wanted_score_TK: Tensor) -> Tensor:
    """How far from a tie each token's choice of rows was, float [T], as `expert_gaps`; each run's own scores count.

    A row chosen instead cannot have a score above the least of those that should have been, by more than a tie's.
    Where fewer rows are visible than can be kept all of them are, and nothing is a tie.
    """
    if chosen_TK.shape != wanted_TK.shape:
        return torch.full((len(wanted_TK),), math.inf)
    if not wanted_TK.numel():
        return wanted_score_TK.new_zeros(len(wanted_TK))
    # Both ascend: what one has and the other has not is found by looking each up in the other.
    lost = wanted_score_TK.masked_fill(_found(chosen_TK, wanted_TK), -math.inf).amax(1)
    is_gained_TK = ~_found(wanted_TK, chosen_TK)
    gained = score_TK.masked_fill(~is_gained_TK, math.inf).amin(1)
    above = score_TK.masked_fill(~is_gained_TK, -math.inf).amax(1) - wanted_score_TK.amin(1)
    is_wrong_T = _has_twice(chosen_TK) | (wanted_TK < 0).any(1) | (chosen_TK < 0).any(1)
    gap_T = torch.maximum(lost - gained, above).masked_fill(is_wrong_T, math.inf)
    return _relative(gap_T, wanted_score_TK, same_choice(chosen_TK, wanted_TK))


def _has_twice(chosen_TK: Tensor) -> Tensor:
    """Which tokens chose something twice, bool [T]."""
    ordered = chosen_TK.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)


def _found(within_TK: Tensor, what_TK: Tensor) -> Tensor:
    """Whether each of `what` is among its token's `within`."""
    ordered = within_TK.sort(dim=1).values.contiguous()
    at = torch.searchsorted(ordered, what_TK.contiguous()).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, at) == what_TK


def _relative(gap_T: Tensor, score_TX: Tensor, alike_T: Tensor) -> Tensor:
    finite = score_TX.masked_fill(~score_TX.isfinite(), 0.0)
    largest_T = finite.abs().amax(1).clamp(min=torch.finfo(score_TX.dtype).tiny)
    return torch.where(alike_T, 0.0, (gap_T / largest_T).clamp(min=0.0))


def _affinities(args: tuple[Any, ...]) -> Tensor:
    """What `route` chooses by, [T, E], by its definition; empty where it chooses by token id."""
    x_TD, gate_ED, choice = args[:3]
    if not choice.is_floating_point():
        return x_TD.new_empty(0)
    with use(route_scores, "torch"), use(affinity, "torch"):
        return route_scores.definition(x_TD, gate_ED) + choice  # type: ignore[no-any-return]


def difference(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(|got - wanted|, |wanted|), float.

    The same are 0 apart, infinities and NaN too; what is a number in one alone is infinitely far.
    """
    if got.is_complex():
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    if got.shape != wanted.shape:
        return torch.full((1,), math.inf), torch.ones(1)
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    got, wanted = got.float(), wanted.float()
    apart = torch.where(same, 0.0, (got - wanted).abs())
    size = torch.where(wanted.isfinite(), wanted.abs(), 0.0)
    return apart.masked_fill(apart.isnan(), math.inf), size


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [t for part in result for t in _tensors(part)]
    return []
