"""What the user wants of a generation."""

from __future__ import annotations

import dataclasses
import math

from pyrosome.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Raises:
        RequestError: a field is of a wrong type or outside its range; the message names it.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0: the most probable token
    top_p: float = 1.0  # smallest set of tokens with this much probability
    top_k: int = 0  # the k most probable; 0: all
    min_p: float = 0.0  # tokens of at least this share of the most probable one's probability
    presence_penalty: float = 0.0  # subtracted once from tokens already generated
    frequency_penalty: float = 0.0  # subtracted for each time a token was generated
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or output, multiplies negative ones
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # report this many top tokens besides the chosen one
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        require_integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, open_below=True)
        require_integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        if self.seed is not None:
            require_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            require_integer("logprobs", self.logprobs, 0, 100)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; true or false was expected")
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids, int))
        object.__setattr__(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, str))
        if "" in self.stop:
            raise RequestError("stop holds an empty string, which every text contains; leave it out")


def require_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is no integer from `low` to `high`.

    Raises:
        RequestError: naming `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" to {high}"
        raise RequestError(f"{name} is {value!r}; an integer from {low}{upper} was expected")


def _number(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (open_below and value == low):  # type: ignore[operator]
        lowest = f"above {low}" if open_below else f"from {low}"
        raise RequestError(f"{name} is {value!r}; a number {lowest} to {high} was expected")


def _items(name: str, values: object, kind: type) -> tuple[object, ...]:
    if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise RequestError(f"{name} is {values!r}; a list of {kind.__name__} was expected")
    return tuple(values)
