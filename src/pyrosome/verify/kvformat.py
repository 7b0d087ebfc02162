"""What stored rows cost in quality: the same texts predicted with cache rows kept in other forms, token by token.

Every form is compared with rows that nothing rounded (float32).  The roundings of FP8 rows and FP4 keys are set apart
from how rows are stored: rows that were rounded fit bfloat16 exactly, so each can be told alone.
Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.streams import plan_cache
from pyrosome.engine.loaded import LoadedModel
from pyrosome.errors import CheckpointError
from pyrosome.model.deepseek_v4 import Attention, Indexer
from pyrosome.model.numerics import unchanged
from pyrosome.quant import round_index, round_kv
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.subject import Subject, asked, forced
from pyrosome.verify.texts import texts

CHECK = "kvformat"
SURE = 0.5  # probability of the best token by rows that nothing rounded: where it is more, the best should stay
_PIECE = 64  # rows whose distributions are held at once
_FIRST_BUCKET = 64  # positions; the next ones are twice as many each

Rounding = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Form:
    """How rows are rounded, and how they are then kept."""

    name: str
    kv: Rounding
    index: Rounding
    kv_format: str


PLAIN = Form("float32 rows", unchanged, unchanged, "f32")
ROUNDED = Form("FP8 rows and FP4 keys, kept in bfloat16", round_kv, round_index, "bf16")
STORED = Form("FP8 rows and FP4 keys", round_kv, round_index, "fp8")
FORMS = (
    Form("bfloat16 rows", unchanged, unchanged, "bf16"),
    Form("FP8 rows, keys not rounded", round_kv, unchanged, "bf16"),
    # As engines without FP4 keep keys; in groups of 64, and not a form that this engine stores.
    Form("FP8 rows and FP8 keys, simulated", round_kv, round_kv, "bf16"),
    STORED,
)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a form may cost."""

    mean: float  # nats per token, Kullback-Leibler from rows that nothing rounded
    p99: float
    sure: float  # share of positions with a sure best token at which it stays the best
    source: str


# Of the built-in model: what 12 texts of 1,020 tokens showed, doubled (docs/verify-checks.md has the figures).
BUILTIN_BOUNDS = Bounds(0.03, 0.4, 0.98, "measured on this model, doubled")
# Of others, assumed: weights trained with these roundings stay far within, and rows in disorder do not.
BOUNDS = Bounds(0.1, 1.0, 0.95, "assumed for weights that were trained with these roundings")
# Between FP8 rows and the same values in bfloat16 nothing may change: both are read as the same numbers.
SAME = Bounds(1e-6, 1e-6, 1.0, "the same numbers, kept in two ways")


@dataclasses.dataclass(frozen=True)
class Apart:
    """How the predictions of two forms differ, position by position; flat over all texts."""

    position: Tensor
    nats: Tensor
    same_best: Tensor  # bool
    is_sure: Tensor  # bool: by the first of the two

    def figures(self) -> dict[str, Any]:
        """Plain data: nats as mean, 99th percentile and most; shares of positions with the same best token."""
        sure = self.same_best[self.is_sure]
        return {
            "positions": len(self.nats), "mean": float(self.nats.mean()), "p99": float(self.nats.quantile(0.99)),
            "max": float(self.nats.max()), "top1": float(self.same_best.double().mean()),
            "sure_positions": len(sure), "sure_top1": float(sure.double().mean()) if len(sure) else None,
            "by_position": [
                {"from": low, "to": high - 1, "positions": int(at.sum()), "mean": float(self.nats[at].mean())}
                for low, high, at in self._buckets()
            ],
        }  # fmt: skip

    def _buckets(self) -> Iterator[tuple[int, int, Tensor]]:
        low, high = 0, _FIRST_BUCKET
        while low <= int(self.position.max()):
            at = (self.position >= low) & (self.position < high)
            if at.any():
                yield low, high, at
            low, high = high, 2 * high


def check(wanted: Wanted) -> Iterator[Finding]:
    """A finding for each form of rows, and one for FP8 rows against the same values in bfloat16.

    Raises:
        RequestError: no such numerics.
    """
    yield from asked(wanted, CHECK, functools.partial(_found, wanted))


def _found(wanted: Wanted, subject: Subject) -> Iterator[Finding]:
    model, bounds = subject.model, BUILTIN_BOUNDS if subject.is_builtin else BOUNDS
    is_known = subject.is_builtin or subject.is_official
    try:
        plan_cache(model.config, STORED.kv_format, 1, 1)
    except CheckpointError as error:
        yield Finding(CHECK, STORED.name, None, f"left out: {error}")
        return
    told = _told(wanted, texts_for(subject, wanted))
    same, *costs = compared(model, told, [(ROUNDED, STORED), *((PLAIN, f) for f in FORMS)])
    yield held(same, f"{STORED.name}, against the same in bfloat16", SAME)
    found = [held(cost, form.name, bounds, is_known=is_known) for form, cost in zip(FORMS, costs, strict=True)]
    plots = {f.what: f.figures.get("by_position", []) for f in found}
    found[-1].figures["plots"] = [_plot(plots)] if all(plots.values()) else []
    yield from found


