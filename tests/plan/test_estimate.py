"""Speeds of a plan: bands about the steps' times, and drafts where they pay."""

from __future__ import annotations

import dataclasses

import pytest

from pyrosome.plan import estimate, speed
from pyrosome.plan.estimate import ACCEPTED, estimated
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.plan import Asked
from pyrosome.testing.shapes import tiny
from tests.plan.machines import gpus

MODEL = Model.of(tiny(), 1, "bf16")
ONE = Layout.of("tp", 1)


@pytest.fixture
def clock(monkeypatch):
    """A device on which a plain step takes 10 ms, and one with a draft as long as the test says."""
    taken = {0: 0.010, 1: 0.012}
    loads = []
    band = dataclasses.make_dataclass("Band", ["band", "source"])((0.5, 2.0), "a test")

    def step_time(model, machine, layout, placement, load, coefficients):
        loads.append(load)
        return speed.StepTime(taken[load.drafts], {"experts": taken[load.drafts]}, "memory bandwidth: experts")

    def prompt_time(model, machine, layout, placement, tokens, coefficients, **more):
        loads.append((tokens, more))
        return speed.StepTime(tokens / 1000, {"linear": tokens / 1000}, "arithmetic: linear")

    monkeypatch.setattr(estimate.speed, "coefficients_for", lambda machine: band)
    monkeypatch.setattr(estimate.speed, "step_time", step_time)
    monkeypatch.setattr(estimate.speed, "prompt_time", prompt_time)
    return taken, loads


def asked(**fields) -> Asked:
    return Asked(MODEL, gpus(1), **{"context": 4000, "sessions": 5, "kv_format": "f32", **fields})


def test_without_drafts_a_step_is_a_token_of_each_session(clock):
    _, loads = clock
    found = estimated(asked(drafts=False), ONE, Placement())
    assert (found.decode_tok_s.low, found.decode_tok_s.mid, found.decode_tok_s.high) == pytest.approx((50, 100, 200))
    assert found.total_tok_s.mid == pytest.approx(500)
    assert (loads[0].sequences, loads[0].tokens, loads[0].context, loads[0].drafts) == (5, 1, 3999, 0)
    assert found.limit == "memory bandwidth: experts" and found.source == "a test"


def test_drafts_that_pay_give_a_wider_band(clock):
    found = estimated(asked(), ONE, Placement())
    assert found.decode_tok_s.mid == pytest.approx((1 + ACCEPTED.mid) / 0.012)
    assert found.decode_tok_s.low == pytest.approx((1 + ACCEPTED.low) / 0.024)
    assert found.decode_tok_s.high == pytest.approx((1 + ACCEPTED.high) / 0.006)


def test_drafts_that_do_not_pay_are_not_made(clock):
    clock[0][1] = 0.02
    assert estimated(asked(), ONE, Placement()).decode_tok_s.mid == pytest.approx(100)


@pytest.mark.parametrize(("prompt", "tokens", "cached"), [(0, 4000, 0), (1500, 1500, 2500)])
def test_the_first_token_waits_for_what_is_not_cached(clock, prompt, tokens, cached):
    found = estimated(asked(prompt=prompt, step_tokens=512), ONE, Placement())
    assert clock[1][-1] == (tokens, {"cached": cached, "step_tokens": 512, "kv_format": "f32"})
    band = found.first_token_s
    assert (band.low, band.mid, band.high) == pytest.approx((tokens / 2000, tokens / 1000, tokens / 500))
    assert (found.prefill_tok_s.low, found.prefill_tok_s.high) == pytest.approx((500, 2000))
