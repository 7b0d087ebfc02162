"""A plan survives its JSON, and what is none is refused with a word on what to do."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pyrosome.errors import PlanError
from pyrosome.plan.inventory import Model
from pyrosome.plan.plan import VERSION, Asked, Plan
from pyrosome.plan.planner import make_plan
from pyrosome.testing.shapes import tiny
from tests.plan.machines import even, gpus

BACKWARDS, BELOW = {"low": 9, "mid": 5, "high": 1}, {"low": -1, "mid": 0, "high": 1}
MODEL = Model.of(tiny(), 1, "bf16")
FITS = make_plan(Asked(MODEL, gpus(1, price=1.5), context=1024, kv_format="f32", sessions=2), even)
SHORT = make_plan(Asked(MODEL, gpus(2, 1600, ram=1 << 30), context=8192, kv_format="f32", sessions=100_000), even)


@pytest.mark.parametrize("plan", [FITS, SHORT], ids=["fits", "does not"])
def test_a_plan_survives_its_json(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert isinstance(again.places[0].items, tuple) and isinstance(again.notes, tuple)


def test_the_two_plans_are_of_two_sorts():
    assert FITS.fits and FITS.speed is not None and FITS.cost is not None
    assert not SHORT.fits and SHORT.speed is None and SHORT.cost is None and SHORT.change


def test_bytes_are_read_as_text_is():
    assert Plan.from_json(FITS.to_json().encode()) == FITS


def changed(**fields) -> str:
    return json.dumps({**json.loads(FITS.to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON object with a version"),
        ("null", "a JSON object with a version"),
        ("{}", "a JSON object with a version"),
        (changed(version=VERSION + 1), f"of version {VERSION + 1} and version {VERSION} is read"),
        (changed(version="1"), "of version '1'"),
        (changed(places=[{"name": 3}]), "str"),
        (changed(places="all"), "array"),
        (changed(fits="yes"), "bool"),
        (changed(mode="warp"), "'warp'"),
        (changed(options={"trace_path": "/etc/passwd"}), "trace_path"),
        (changed(options={**FITS.options, "disk_path": "/"}), "disk_path"),
        (changed(asked={}), "sessions None"),
        (changed(asked={**FITS.asked, "context": -1}), "context -1"),
        (changed(asked={**FITS.asked, "sessions": True}), "sessions True"),
        (changed(asked={**FITS.asked, "machine": 5}), "devices None"),
        (changed(asked={**FITS.asked, "machine": {"count": "2"}}), "devices '2'"),
        (changed(sessions={**dataclasses.asdict(FITS.sessions), "decoding": -3}), "below 0"),
        (changed(speed={**dataclasses.asdict(FITS.speed), "decode_tok_s": [1]}), "object"),
        (changed(speed={**dataclasses.asdict(FITS.speed), "decode_tok_s": BACKWARDS}), "decode_tok_s goes from 9"),
        (changed(cost={**dataclasses.asdict(FITS.cost), "million_in": BELOW}), "million_in goes from -1"),
        (changed(places=[{"name": "x", "total_bytes": -1, "items": []}]), "x holds"),
        (
            changed(places=[{"name": "x", "total_bytes": 1, "items": [{"name": "y", "kind": "z", "num_bytes": 1}]}]),
            "x holds",
        ),
        (json.dumps({"version": VERSION}), "asked"),
        (changed(sessions=None), "object"),
        (changed(cost={"hour": "much"}), "float"),
    ],
)
def test_what_is_no_plan_is_refused_with_what_to_do(text, word):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert word in str(caught.value)
    assert "make it again: pyrosome plan" in str(caught.value)


def test_no_plan_holds_a_number_that_json_has_not():
    odd = dataclasses.replace(FITS, options={"cache_bytes": float("inf")})
    with pytest.raises(ValueError, match="JSON compliant"):
        odd.to_json()
