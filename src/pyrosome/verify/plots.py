"""Plots of a receipt as inline SVG, drawn by what is here: no script, no font and no picture from elsewhere.

Colours are the page's (`var(--...)`), so that a plot follows its light and dark themes and prints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 260  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 48
TURNED = 100  # room at the bottom for labels that are too long to stand beside each other
MAX_POINTS = 4000  # of one series
MAX_SERIES = 6  # as many as there are colours
MAX_LABEL, MIN_SHARED = 22, 6  # characters
_LETTER = 6.2  # width of one, about


def shown(text: str) -> str:
    """Text of strangers as HTML shows it: escaped, and without characters that control how it is shown."""
    return escape("".join(c if c.isprintable() else "·" for c in text))


def drawn(plot: dict[str, Any]) -> str:
    """One plot as a <figure>, or "" where it holds nothing that can be drawn.

    Args:
        plot: as `finding.Finding` says; values that are no finite numbers (or no positive ones on a logarithmic scale)
            are left out.
    """
    series = {str(n): _numbers(v) for n, v in list(dict(plot.get("series") or {}).items())[:MAX_SERIES]}
    x = list(plot.get("x") or [])[:MAX_POINTS]
    log = bool(plot.get("log"))
    bound = _number(plot.get("bound"))
    intervals = [_numbers(v) for key in ("low", "high") for v in dict(plot.get(key) or {}).values()]
    everything = [v for values in (*series.values(), *intervals, [bound]) for v in values]
    seen = [v for v in everything if v is not None and _fits(v, log)]
    if not x or not any(_fits(v, log) for values in series.values() for v in values):
        return ""
    is_bars = plot.get("kind") == "bars"
    labels, shared = _labels(x)
    floor = HEIGHT - (TURNED if _are_long(labels, is_bars) else BOTTOM)
    scale = _Scale(seen, log, floor, zero=is_bars and not log)
    places = _places(x, is_bars)
    parts = [_axes(scale, labels, places, {**plot, "x_title": plot.get("x_title") or shared})]
    draw = _bars if is_bars else _lines
    for at, (name, values) in enumerate(series.items()):
        low, high = (_numbers(dict(plot.get(key) or {}).get(name)) for key in ("low", "high"))
        parts.append(draw(scale, places, values, low, high, at, len(series)))
    if bound is not None and _fits(bound, log):
        parts.append(_bound(scale, bound))
    title = shown(str(plot.get("title", "")))
    legend = (
        "".join(f'<span class="key s{i}">{shown(n)}</span>' for i, n in enumerate(series)) if len(series) > 1 else ""
    )
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg>{f'<p class=legend>{legend}</p>' if legend else ''}</figure>"
    )


class _Scale:
    """Values to heights."""

    def __init__(self, values: Sequence[float], log: bool, bottom: float, zero: bool) -> None:
        self.log, self.bottom = log, bottom
        low, high = min(values), max(values)
        if log:
            self.low, self.high = float(math.floor(math.log10(low))), float(math.ceil(math.log10(high)))
            self.low -= 10**self.low == low  # the least bar has a height too
            self.high += self.high == self.low
            step = max(1, (self.high - self.low) // 5)
            self.ticks = [10.0**e for e in range(int(self.low), int(self.high) + 1, int(step))]
            return
        low = min(low, 0.0) if zero else low
        if low == high:
            low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
        step = _round_step((high - low) / 5)
        self.low, self.high = math.floor(low / step) * step, math.ceil(high / step) * step
        self.ticks = [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]

    def y(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return TOP + (self.bottom - TOP) * (1 - (at - self.low) / (self.high - self.low))

    @property
    def floor(self) -> float:
        return self.bottom if self.log or self.low >= 0 else self.y(0.0)


def _labels(x: list[Any]) -> tuple[list[str], str]:
    """(labels without the words that all of them begin with, those words)"""
    labels = [_told(v) if isinstance(v, float) else str(v) for v in x]
    first, last = min(labels), max(labels)  # what these two begin with, all between them do
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:same].rpartition(" ")[0]
    if len(labels) > 1 and len(shared) >= MIN_SHARED:
        labels = [label[len(shared) :].strip() for label in labels]
    else:
        shared = ""
    return [label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…" for label in labels], shared


def _are_long(labels: list[str], is_bars: bool) -> bool:
    """Whether labels would overlap, standing beside each other: numbers of a line are left out, names are turned."""
    if not is_bars and all(label.lstrip("-").replace(".", "").isdigit() for label in labels):
        return False
    return max(map(len, labels)) > 4 and max(map(len, labels)) * _LETTER > (WIDTH - LEFT - RIGHT) / len(labels)


def _axes(scale: _Scale, labels: list[str], places: list[float], plot: dict[str, Any]) -> str:
    parts = []
    for tick in scale.ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        told = _told(tick, scale.log)
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{told}</text>')
    is_turned = scale.bottom < HEIGHT - BOTTOM
    room = 12.0 if is_turned else (max(map(len, labels)) + 1) * _LETTER
    every = max(1, math.ceil(room * len(labels) / (WIDTH - LEFT - RIGHT)))
    for label, place in list(zip(labels, places, strict=True))[::every]:
        x, y = f"{place:.1f}", scale.bottom + (10 if is_turned else 14)
        how = f'text-anchor="end" transform="rotate(-40 {x} {y})"' if is_turned else 'text-anchor="middle"'
        parts.append(f'<text class="tick" x="{x}" y="{y}" {how}>{shown(label)}</text>')
    middle, x_title = (LEFT + WIDTH - RIGHT) / 2, shown(str(plot.get("x_title", "")))
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{x_title}</text>')
    turned = f'transform="rotate(-90 12 {(scale.bottom + TOP) / 2})"'
    parts.append(
        f'<text class="axis" x="12" y="{(scale.bottom + TOP) / 2}" text-anchor="middle" {turned}>'
        f"{shown(str(plot.get('y_title', '')))}</text>"
    )
    return "".join(parts)


def _places(x: list[Any], bars: bool) -> list[float]:
    """Where on the width each x is: numbers to scale, labels one beside the other."""
    room = WIDTH - LEFT - RIGHT
    numbers = [_number(v) for v in x]
    if bars or any(n is None for n in numbers) or len(set(numbers)) < 2:
        return [LEFT + room * (i + 0.5) / len(x) for i in range(len(x))]
    low, high = min(n for n in numbers if n is not None), max(n for n in numbers if n is not None)
    return [LEFT + 8 + (room - 16) * ((n or 0.0) - low) / (high - low) for n in numbers]


def _bars(
    scale: _Scale, places: list[float], values: list[float | None], low: list[float | None], high: list[float | None],
    at: int, num: int,
) -> str:  # fmt: skip
    room = (WIDTH - LEFT - RIGHT) / len(places)
    width = max(0.5, room * 0.8 / num)
    parts = []
    for place, value in zip(places, values, strict=False):
        left = place - room * 0.4 + at * width
        if value == 0 and scale.log:  # which such a scale has no place for
            x, y = left + width / 2, scale.floor - 4
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">0</text>')
        if not _fits(value, scale.log):
            continue
        y = scale.y(value)  # type: ignore[arg-type]
        top, height = min(y, scale.floor), abs(scale.floor - y)
        parts.append(f'<rect class="s{at}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
    centres = [p - room * 0.4 + (at + 0.5) * width for p in places]
    return "".join(parts) + _whiskers(scale, centres, low, high)


def _lines(
    scale: _Scale, places: list[float], values: list[float | None], low: list[float | None], high: list[float | None],
    at: int, num: int,
) -> str:  # fmt: skip
    runs: list[list[str]] = [[]]
    dots = []
    for place, value in zip(places, values, strict=False):
        if not _fits(value, scale.log):
            runs.append([])
            continue
        runs[-1].append(f"{place:.1f},{scale.y(value):.1f}")  # type: ignore[arg-type]
        dots.append(f'<circle class="s{at}" cx="{place:.1f}" cy="{scale.y(value):.1f}" r="2.6"/>')  # type: ignore[arg-type]
    paths = "".join(f'<polyline class="l{at}" points="{" ".join(r)}"/>' for r in runs if len(r) > 1)
    return paths + ("".join(dots) if len(dots) <= 200 else "") + _whiskers(scale, places, low, high)


def _whiskers(scale: _Scale, places: list[float], low: list[float | None], high: list[float | None]) -> str:
    return "".join(
        f'<line class="span" x1="{p:.1f}" x2="{p:.1f}" y1="{scale.y(a):.1f}" y2="{scale.y(b):.1f}"/>'  # type: ignore[arg-type]
        for p, a, b in zip(places, low, high, strict=False)
        if _fits(a, scale.log) and _fits(b, scale.log)
    )


def _bound(scale: _Scale, bound: float) -> str:
    y = scale.y(bound)
    return (
        f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="bound" x="{WIDTH - RIGHT - 4}" y="{y - 4 if y > TOP + 12 else y + 12:.1f}" text-anchor="end">'
        f"allowed: {_told(bound)}</text>"
    )


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _told(value: float, log: bool = False) -> str:
    if log:
        return f"1e{round(math.log10(value))}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2g}"


def _numbers(values: Any) -> list[float | None]:
    return [_number(v) for v in list(values)[:MAX_POINTS]] if isinstance(values, list | tuple) else []


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _fits(value: float | None, log: bool) -> bool:
    return value is not None and (value > 0 or not log)
