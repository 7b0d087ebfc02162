"""Pictures of records, as SVG: the same record gives the same bytes.  Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHER, QUIET = "#0b6e8f", "#d1741f", "#8a8f94"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "pyrosome", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e5e7", "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip

Draw = Callable[[Axes, dict[str, Any]], None]


def plots(records: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw all that the records (by bench) have, into `folder`; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(draw, records[bench], folder / name) for name, (bench, draw) in PLOTS.items() if bench in records]


def prefill_rate(ax: Axes, record: dict[str, Any]) -> None:
    """Tokens per CPU second of each chunk of the prompt."""
    prefill = record["prefill"]
    chunk, spent = prefill["chunk"], prefill["chunks"]["cpu_s"]
    ax.plot([chunk * (i + 1) for i in range(len(spent))], [chunk / s for s in spent], color=OURS, linewidth=1.5)
    ax.set(title=f"Prefill, chunks of {chunk:,} tokens", ylabel="tokens per CPU second", ylim=(0, None))
    _ticks(ax, chunk * len(spent), 8, "context after the chunk, tokens")


def decode_rate(ax: Axes, record: dict[str, Any]) -> None:
    """Tokens per CPU second by context: medians, and the range of the repeats."""
    points = record["decode"]
    context, rate = [p["context"] for p in points], [p["rate_cpu"] for p in points]
    low = [p["rate_cpu"] - min(p["repeats_cpu"]) for p in points]
    high = [max(p["repeats_cpu"]) - p["rate_cpu"] for p in points]
    ax.errorbar(context, rate, yerr=[low, high], color=OURS, marker="o", capsize=3, linewidth=1.5)
    ax.set_xscale("log", base=2)
    ax.set_xticks(context, [short(c) for c in context])
    ax.set_xlabel("context, tokens")
    ax.set(title="Decode: median and range", ylabel="tokens per CPU second", ylim=(0, None))


def memory(ax: Axes, record: dict[str, Any]) -> None:
    """Cache of one sequence by context: planned, allocated and resident."""
    points = record["decode"]
    context = [p["context"] for p in points]
    planned = [p["cache"]["planned"] / 1e6 for p in points]
    ax.plot(context, planned, color=QUIET, linewidth=1.5, label="planned (computed)")
    allocated = [p["cache"]["allocated"] / 1e6 for p in points]
    ax.plot(context, allocated, "o", color=OURS, markersize=8, markerfacecolor="none", label="allocated (measured)")
    ax.plot(context, [p["resident_mb"] for p in points], "x", color=OTHER, label="resident (measured)")
    _ticks(ax, max(context), 4, "context, tokens")
    ax.set(title="Cache of one sequence", ylabel="MB", ylim=(0, None))
    ax.legend()


def peers(ax: Axes, record: dict[str, Any]) -> None:
    """Our rates over the other engine's, where both are per CPU second."""
    names = [n for n in record["ours"] if n.endswith("(tok/CPU-s)")]
    ratios = [record["ours"][n] / record["theirs"][n] for n in names]
    bars = ax.barh([n.removesuffix(" (tok/CPU-s)") for n in names], ratios, color=OURS, height=0.6)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.axvline(1, color=QUIET, linewidth=1)
    ax.invert_yaxis()
    ax.set(title=f"Tokens per CPU second, as multiples of {record['their_engine']}", xlim=(0, 1.15 * max(*ratios, 1)))


def roofline(ax: Axes, record: dict[str, Any]) -> None:
    """What calls reach, by FLOPs for each byte, under what the device reached."""
    most, rows = record["ceilings"], [row for row in record["rows"] if row["us"] and row["flops"]]
    colours = {"fp8": OURS, "bf16": OTHER, "f32": QUIET}
    for kind, colour in colours.items():
        points = [(row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e6) for row in rows if row["kind"] == kind]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, label=f"{kind} (measured)")
            ends = [0.1, most[kind] / most["memory"], 1e5]
            ax.plot(ends, [min(x * most["memory"], most[kind]) / 1e12 for x in ends], color=colour, linewidth=1)
    ax.set(xscale="log", yscale="log", title=record["device"], xlabel="FLOPs for each byte (computed)",
           ylabel="TFLOP/s")  # fmt: skip
    if rows:
        ax.legend()


PLOTS: dict[str, tuple[str, Draw]] = {
    "frontier-prefill.svg": ("frontier", prefill_rate),
    "frontier-decode.svg": ("frontier", decode_rate),
    "frontier-memory.svg": ("frontier", memory),
    "peers.svg": ("peers", peers),
    "kernels-gpu.svg": ("kernels_gpu", roofline),
}


def short(tokens: float) -> str:
    """131072 as 128K, 1048576 as 1M."""
    if tokens >= 1 << 20 and tokens % (1 << 20) == 0:
        return f"{int(tokens) >> 20}M"
    return f"{tokens / 1024:.0f}K" if tokens >= 1024 else f"{tokens:.0f}"


def _ticks(ax: Axes, last: int, parts: int, label: str) -> None:
    at = [last * i // parts for i in range(parts + 1)]
    ax.set_xticks(at, [short(x) for x in at])
    ax.set_xlabel(label)


def _draw(draw: Draw, record: dict[str, Any], path: Path) -> Path:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        draw(figure.subplots(), record)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    return path
