"""What this machine reaches, fitted to steps that were timed on it, and kept with what it holds for.

A step's time is taken as a sum of what it reads and computes, each at a rate of its own, and of what layers cost
beside it.  Seconds of each are found by non-negative least squares of relative errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyrosome.errors import PlanError
from pyrosome.folders import private_folder, state_home, write_whole
from pyrosome.plan.history import installed
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout
from pyrosome.plan.work import GROUPS, Load, work_of

VERSION = 1  # of the file's form
TERMS = ("read", "rows", *GROUPS, "layer", "token", "step")  # seconds of each byte, FLOP, layer, token of it, step
# No kind of arithmetic is believed to be faster than so many times what a large product reached, nor memory than so
# many times what a plain sum read: a fit of few steps may leave out what another part can explain.
FASTER = {"read": 2.0, "matrices": 1.5, "experts": 1.5, "plain": 1.5, "streams": 1.5, "attention": 1.5, "indexer": 4.0}


class Point(NamedTuple):
    """A step that was timed."""

    model: Model
    load: Load
    seconds: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One machine's seconds of each of TERMS, and what else was measured."""

    processor: str  # `Device.title` of this machine's
    threads: int
    level: str  # of the native kernels' vector instructions; "": none
    engine: str
    torch: str
    when: str  # ISO 8601, UTC
    seconds: Mapping[str, float]
    read_bytes_s: float  # of memory, summing what no cache holds
    flops_s: float  # of a large bfloat16 product
    disk_bytes_s: float  # 0: not measured
    link_bytes_s: float  # from host memory to a GPU; 0: there is none
    residual: float  # median of |fitted / measured - 1| over the steps fitted to
    worst: float  # the largest of them
    points: int
    version: int = VERSION

    def predicted(self, model: Model, load: Load) -> float:
        """Seconds of a step on this machine."""
        return float(sum(self.seconds[t] * n for t, n in zip(TERMS, terms(model, load), strict=True)))

    @property
    def outdated(self) -> str:
        """Why it does not hold any more; "" where it does."""
        now = {name: installed(name) for name in ("pyrosome", "torch")}
        then = {"pyrosome": self.engine, "torch": self.torch}
        other = [f"{name} {then[name]}" for name in now if now[name] != then[name]]
        return f"it is of {' and '.join(other)}, and {_words(now)} is installed" if other else ""


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version or 'none'}" for name, version in versions.items())


def terms(model: Model, load: Load) -> NDArray[np.float64]:
    """How much of each of TERMS a step on one device has."""
    sums = dict.fromkeys(TERMS, 0.0)
    for work in work_of(model, Layout.of("tp", 1), load):
        sums["read"] += work.weight_bytes
        sums["rows"] += work.row_bytes
        sums[work.group] += work.flops
    layers = model.config.num_hidden_layers
    sums |= {"layer": layers, "token": layers * load.sequences * load.tokens, "step": 1.0}
    return np.array([sums[term] for term in TERMS])


def fitted(points: Sequence[Point], read_bytes_s: float, flops_s: float) -> dict[str, float]:
    """Seconds of each of TERMS, with the least squares of relative errors and nothing faster than it can be.

    Args:
        read_bytes_s: what a plain sum reads of memory.
        flops_s: what a large bfloat16 product reaches.
    """
    least = np.array([1 / (FASTER[t] * _ceiling(t, read_bytes_s, flops_s)) if t in FASTER else 0.0 for t in TERMS])
    rows = np.array([terms(p.model, p.load) / p.seconds for p in points])
    largest = rows.max(axis=0)
    scale = np.where(largest > 0, largest, 1.0)  # bytes and layers are of very different sizes
    rest = non_negative(rows / scale, 1 - rows @ least)
    return dict(zip(TERMS, (least + rest / scale).tolist(), strict=True))


def _ceiling(term: str, read_bytes_s: float, flops_s: float) -> float:
    return read_bytes_s if term == "read" else flops_s


def residuals(points: Sequence[Point], seconds: Mapping[str, float]) -> list[float]:
    """fitted / measured - 1 of each point."""
    each = np.array([seconds[t] for t in TERMS])
    return [float(terms(p.model, p.load) @ each / p.seconds - 1) for p in points]


def non_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least |a x - b|, by the active-set method of Lawson and Hanson (1974, chapter 23)."""
    n = a.shape[1]
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(30 * n):
        gain = a.T @ (b - a @ x)
        gain[free] = -np.inf
        best = int(gain.argmax())
        if free.all() or gain[best] <= 1e-10:
            break
        free[best] = True
        while free.any():
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (trial <= 0)
            if not below.any():
                x = trial
                break
            x = x + (x[below] / (x[below] - trial[below])).min() * (trial - x)
            free &= ~(below & (x <= 1e-12))
            x[~free] = 0.0
    return x


def folder() -> Path:
    """Where calibrations are kept."""
    return state_home() / "calibrations"


def save(calibration: Calibration) -> Path:
    """Keep it in place of the last one of this processor and number of threads; the file.

    Raises:
        RequestError: the folder cannot be used.
        PlanError: the file cannot be written.
    """
    place = private_folder(folder())
    name = re.sub(r"[^a-z0-9]+", "-", calibration.processor.lower()).strip("-") or "processor"
    path = place / f"{name}-{calibration.threads}.json"
    text = json.dumps(dataclasses.asdict(calibration), indent=1) + "\n"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise PlanError(f"the calibration cannot be written to {path}: {error.strerror or error}") from None
    return path


def load(path: Path) -> Calibration:
    """Read one back.

    Raises:
        PlanError: it cannot be read, or is no calibration of this version.
    """
    again = "run `pyrosome calibrate` again"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as a calibration ({error}); {again}") from None
    names = {f.name for f in dataclasses.fields(Calibration)}
    if not isinstance(found, dict) or set(found) != names or found["version"] != VERSION:
        raise PlanError(f"{path}: is no calibration of version {VERSION}; {again}")
    calibration = Calibration(**found)
    if why := _wrong(calibration):
        raise PlanError(f"{path}: {why}; {again}")
    return calibration


def _wrong(c: Calibration) -> str:
    """What makes a calibration unusable; "" for nothing."""
    texts = (c.processor, c.level, c.engine, c.torch, c.when)
    numbers = (c.read_bytes_s, c.flops_s, c.disk_bytes_s, c.link_bytes_s, c.residual, c.worst, c.threads, c.points)
    if not all(isinstance(t, str) for t in texts):
        return "a text is missing"
    if not isinstance(c.seconds, Mapping) or set(c.seconds) != set(TERMS):
        return f"its seconds are not of {', '.join(TERMS)}"
    if not all(_is_amount(n) for n in (*numbers, *c.seconds.values())):
        return "a figure is not a number of 0 or more"
    if not (c.read_bytes_s and c.flops_s and any(c.seconds.values())):
        return "a rate is 0"
    return ""


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value) and value >= 0


def latest(processor: str, threads: int = 0) -> Calibration | None:
    """The newest calibration of a processor that still holds, else the newest; None where there is none.

    Args:
        threads: of so many only; 0: of any number.
    """
    found = []
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(PlanError):  # written by another version, or broken: as good as none
            found.append(load(path))
    own = [c for c in found if c.processor == processor and threads in (0, c.threads)]
    return max(own, key=lambda c: (not c.outdated, c.when), default=None)


def median_and_worst(points: Sequence[Point], seconds: Mapping[str, float]) -> tuple[float, float]:
    """(median, largest) of the relative errors of a fit, without sign."""
    errors = [abs(e) for e in residuals(points, seconds)]
    return statistics.median(errors), max(errors)
