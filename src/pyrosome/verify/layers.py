"""`verify`'s comparison of what runs fast with what it means, a layer at a time, on the user's own weights.

Of each layer only its own tensors are loaded: first in rows, as the files have them, for the definitions, whose streams
the next layer starts from; then as the engine holds them, for the kernels.  So it runs where the model does not fit.
Three things are held to bounds: the layer as a whole, each kernel beside its op's definition on the same inputs, and
the weights held against those in the files.  Then it is known which layer, which op, or which tensor is wrong.
Shape letters: T tokens, J residual streams, D model dim, X values of a token.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.model.numerics import EXACT, TRAINED, Numerics
from pyrosome.verify.beside import BITWISE, Choices, Tally, Watch, alike, beside, definitions, difference
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.parts import altered, as_held, as_stored, bytes_of
from pyrosome.verify.passage import Part, Passage
from pyrosome.verify.subject import free_memory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is allowed in one arithmetic (docs/numerics.md).

    Exact values differ by orders of summation alone.  Trained ones by that and by roundings to the next code, which a
    last bit decides: so their RMS counts, and a layer, which is several modules in a row, may be further off than each.
    """

    of: str  # "worst": largest difference by largest value; "relative_rms": RMS by RMS
    op: float
    layer: float
    near: float  # a choice made otherwise is a tie if so close, relative to the token's largest score

    def figure(self, tally: Tally) -> float:
        """What of a tally is bounded."""
        return tally.worst if self.of == "worst" else tally.relative_rms

    @property
    def said(self) -> str:
        """What the figure is, in words."""
        return "of the largest value" if self.of == "worst" else "by relative RMS"


BOUNDS = {EXACT.name: Bounds("worst", 1e-4, 1e-4, 1e-3), TRAINED.name: Bounds("relative_rms", 1e-2, 1e-1, 5e-2)}
SAME_INPUT_NEAR = 1e-4  # of choices by a kernel and its definition on the same inputs
WORK_BYTES = 256 << 20  # beside the weights, for what a step works in


def check(wanted: Wanted) -> Iterator[Finding]:
    """Findings of each layer in both arithmetics, of the head, of the draft stage, and one of all with plots."""
    index = open_checkpoint(wanted.model)
    if not index.check().ok:
        yield Finding("layers", "all layers", None, "left out: tensors are missing or wrong, as the check files says")
        return
    if wanted.device != "cpu" and not torch.cuda.is_available():
        said = f"left out: {wanted.device} was asked for and no such device is here"
        yield Finding("layers", "all layers", None, said)
        return
    with torch.inference_mode():
        passage = Passage(index, wanted.device, quick=wanted.quick, seed=wanted.seed)
        yield from _Comparison(passage, wanted).run()


