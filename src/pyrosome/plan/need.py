"""The question the other way round: what is needed, and which machines of a price list give it for least."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from pyrosome.errors import RequestError
from pyrosome.plan.hardware import Machine
from pyrosome.plan.plan import Asked, Band, Plan
from pyrosome.plan.planner import make_plans
from pyrosome.plan.quantities import show_dollars, tokens
from pyrosome.plan.words import figure

FORM = (
    "parts in any order, with commas between: sessions (20 users), context (128K), and, where they matter, speed "
    "(30 tok/s each, or 600 tok/s total), first token (first token in 20 s) and a limit ($5/h, or $3000/month); "
    'for example "20 users, 128K, 30 tok/s each"'
)
MONTH_HOURS = 730
MAX_SESSIONS = 1_000_000
_NUMBER = r"(?P<n>\d[\d,]*(?:\.\d+)?|\.\d+)"
_RATE = r"(?:tok(?:en)?s?(?:/s(?:ec)?|/second| ?per second| a second)|t/s|tps)"
_LEAST = r"(?:at least |>=? ?|min(?:imum)? )?"
_MOST = r"(?:at most |up to |under |below |less than |within |<=? ?|max(?:imum)? )?"
_FIELDS = (
    ("sessions", rf"{_LEAST}{_NUMBER} ?(?:concurrent |parallel )?(?:users?|sessions?|people|clients?|seats?|at once)"),
    ("tok_s", rf"{_LEAST}{_NUMBER} ?{_RATE}(?: each| per (?:user|session|client)| a (?:user|session))?"),
    ("total_tok_s", rf"{_LEAST}{_NUMBER} ?{_RATE} (?:in )?(?:total|together|overall|for all)"),
    ("usd_month", rf"{_MOST}(?:\$|usd) ?{_NUMBER} ?(?:/|per |a )(?:mo|month)"),
    ("usd_month", rf"{_MOST}{_NUMBER} ?(?:\$|usd|dollars?) ?(?:/|per |a )(?:mo|month)"),
    ("usd_hour", rf"{_MOST}(?:\$|usd) ?{_NUMBER} ?(?:/|per |an )(?:h|hr|hour)"),
    ("usd_hour", rf"{_MOST}{_NUMBER} ?(?:\$|usd|dollars?) ?(?:/|per |an )(?:h|hr|hour)"),
    ("first_token_s", rf"(?:first token|ttft) (?:in |after |within )?{_MOST}{_NUMBER} ?s(?:ec(?:onds?)?)?"),
    ("first_token_s", rf"{_MOST}{_NUMBER} ?s(?:ec(?:onds?)?)? (?:to )?(?:first token|ttft)"),
    ("context", r"(?:context |of )?(?P<n>\d[\d,.]*(?: ?[km]i?)?)(?: tok(?:en)?s?)?(?: of)?(?: context)?(?: each)?"),
)
_PARTS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _FIELDS]
_TITLES = {
    "sessions": "how many sessions", "context": "the context", "tok_s": "the speed of each", "total_tok_s": "all speed",
    "usd_hour": "the price", "first_token_s": "the first token",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What a deployment must give.  0 and infinity: not asked for."""

    sessions: int
    context: int
    tok_s: float = 0.0  # of each session
    total_tok_s: float = 0.0
    first_token_s: float = math.inf
    usd_hour: float = math.inf

    def __str__(self) -> str:
        parts = [f"{self.sessions:,} sessions of {self.context:,} tokens"]
        if self.tok_s:
            parts.append(f"{self.tok_s:,g} tok/s each")
        if self.total_tok_s:
            parts.append(f"{self.total_tok_s:,g} tok/s together")
        if self.first_token_s < math.inf:
            parts.append(f"the first token within {self.first_token_s:,g} s")
        if self.usd_hour < math.inf:
            parts.append(f"{show_dollars(self.usd_hour)} an hour at most")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Offer:
    """One configuration of a price list, and what it gives."""

    name: str
    machine: Machine
    plan: Plan
    lacks: tuple[str, ...]  # (): it meets the need by the middle of each band
    surely: bool  # and by the worse end of each
    shortfall: float  # the greatest ratio of what is needed to what is there; 1 or less where nothing lacks


def parse(text: str) -> Need:
    """Read a need.

    Raises:
        RequestError: a part is not understood, or said twice, or sessions or context are missing.
    """
    found: dict[str, float] = {}
    for part in _split(text):
        name, value = _understood(part, text)
        if name in found:
            raise RequestError(f"--need {text!r} says {_TITLES[name]} twice; say it once")
        found[name] = value
    missing = [_TITLES[name] for name in ("sessions", "context") if name not in found]
    if missing:
        raise RequestError(f"--need {text!r} does not say {' and '.join(missing)}; what is understood: {FORM}")
    return Need(int(found.pop("sessions")), int(found.pop("context")), **found)


