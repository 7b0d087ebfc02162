"""A sweep, drawn: sessions and dollars over context, a line for each machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyrosome.errors import RequestError
from pyrosome.plan.quantities import show_dollars
from pyrosome.plan.sweep import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")


def check_path(path: Path) -> None:
    """See that a picture can be drawn there, before anything is computed for it.

    Raises:
        RequestError: not a picture's name, no such folder, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--plot is {str(path)!r}; a file that ends in {' or '.join(SUFFIXES)} was expected")
    if not path.parent.is_dir():
        raise RequestError(f"--plot is {str(path)!r}, and there is no folder {str(path.parent)!r}; make it first")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError(f"drawing a sweep needs matplotlib ({error}): pip install 'pyrosome[train]'") from None


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw a sweep as PNG or SVG, by the file's name: sessions over context above, dollars per session-hour below.

    A filled mark is on the frontier.  The lower part is left out where no price is known.

    Raises:
        RequestError: nothing fits anywhere, or as `check_path`, or the picture cannot be written.
    """
    check_path(path)
    held = [p for p in points if p.sessions]
    if not held:
        raise RequestError("nothing of this sweep fits, so that there is nothing to draw; its table says what lacks")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_prices = any(p.usd_session_hour is not None for p in held)
    figure = Figure(figsize=(8, 7 if has_prices else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    drawn = figure.subplots(2 if has_prices else 1, 1, sharex=True, squeeze=False)[:, 0]
    drawn[0].set_title(title, fontsize="medium")
    _draw(drawn[0], held, "sessions", "sessions at once")
    drawn[0].legend(fontsize="small")
    if has_prices:
        _draw(drawn[1], [p for p in held if p.usd_session_hour is not None], "usd_session_hour", "$ per session-hour")
    contexts = sorted({p.context for p in points})
    drawn[-1].set_xticks(contexts, [f"{c:,}" for c in contexts], rotation=20)
    drawn[-1].set_xlabel("context of each session (tokens)")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=110, format=path.suffix[1:].lower())
        os.replace(partial, path)
    except OSError as error:
        raise RequestError(f"the picture was to be written to {path}: {error.strerror}; name another file") from None
    finally:
        partial.unlink(missing_ok=True)


def _draw(axes: Axes, points: Sequence[Point], field: str, label: str) -> None:
    for machine in dict.fromkeys(p.machine for p in points):
        mine = [p for p in points if p.machine == machine]
        price = mine[0].usd_hour
        name = machine if price is None else f"{machine}, {show_dollars(price)}/h"
        values = [getattr(p, field) for p in mine]
        (line,) = axes.plot([p.context for p in mine], values, marker="o", markerfacecolor="white", label=name)
        best = [(p.context, getattr(p, field)) for p in mine if p.on_frontier]
        axes.plot([x for x, _ in best], [y for _, y in best], "o", color=line.get_color())
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)
