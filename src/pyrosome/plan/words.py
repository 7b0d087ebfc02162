"""A plan in words and columns: what a table, a server's start and an error say of it.  Plain text, no terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pyrosome.plan.plan import Band, Cost, Place, Plan
from pyrosome.plan.quantities import show_bytes, show_dollars

MEANING = {
    "tp": "every large matrix is split; history is whole on each device",
    "pp": "layers are dealt out; history lies with its layer",
    "ep": "routed experts are dealt out; each device has sessions of its own",
    "dp": "each device holds the whole model and sessions of its own",
    "cp": "routed experts are dealt out; each session's history is split",
}
KINDS = {
    "weights": "weights",
    "kv": "history, stored",
    "state": "state, stored",
    "reserve": "reserves",
    "workspace": "workspace",
    "system": "system",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """Places that hold the same, side by side as one."""

    title: str
    count: int
    place: Place


def columns(places: Sequence[Place]) -> list[Column]:
    """One column for each sort of place, in the order they come: alike neighbours are one, "h200 0-3"."""
    groups: list[list[Place]] = []
    for place in places:
        last = groups[-1][-1] if groups else None
        alike = last is not None and (last.total_bytes, last.items) == (place.total_bytes, place.items)
        if alike:
            groups[-1].append(place)
        else:
            groups.append([place])
    return [Column(_titled(group), len(group), group[0]) for group in groups]


def _titled(group: list[Place]) -> str:
    first, last = group[0].name, group[-1].name.rpartition(" ")[2]
    return first if len(group) == 1 else f"{first}-{last}"


def rows(shown: Sequence[Column]) -> list[tuple[str, list[tuple[str, list[int]]]]]:
    """(kind, [(name, bytes in each column)]) of everything that is placed: kinds in one order, large parts first."""
    found: dict[str, dict[str, list[int]]] = {}
    for i, column in enumerate(shown):
        for item in column.place.items:
            amounts = found.setdefault(item.kind, {}).setdefault(item.name, [0] * len(shown))
            amounts[i] += item.num_bytes
    order = [*KINDS, *(kind for kind in found if kind not in KINDS)]
    held = {kind: sorted(found.get(kind, {}).items(), key=lambda part: -max(part[1])) for kind in order}
    held = {kind: [(name, amounts) for name, amounts in parts if any(amounts)] for kind, parts in held.items()}
    return [(KINDS.get(kind, kind), parts) for kind, parts in held.items() if parts]


def figure(x: float) -> str:
    """A number that is an estimate: two digits that mean something, and no more."""
    if not math.isfinite(x):
        return "-"
    if x == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(x)))
    rounded = round(x, digits)
    return f"{rounded:,.{max(0, digits)}f}" if rounded < 10 else f"{rounded:,.0f}"


def band(b: Band, *, prefix: str = "") -> str:
    """From its low to its high end; the middle, where a table has room, stands beside it."""
    low, high = figure(b.low), figure(b.high)
    return f"{prefix}{low}" if low == high else f"{prefix}{low}-{high}"


def cost_line(cost: Cost) -> str:
    """Dollars by time."""
    return (
        f"{show_dollars(cost.hour)} an hour, {show_dollars(cost.month)} a month of 730 hours, "
        f"{show_dollars(cost.session_hour)} for an hour of one session"
    )


def ranked(plan: Plan) -> tuple[str, ...]:
    """A line of a ranking, of a plan that fits.

    Mode, room for sessions, tok/s of one and of all as asked, dollars per session-hour when full and per million out.
    """
    s = plan.speed
    each, together = (band(s.decode_tok_s), band(s.total_tok_s)) if s else ("-", "-")
    room = plan.sessions.decoding
    hour = show_dollars(plan.cost.hour / room) if plan.cost and room else "-"
    million = band(plan.cost.million_out, prefix="$") if plan.cost else "-"
    return plan.mode, f"{room:,}", each, together, hour, million


def short(plan: Plan) -> list[str]:
    """Two or three lines for the start of a server that replays a plan."""
    asked = plan.asked
    several = asked["machine"]["count"] > 1
    lines = [
        f"Plan: {asked['sessions']:,} sessions of {asked['context']:,} tokens{f' by {plan.mode}' if several else ''}; "
        f"there is room for {plan.sessions.decoding:,}, each {show_bytes(plan.sessions.device_bytes)}."
    ]
    if plan.speed:
        s = plan.speed
        lines.append(
            f"Predicted: {band(s.decode_tok_s)} tok/s for each of them, {band(s.prefill_tok_s)} tok/s of prompt; "
            f"limited by {s.limit} ({s.source})."
        )
    if not plan.fits:
        lines.append(f"It does not fit: {plan.why_not}. {plan.change}")
    return lines
