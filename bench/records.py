"""What a comparison leaves behind: figures merged over rounds, a table, and lines in `results/`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

from pyrosome.plan import history
from pyrosome.plan.hardware import machine as planned_machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.speed import coefficients_for, prompt_time, step_time
from pyrosome.plan.work import Load

HERE = Path(__file__).parent
SMALL_MB = 1.0  # below this, a peak is the sampling's own noise and a ratio of two says nothing


def merged(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """One number per figure: medians of the rates over all rounds and repeats, maxima of the peaks.

    Args:
        rounds: what `measure.measure` returned, read back from JSON (lengths are strings).
    """
    rows = {}
    for unit, clock in (("tok/CPU-s", "cpu"), ("tok/s", "wall")):
        for n in rounds[0]["prefill"]:
            rates = [v for r in rounds for v in r["prefill"][n][clock]]
            rows[f"prefill {int(n):,} ({unit})"] = statistics.median(rates)
        rows[f"decode ({unit})"] = statistics.median([v for r in rounds for v in r["decode"][clock]])
    for n in rounds[0]["prefill_peak_mb"]:
        rows[f"prefill {int(n):,} peak (MB)"] = max(r["prefill_peak_mb"][n] for r in rounds)
    rows["decode peak (MB)"] = max(r["decode_peak_mb"] for r in rounds)
    return rows


def ratio(name: str, ours: float, theirs: float) -> str:
    """Ours over theirs, for a table; a dash between two peaks too small to compare."""
    if name.endswith("(MB)") and (ours < SMALL_MB or theirs < SMALL_MB):
        return "-"
    return f"{ours / theirs:.2f}"


def table(title: str, ours: dict[str, float], theirs: dict[str, float], names: tuple[str, str]) -> str:
    """Figures side by side as text; the columns are ours, theirs, ours over theirs."""
    lines = [title, f"{'':26s}{names[0]:>18s}{names[1]:>22s}{'ours/theirs':>13s}"]
    for name, value in ours.items():
        lines.append(f"{name:26s}{value:18,.1f}{theirs[name]:22,.1f}{ratio(name, value, theirs[name]):>13s}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What figures were taken on, and of which sources ("-dirty" where they differ from the commit)."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": found.stdout.strip() or "unknown",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": 1,
        "python": platform.python_version(),
    }


class Predictions:
    """Rates measured by a benchmark beside those the planner predicts for this machine, kept in its history."""

    def __init__(self, bench: str, model: Model) -> None:
        self.bench, self.model, self.here = bench, model, planned_machine("here")
        self.coefficients = coefficients_for(self.here)
        self.lines: list[dict[str, Any]] = []
        print(f"\n{bench}: predicted beside measured, tok/s ({self.coefficients.source})")

    def seconds(self, load: Load) -> float:
        """Of one step."""
        return step_time(self.model, self.here, Layout.of("tp", 1), Placement(), load, self.coefficients).seconds

    def step(self, load: Load, measured: float) -> None:
        """Tokens per second of steps of one load."""
        tokens = load.sequences * load.tokens
        about = f"{load.sequences} x {load.tokens:,} at {load.context:,}"
        self.rate("decode" if load.tokens == 1 else "prefill", about, tokens / self.seconds(load), measured)

    def prompt(self, tokens: int, step_tokens: int, measured: float) -> None:
        """Tokens per second of a whole prompt on an empty cache, in steps of `step_tokens`."""
        one = Layout.of("tp", 1)
        time = prompt_time(self.model, self.here, one, Placement(), tokens, self.coefficients, step_tokens=step_tokens)
        self.rate("prefill", f"{tokens:,} by {step_tokens:,}", tokens / time.seconds, measured)

    def rate(self, kind: str, about: str, predicted: float, measured: float) -> None:
        """Print and keep one pair of rates."""
        low, high = self.coefficients.band
        history.keep(f"bench.{self.bench}, {kind}, tok/s", predicted, measured, self.here.device.title)
        print(f"  {kind} {about}: {predicted:,.1f} ({predicted / high:,.1f} to {predicted / low:,.1f}), "
              f"{measured:,.1f} measured, off by {predicted / measured - 1:+.0%}")  # fmt: skip
        self.lines.append({"kind": kind, "about": about, "predicted": predicted, "measured": measured})


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON line to a file of results."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
