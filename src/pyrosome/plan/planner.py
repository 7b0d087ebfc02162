"""From what is asked to plans: places, sessions, speed and cost, modes ranked."""

from __future__ import annotations

from pyrosome.plan.plan import Asked, Plan


def make_plan(asked: Asked) -> Plan:
    """The plan of the asked mode; with "auto" the best of `make_plans`.

    Raises:
        RequestError: nonsense; the message names the field.
    """
    return make_plans(asked)[0]


def make_plans(asked: Asked) -> list[Plan]:
    """A plan for each mode, the best first: those that fit by sessions per dollar, then tokens per dollar."""
    raise NotImplementedError
