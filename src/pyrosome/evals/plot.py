"""Recall by context, drawn."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pyrosome.errors import RequestError
from pyrosome.evals.report import Report


def plot(reports: Sequence[Report], path: Path) -> None:
    """Draw recall over context as a PNG, with 95 % intervals, a line for each model, kind and ablation.

    Raises:
        RequestError: matplotlib is not installed, no report is of recall, or the picture cannot be written.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = defaultdict(list)
    for one in (r for r in reports if r["eval"] == "recall"):
        for which in (one, one["against"]) if one.get("against") else (one,):
            for r in (r for r in which["results"] if r["right"]["n"]):
                label = f"{which['model']} ({which['numerics']}), {one['kind']}"
                label += "" if r["ablation"] == "none" else f", {r['ablation']}"
                found = r["right"]
                lines[label].append((r["context"], found["share"], found["low"], found["high"]))
    if not lines:
        raise RequestError("recall was to be drawn and there is none in these results; run `eval recall` with --out")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(f"drawing recall needs matplotlib ({error}): pip install 'pyrosome[train]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, points in lines.items():
        context, middle, low, high = zip(*sorted(points), strict=True)
        below = [m - a for m, a in zip(middle, low, strict=True)]
        above = [b - m for m, b in zip(middle, high, strict=True)]
        axes.errorbar(context, middle, (below, above), marker="o", capsize=3, label=label)
    contexts = sorted({p[0] for points in lines.values() for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.set(xlabel="context (tokens)", ylabel="facts recalled", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        os.replace(partial, path)
    except OSError as error:
        raise RequestError(f"the picture was to be written to {path}: {error.strerror}; name another file") from None
    finally:
        partial.unlink(missing_ok=True)