def _split(text: str) -> list[str]:
    """Parts, at commas that are not inside a number, and at words that join."""
    cut = re.split(r"(?<!\d),|,(?!\d{3}(?!\d))|;|\+|\b(?:and|with|at(?! once| least| most)|of(?= \d))\b", text.lower())
    return [" ".join(part.split()) for part in cut if part.strip()]


def _understood(part: str, text: str) -> tuple[str, float]:
    for name, pattern in _PARTS:
        if match := pattern.fullmatch(part):
            return _value(name, match["n"], text)
    raise RequestError(f"--need {text!r}: {part!r} was not understood; what is understood: {FORM}")


def _value(name: str, number: str, text: str) -> tuple[str, float]:
    if name == "context":
        return name, tokens(number.replace(" ", ""), "--need")
    value = float(number.replace(",", ""))
    if not 0 < value < 1e12 or (name == "sessions" and not (value.is_integer() and value <= MAX_SESSIONS)):
        form = f"a whole number from 1 to {MAX_SESSIONS:,}" if name == "sessions" else "a number above 0"
        raise RequestError(f"--need {text!r}: {_TITLES.get(name, 'the price')} is {number}; {form} was expected")
    return ("usd_hour", value / MONTH_HOURS) if name == "usd_month" else (name, value)


def offers(
    need: Need,
    asked: Asked,
    machines: Sequence[tuple[str, Machine]],
    planner: Callable[[Asked], list[Plan]] = make_plans,
) -> list[Offer]:
    """Every configuration with the best of its modes: those that meet the need first, the cheapest of them first.

    Those that do not meet it follow, the nearest first.

    Args:
        asked: all else that is asked for; its machine, sessions and context are replaced.
        machines: each under its name, with its price.

    Raises:
        RequestError: there is no configuration, or the model has no such context.
    """
    if not machines:
        raise RequestError("a need is met from a price list, and there is no configuration in it; name one: --prices")
    found = []
    for name, machine in machines:
        wanted = dataclasses.replace(asked, machine=machine, sessions=need.sessions, context=need.context)
        found.append(min((_offer(need, name, machine, plan) for plan in planner(wanted)), key=_order))
    return sorted(found, key=_order)


def _order(offer: Offer) -> tuple[float, float, float]:
    price = offer.machine.price_usd_hour
    total = offer.plan.speed.total_tok_s.mid if offer.plan.speed else 0.0
    nearness = offer.shortfall if offer.lacks else 0.0
    return nearness, math.inf if price is None else price, -total


def _offer(need: Need, name: str, machine: Machine, plan: Plan) -> Offer:
    wants = [_dollars(need, machine.price_usd_hour), *_figures(need, plan)]
    return Offer(
        name,
        machine,
        plan,
        tuple(w.lacks for w in wants if w.lacks),
        all(w.surely for w in wants),
        max(w.ratio for w in wants),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Want:
    """One part of a need beside what there is of it."""

    ratio: float  # of what is needed to what is there; above 1 it lacks
    lacks: str = ""
    surely: bool = True


def _dollars(need: Need, price: float | None) -> _Want:
    if need.usd_hour == math.inf:
        return _Want(0.0)
    if price is None:
        return _Want(math.inf, "its price is not known", surely=False)
    if price <= need.usd_hour:
        return _Want(price / need.usd_hour)
    lacks = f"{show_dollars(price)}/h is {show_dollars(price - need.usd_hour)} too much"
    return _Want(price / need.usd_hour, lacks, surely=False)


def _figures(need: Need, plan: Plan) -> list[_Want]:
    speed = plan.speed
    if not plan.fits or speed is None:
        room = plan.sessions.decoding
        if 0 < room < need.sessions:
            return [_Want(need.sessions / room, f"holds {room:,} of {need.sessions:,} sessions", surely=False)]
        return [_Want(math.inf, plan.why_not, surely=False)]
    found = [
        _at_least(need.tok_s, speed.decode_tok_s, "tok/s each"),
        _at_least(need.total_tok_s, speed.total_tok_s, "tok/s together"),
    ]
    first = speed.first_token_s
    if need.first_token_s < math.inf:
        late = f"first token after about {figure(first.mid)} s, not {figure(need.first_token_s)}"
        is_late = first.mid > need.first_token_s
        found.append(
            _Want(first.mid / need.first_token_s, late if is_late else "", surely=first.high <= need.first_token_s)
        )
    return found


def _at_least(wanted: float, there: Band, what: str) -> _Want:
    if not wanted:
        return _Want(0.0)
    lacks = f"about {figure(there.mid)} {what}, not {figure(wanted)}" if there.mid < wanted else ""
    return _Want(wanted / there.mid if there.mid else math.inf, lacks, surely=there.low >= wanted)
