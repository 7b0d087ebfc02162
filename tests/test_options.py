"""SamplingParams: what is taken, what is refused, and that a refusal names its field."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams

INTEGERS = {
    "max_tokens": (1, None), "top_k": (0, None), "seed": (-(2**63), 2**64 - 1), "logprobs": (0, 100), "n": (1, 128),
    "max_thinking_tokens": (0, None), "max_repeats": (2, None), "prompt_logprobs": (0, 100),
    "min_tokens": (0, None),
}  # fmt: skip
NUMBERS = {  # lowest, highest, whether the lowest is itself refused
    "temperature": (0, 100, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0, 100, True),
}


def refusal(**values) -> str:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    return str(caught.value)


def test_defaults_are_the_model_s_own_distribution():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 256, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": None, "stop_token_ids": (), "stop": (),
        "logprobs": None, "ignore_eos": False, "n": 1, "max_thinking_tokens": None, "max_repeats": None,
        "prompt_logprobs": None, "min_tokens": 0,
    }  # fmt: skip


def test_every_numeric_field_has_a_range_here():
    kinds = {f.name: f.type for f in dataclasses.fields(SamplingParams)}
    assert {n for n, kind in kinds.items() if "float" in kind} == set(NUMBERS)
    assert {n for n, kind in kinds.items() if kind in ("int", "int | None")} == set(INTEGERS)


@pytest.mark.parametrize(("name", "low", "high"), [(n, *r) for n, r in INTEGERS.items()])
def test_integers_within_their_range(name, low, high):
    top = 10**12 if high is None else high
    for value in (low, low + 1, top):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - 1, *([] if high is None else [high + 1])):
        assert refusal(**{name: value}).startswith(f"{name} is {value};")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, 1.0, "1", [1], float("nan")], ids=repr)
def test_what_is_no_integer(name, value):
    assert f"{name} is {value!r}; an integer from" in refusal(**{name: value})


@pytest.mark.parametrize(("name", "low", "high", "open_below"), [(n, *r) for n, r in NUMBERS.items()])
def test_numbers_within_their_range(name, low, high, open_below):
    least = math.nextafter(low, high) if open_below else low
    for value in (least, (low + high) / 2 or 0.5, high, float(high)):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), *([low] if open_below else [])):
        assert refusal(**{name: value}).startswith(f"{name} is {value!r};")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), math.inf, -math.inf, True, "0.5", None, 1j, [0.5]], ids=repr)
def test_what_is_no_finite_number(name, value):
    assert f"{name} is {value!r}; a number" in refusal(**{name: value})


def test_a_stop_string_may_stand_alone_and_lists_become_tuples():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(stop=["a"]) == SamplingParams(stop=("a",))


@pytest.mark.parametrize("value", [None, 3, [3], ["a", None], {"a"}, b"a", [b"a"]], ids=repr)
def test_what_is_no_list_of_stop_strings(value):
    assert refusal(stop=value).startswith("stop is ")


@pytest.mark.parametrize("value", [None, 3, "ab", ["a"], [1.0], [True], {1}], ids=repr)
def test_what_is_no_list_of_stop_ids(value):
    assert refusal(stop_token_ids=value).startswith("stop_token_ids is ")


@pytest.mark.parametrize("value", ["", ["a", ""]], ids=repr)
def test_an_empty_stop_string_would_end_every_text(value):
    assert "empty string" in refusal(stop=value)


@pytest.mark.parametrize("value", [0, 1, None, "false"], ids=repr)
def test_ignore_eos_is_true_or_false(value):
    assert refusal(ignore_eos=value).startswith("ignore_eos is ")


def test_params_are_frozen_comparable_and_checked_when_replaced():
    params = SamplingParams(seed=7, stop=["x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 8
    with pytest.raises((AttributeError, TypeError)):
        params.sede = 8
    assert hash(params) == hash(SamplingParams(seed=7, stop="x"))
    assert dataclasses.replace(params, seed=8) == SamplingParams(seed=8, stop=("x",))
    with pytest.raises(RequestError, match="top_p"):
        dataclasses.replace(params, top_p=0)
    with pytest.raises(TypeError):
        SamplingParams(max_token=5)
