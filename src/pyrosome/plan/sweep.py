"""The frontier: for each machine and context, how many sessions there is room for, how fast and at what price."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pyrosome.errors import RequestError
from pyrosome.plan.hardware import Machine
from pyrosome.plan.plan import Asked, Band, Plan
from pyrosome.plan.planner import make_plans

CONTEXTS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
MAX_POINTS = 400  # of a sweep; each is planned in every mode

Planner = Callable[[Asked], list[Plan]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One machine at one context, as full as it gets.  Dollars are None where no price is known."""

    machine: str  # "h200:2"
    context: int
    sessions: int  # 0: it does not fit
    mode: str
    decode_tok_s: Band | None  # of one session, with all of them running
    total_tok_s: Band | None
    usd_hour: float | None
    usd_session_hour: float | None
    why_not: str = ""
    on_frontier: bool = False  # no other machine holds as many sessions of this context for less, or more for as much


def contexts_up_to(most: int, least: int = 0) -> tuple[int, ...]:
    """Contexts that a sweep looks at, from `least` on, the model's own longest one last."""
    return (*(c for c in CONTEXTS if least <= c < most), most)


def sweep(
    asked: Asked, machines: Sequence[tuple[str, Machine]], contexts: Sequence[int], planner: Planner = make_plans
) -> list[Point]:
    """Every machine at every context, by machine and then by context.

    Args:
        asked: all else that is asked for; its machine, context and sessions are replaced.
        machines: each under the name it is shown by.

    Raises:
        RequestError: nothing to sweep over, or too much.
    """
    num_points = len(machines) * len(contexts)
    if not 1 <= num_points <= MAX_POINTS:
        raise RequestError(
            f"a sweep of {len(machines)} machines at {len(contexts)} contexts has {num_points:,} points; "
            f"1 to {MAX_POINTS} were expected: name fewer with --gpu, or fewer contexts"
        )
    points = [
        _point(dataclasses.replace(asked, machine=machine, context=context), name, planner)
        for name, machine in machines
        for context in contexts
    ]
    return [dataclasses.replace(p, on_frontier=_is_best(p, points)) for p in points]


def _point(asked: Asked, name: str, planner: Planner) -> Point:
    """One machine filled: planned for few sessions to see how many there is room for, then for all of them."""
    empty = planner(dataclasses.replace(asked, sessions=max(1, asked.prefilling)))
    roomiest = max(empty, key=lambda p: p.sessions.decoding if p.fits else -1)
    if not roomiest.fits or not roomiest.sessions.decoding:
        price = asked.machine.price_usd_hour
        return Point(name, asked.context, 0, "", None, None, price, None, roomiest.why_not)
    full = planner(dataclasses.replace(asked, sessions=roomiest.sessions.decoding, mode=roomiest.mode))[0]
    speed, cost = full.speed, full.cost
    return Point(
        name,
        asked.context,
        roomiest.sessions.decoding,
        roomiest.mode,
        speed.decode_tok_s if speed else None,
        speed.total_tok_s if speed else None,
        cost.hour if cost else None,
        cost.hour / roomiest.sessions.decoding if cost else None,
    )


def _is_best(point: Point, points: Sequence[Point]) -> bool:
    if not point.sessions or point.usd_hour is None:
        return False
    return not any(_beats(other, point) for other in points if other.context == point.context)


def _beats(one: Point, other: Point) -> bool:
    """Whether `one` has no fewer sessions for no more dollars, and is better in one of the two."""
    if one.usd_hour is None or other.usd_hour is None:
        return False
    no_worse = one.sessions >= other.sessions and one.usd_hour <= other.usd_hour
    return no_worse and (one.sessions, one.usd_hour) != (other.sessions, other.usd_hour)
