"""What it costs: by the hour, by the session, by the token.

Conventions, since one machine's bill is divided among what it computes:
- a prompt token that has to be computed costs the time in which the whole machine computes it; replicas, which have
  sessions of their own, compute as many prompts at once;
- an output token costs its share of a step in which all sessions decode;
- a cached token costs memory, not time: its share of the history there is room for, for as long as a turn lasts (its
  prompt and its answer).
Speeds are bands, so prices are: the fastest end of one is the cheapest end of the other.
"""

from __future__ import annotations

from pyrosome.plan.plan import Asked, Band, Cost, Sessions, Speed

MONTH_HOURS = 730
MILLION = 1_000_000


def cost_of(asked: Asked, sessions: Sessions, speed: Speed, replicas: int = 1) -> Cost | None:
    """What a plan costs at the asked load; None where the machine's price is not known.

    Args:
        replicas: groups of devices that each compute prompts at the speed's rate.
    """
    hour = asked.machine.price_usd_hour
    if hour is None:
        return None
    second = hour / 3600
    held = max(1, sessions.decoding) * asked.context  # tokens of history that there is room for
    turn = _plus(speed.first_token_s, _times(asked.output, _inverse(speed.decode_tok_s)))
    return Cost(
        hour=hour,
        month=hour * MONTH_HOURS,
        session_hour=hour / asked.sessions,
        million_in=_times(second * MILLION / replicas, _inverse(speed.prefill_tok_s)),
        million_cached=_times(second * MILLION / held, turn),
        million_out=_times(second * MILLION, _inverse(speed.total_tok_s)),
    )


def turn_cost(asked: Asked, cost: Cost) -> Band:
    """Dollars of one turn: what of its context is not cached yet is computed, and `output` tokens answer."""
    computed = asked.prompt or asked.context
    parts = (
        (computed, cost.million_in),
        (asked.context - computed, cost.million_cached),
        (asked.output, cost.million_out),
    )
    total = Band(0.0, 0.0, 0.0)
    for tokens, price in parts:
        total = _plus(total, _times(tokens / MILLION, price))
    return total


def _inverse(band: Band) -> Band:
    return Band(1 / band.high, 1 / band.mid, 1 / band.low)


def _times(factor: float, band: Band) -> Band:
    return Band(factor * band.low, factor * band.mid, factor * band.high)


def _plus(a: Band, b: Band) -> Band:
    return Band(a.low + b.low, a.mid + b.mid, a.high + b.high)