def _told(wanted: Wanted, texts: Sequence[list[int]]) -> Iterator[list[int]]:
    for number, ids in enumerate(texts):
        wanted.tell(number, len(texts), "kvformat: texts predicted")
        yield ids


def texts_for(subject: Subject, wanted: Wanted) -> list[list[int]]:
    """Ids to predict, by `wanted.seed`; fewer and shorter ones where it is to be quick."""
    rng = random.Random(f"kvformat/{wanted.seed}")
    if subject.is_builtin:
        return texts(subject, rng, *((6, 510) if wanted.quick else (12, 1020)))
    return texts(subject, rng, *((2, 700) if wanted.quick else (3, 3000)))


def compared(model: LoadedModel, texts: Iterable[Sequence[int]], pairs: Sequence[tuple[Form, Form]]) -> list[Apart]:
    """Of each pair of forms, the second's predictions of all texts held against the first's."""
    forms = list(dict.fromkeys(form for pair in pairs for form in pair))
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in pairs]
    for ids in texts:
        position = 0
        for pieces in zip(*(_predicted(model, ids, form) for form in forms), strict=True):
            by_form = dict(zip(forms, pieces, strict=True))
            at_R = torch.arange(position, position + len(pieces[0]))
            for found, (first, second) in zip(parts, pairs, strict=True):
                found.append((at_R, *_apart(by_form[first], by_form[second])))
            position += len(at_R)
    return [Apart(*(torch.cat(x) for x in zip(*found, strict=True))) for found in parts]


def _apart(p_RV: Tensor, q_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nats, whether the best token is the same, whether the first is sure of it), each [R]."""
    rows = [
        _rows_apart(p.double().log_softmax(-1), q.double().log_softmax(-1))
        for p, q in zip(p_RV.split(_PIECE), q_RV.split(_PIECE), strict=True)
    ]
    nats, same, sure = (torch.cat(x).cpu() for x in zip(*rows, strict=True))
    return nats, same, sure


def _rows_apart(p_RV: Tensor, q_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = p_RV.max(-1)
    return (p_RV.exp() * (p_RV - q_RV)).sum(-1), best.indices == q_RV.argmax(-1), best.values.exp() > SURE


def _predicted(model: LoadedModel, ids: Sequence[int], form: Form) -> Iterator[Tensor]:
    """Logits after each id, piece by piece, with rows in that form; between pieces the network is as it was."""
    pieces = forced(model, ids, 0, form.kv_format)
    while True:
        with rounded(model.network, form.kv, form.index):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextlib.contextmanager
def rounded(network: torch.nn.Module, kv: Rounding, index: Rounding) -> Iterator[None]:
    """Within, rows, keys and index queries are rounded by these functions, whatever the network's numerics are."""
    with contextlib.ExitStack() as undo:
        for module in network.modules():
            if isinstance(module, Attention | Indexer):
                undo.callback(setattr, module, "numerics", module.numerics)
                module.numerics = dataclasses.replace(module.numerics, kv=kv, index=index)
            if isinstance(module, Attention) and module.ratio:
                undo.callback(setattr, module.compressor, "round_nope", module.compressor.round_nope)
                module.compressor.round_nope = kv
        yield


def held(apart: Apart, what: str, bounds: Bounds, *, is_known: bool = True) -> Finding:
    """What was measured, against its bounds; beyond them nothing is said of weights whose training is not known."""
    if broken := int((~torch.isfinite(apart.nats)).sum()):
        detail = f"after {broken:,} of {len(apart.nats):,} positions there are logits that are no numbers"
        return Finding(CHECK, what, False, detail, {"positions": len(apart.nats), "not_finite": broken})
    f = apart.figures()
    sure = 1.0 if f["sure_top1"] is None else f["sure_top1"]
    detail = (
        f"{f['mean']:.2g} nats a token on average and {f['p99']:.2g} in the worst hundredth of {f['positions']:,} "
        f"positions ({bounds.mean:g} and {bounds.p99:g} are allowed, {bounds.source}); the best token stays at "
        f"{f['top1']:.4f} of all"
    )
    if f["sure_positions"]:
        detail += (
            f", and at {sure:.4f} of the {f['sure_positions']:,} where it has more than half ({bounds.sure:g} is asked)"
        )
    ok: bool | None = f["mean"] <= bounds.mean and f["p99"] <= bounds.p99 and sure >= bounds.sure
    if not ok and not is_known:
        ok, detail = None, f"{detail}; whether these weights were trained with them is not known"
    return Finding(CHECK, what, ok, detail, f | {"bounds": dataclasses.asdict(bounds)})


def _plot(by_form: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    first = next(iter(by_form.values()))
    return {
        "title": "nats lost by stored rows, by context position", "kind": "lines", "log": True,
        "x": [f"{b['from']}-{b['to']}" for b in first], "x_title": "position", "y_title": "nats a token",
        "series": {name: [b["mean"] for b in buckets] for name, buckets in by_form.items()},
    }  # fmt: skip
