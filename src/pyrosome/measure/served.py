"""A server's rates, as its engine counted them, beside what the planner predicts for the same load."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyrosome.engine.stats import Stats
from pyrosome.errors import PlanError, RequestError
from pyrosome.plan import history
from pyrosome.plan.hardware import Machine, machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Band
from pyrosome.plan.speed import coefficients_for, step_time
from pyrosome.plan.work import Load

LEAST_STEPS, LEAST_SECONDS = 8, 0.05  # of decoding; less says nothing


def told_after(stats: Stats | None, model: Model, kv_format: str, here: Machine | None = None) -> list[str]:
    """A line for decoding and one for prompts: measured beside predicted.  Both figures are kept in the history.

    Rates are of all sequences together, in tokens that went through the network, drafts included.  What was too short
    to say anything is left out, and so is everything where no prediction can be made.
    """
    if stats is None:
        return []
    kinds: tuple[tuple[str, Mapping[str, float], int], ...] = (
        ("decoding", stats.decode_sums, LEAST_STEPS),
        ("prompts", stats.prompt_sums, 1),
    )
    lines = []
    for name, sums, least in kinds:
        if sums.get("steps", 0) < least or sums["seconds"] < LEAST_SECONDS:
            continue
        try:
            here = here or machine("here")
            lines.append(_told(name, sums, model, kv_format, here))
        except (PlanError, RequestError) as error:
            lines.append(f"{name}: no prediction to compare with: {error}")
    return lines


def _told(name: str, sums: Mapping[str, float], model: Model, kv_format: str, here: Machine) -> str:
    measured = sums["tokens"] / sums["seconds"]
    band, source = predicted(sums, model, kv_format, here)
    history.keep(f"serve, {name}, tok/s", band.mid, measured, here.device.title)
    sequences, context = sums["spans"] / sums["steps"], sums["positions"] / sums["spans"]
    return (
        f"{name}: {measured:,.1f} tok/s measured, {band.mid:,.1f} predicted ({band.low:,.1f} to {band.high:,.1f}), "
        f"with {sequences:.1f} sequences of {context:,.0f} tokens in a step; {source}"
    )


def predicted(sums: Mapping[str, float], model: Model, kv_format: str, here: Machine) -> tuple[Band, str]:
    """Tokens per second of steps like those that were counted, on one device; and what that is based on.

    Raises:
        PlanError: a rate of this machine is not known.
    """
    c = coefficients_for(here)
    one = Layout.of("tp", 1)
    each, tokens = sums["spans"] / sums["steps"], max(1, round(sums["tokens"] / sums["spans"]))
    context = round(sums["positions"] / sums["spans"])
    few, many = math.floor(each), math.ceil(each)
    seconds = [
        step_time(model, here, one, Placement(), Load(n, tokens, context, kv_format), c).seconds for n in (few, many)
    ]
    mean = seconds[0] + (each - few) * (seconds[1] - seconds[0])
    rate = sums["tokens"] / sums["steps"] / mean
    low, high = c.band
    return Band(rate / high, rate, rate / low), c.source