class _Comparison:
    """Every part of a passage by its definitions and by what runs fast."""

    def __init__(self, passage: Passage, wanted: Wanted) -> None:
        self.passage, self.wanted = passage, wanted
        self.index, self.device = passage.index, passage.device
        # For the plots: how far each layer was, and the worst of each op.
        self.apart: dict[str, dict[int, float | None]] = {EXACT.name: {}, TRAINED.name: {}}
        self.ops: dict[str, dict[str, float]] = {EXACT.name: {}, TRAINED.name: {}}
        self.failed = self.left_out = 0

    def run(self) -> Iterator[Finding]:
        """The streams that a part starts from are the definitions' own after the part before."""
        embedded = self.passage.embedded()
        streams = {EXACT.name: embedded, TRAINED.name: embedded}
        parts = self.passage.parts()
        for done, part in enumerate(parts):
            for numerics in (EXACT, TRAINED):
                before = embedded if self.wanted.quick else streams[numerics.name]
                meant_TX, choices = self._meant(part, before, numerics)
                if not bool(meant_TX.isfinite().all()):
                    self.failed += 1
                    said = "the definitions give values that are no numbers, so its weights, or those before, hold such"
                    yield Finding("layers", f"{part.name}, {numerics.name}", False, said)
                    if self.wanted.quick:
                        continue
                    yield Finding("layers", "what follows", None, "left out: it would start from no numbers")
                    yield self._summary()
                    return
                for finding in self._compared(part, before, numerics, meant_TX, choices):
                    self.failed += finding.ok is False
                    self.left_out += finding.ok is None
                    yield finding
                if part.layer >= 0:
                    streams[numerics.name] = meant_TX
            self.wanted.tell(done + 1, len(parts), part.name)
        if self.index.has_drafts and self.index.config.dspark:
            yield Finding("layers", "draft stage", None, "left out: this version does not run DSpark heads")
        yield self._summary()

    def _meant(self, part: Part, streams_TJD: Tensor, numerics: Numerics) -> tuple[Tensor, Choices]:
        """What the definitions give on weights as the files have them."""
        stored = as_stored(self.index, part.names, numerics, self.device, drafts=part.is_draft)
        with definitions() as watch:
            return part.run(stored, streams_TJD, numerics), watch.choices

    def _compared(
        self, part: Part, streams_TJD: Tensor, numerics: Numerics, meant_TX: Tensor, choices: Choices
    ) -> Iterator[Finding]:
        """Findings of what runs fast, on weights as the engine holds them."""
        what = f"{part.name} ({part.kind}), {numerics.name}"
        needed, free = bytes_of(self.index, part.names) + WORK_BYTES, self._free()
        if free and needed > free:
            detail = f"left out: it takes {needed:,} bytes as the engine holds it, and {free:,} are free"
            yield Finding("layers", what, None, detail, {"needed_bytes": needed, "free_bytes": free})
            return
        try:
            held = as_held(self.index, part.names, numerics, self.device, drafts=part.is_draft)
            for name in altered(held, self.index, part.names):
                detail = "is not held as its file has it: loading or memory changed it"
                yield Finding("layers", f"{part.name}, {name}", False, detail, {"layer": part.layer, "tensor": name})
            with beside() as seen:
                got_TX = part.run(held, streams_TJD, numerics)
        except Exception as error:  # a kernel that fails is what is looked for
            log.debug("%s failed", what, exc_info=True)
            yield Finding("layers", what, False, f"what runs fast ended with {type(error).__name__}: {error}")
            return
        yield from self._ops(part, numerics, seen)
        yield self._whole(part, numerics, what, got_TX, meant_TX, seen, choices)

    def _free(self) -> int:
        """Bytes that weights may take; 0 where the system does not say."""
        return free_memory() if self.device == "cpu" else int(torch.cuda.mem_get_info(self.device)[0])

    def _ops(self, part: Part, numerics: Numerics, seen: Watch) -> Iterator[Finding]:
        """Kernels that are too far from their definitions."""
        bounds, worst = BOUNDS[numerics.name], self.ops[numerics.name]
        for name, tally in seen.tallies.items():
            worst[name] = max(bounds.figure(tally), worst.get(name, 0.0))
            if problem := op_problem(name, tally, bounds):
                figures = {"layer": part.layer, "op": name, "kernel": tally.kernel, "numerics": numerics.name}
                yield Finding("layers", f"{part.name}, {name}, {numerics.name}", False, problem, figures)

    def _whole(
        self, part: Part, numerics: Numerics, what: str, got_TX: Tensor, meant_TX: Tensor, seen: Watch, meant: Choices
    ) -> Finding:
        """The part as a whole, over the tokens that chose alike."""
        bounds = BOUNDS[numerics.name]
        alike_T, furthest = alike(got_TX, seen.choices, meant)
        apart = _apart(got_TX[alike_T], meant_TX[alike_T], bounds)
        num_otherwise = int((~alike_T).sum())
        if part.layer >= 0:
            self.apart[numerics.name][part.layer] = apart
        figures = {
            "layer": part.layer, "kind": part.kind, "numerics": numerics.name, "apart": apart, "bound": bounds.layer,
            "tokens": len(got_TX), "chose_otherwise": num_otherwise, "furthest_from_a_tie": furthest,
            "ops": {name: tally.figures() for name, tally in seen.tallies.items()},
        }  # fmt: skip
        said = "no token chose alike, so kernels are judged one by one"
        if apart is not None:
            said = f"within {apart:.1e} {bounds.said}, {bounds.layer:.0e} allowed"
        said += f"; {_furthest(seen, bounds)}"
        if num_otherwise:
            said += f"; {num_otherwise} token(s) chose otherwise, {furthest:.1e} from a tie, {bounds.near:.0e} allowed"
        ok = (apart is None or apart <= bounds.layer) and furthest <= bounds.near
        return Finding("layers", what, ok, said, figures)

    def _summary(self) -> Finding:
        plots: list[dict[str, Any]] = []
        for name, bounds in BOUNDS.items():
            by_layer, ops = self.apart[name], sorted(self.ops[name].items(), key=lambda item: -item[1])
            title = "difference / largest value" if bounds.of == "worst" else "relative RMS"
            plots += [
                {"title": f"Layers against their definitions, {name}", "kind": "lines", "x": list(by_layer),
                 "series": {name: list(by_layer.values())}, "bound": bounds.layer, "x_title": "layer"},
                {"title": f"Kernels against their definitions, {name}: the worst of all layers", "kind": "bars",
                 "x": [n for n, _ in ops], "series": {name: [v for _, v in ops]}, "bound": bounds.op},
            ]  # fmt: skip
            for plot in plots[-2:]:
                plot |= {"log": True, "y_title": title}
        num, passage = len(self.apart[EXACT.name]), self.passage
        spans = " + ".join(str(last - first) for first, last in passage.spans)
        rows = ", ".join(f"{name} with {kv_format} rows" for name, kv_format in passage.formats.items())
        sample = "a sample, each from the embedding" if self.wanted.quick else "each from the one before"
        detail = f"{num} of {passage.config.num_hidden_layers} layers, {sample}; {spans} tokens; {rows}"
        detail += f"; {self.failed} finding(s) above failed" if self.failed else ""
        detail += f"; {self.left_out} comparison(s) left out" if self.left_out else ""
        ok = False if self.failed else None if self.left_out and not num else True
        return Finding("layers", "all layers", ok, detail, {"plots": plots}, warns=ok is True and self.left_out > 0)


def op_problem(name: str, tally: Tally, bounds: Bounds) -> str:
    """What is wrong between a kernel and its definition; "" where nothing is."""
    over = f"over {tally.calls} calls of the {tally.kernel!r} kernel"
    if name in BITWISE and tally.unequal:
        return f"{tally.unequal:,} of {tally.num_values:,} values differ from its definition's {over}; none may"
    if not (figure := bounds.figure(tally)) <= bounds.op:
        return f"{figure:.1e} from its definition {bounds.said} {over}, {bounds.op:.0e} allowed"
    if tally.furthest > SAME_INPUT_NEAR:
        return (
            f"{tally.chosen_otherwise:,} of {tally.choices:,} tokens chose otherwise than by its definition, up to "
            f"{tally.furthest:.1e} from a tie {over}, {SAME_INPUT_NEAR:.0e} allowed"
        )
    return ""


def _furthest(seen: Watch, bounds: Bounds) -> str:
    if not seen.tallies:
        return "no kernel runs here, the definitions do"
    figures = {name: bounds.figure(tally) for name, tally in seen.tallies.items()}
    name = max(figures, key=lambda n: figures[n])
    return f"{len(figures)} kernels beside their definitions, the furthest {name} by {figures[name]:.1e}"


def _apart(got_TX: Tensor, meant_TX: Tensor, bounds: Bounds) -> float | None:
    """How far two results are, by the figure their bound is of; None without tokens."""
    if not len(got_TX):
        return None
    if bounds.of == "relative_rms":
        tally = Tally()
        tally.add(got_TX, meant_TX)
        return tally.relative_rms
    apart_T, size_T = (x.flatten(1).amax(1) for x in difference(got_TX, meant_TX))
    return float((apart_T / size_T.clamp(min=torch.finfo(torch.float32).tiny)).max())  # each token by its own scale
