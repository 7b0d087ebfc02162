"""Fitting: rates that made times are found again, nothing is negative or faster than it can be, files are held to."""

import dataclasses
import json
import math
import stat

import numpy as np
import pytest

from pyrosome.config import ModelConfig
from pyrosome.errors import PlanError
from pyrosome.plan import calibration
from pyrosome.plan.calibration import TERMS, Calibration, Point, fitted, non_negative, residuals, terms
from pyrosome.plan.history import installed
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load

TRUE = {
    "read": 1 / 30e9, "rows": 1 / 8e9, "matrices": 1 / 300e9, "experts": 1 / 350e9, "plain": 1 / 200e9,
    "streams": 1 / 20e9, "attention": 1 / 250e9, "indexer": 1 / 500e9, "layer": 80e-6, "token": 9e-6, "step": 5e-4,
}  # fmt: skip


def _model(hidden, heads, ratios, experts, vocab):
    config = ModelConfig.preset(
        "flash", hidden_size=hidden, moe_intermediate_size=hidden // 2, num_attention_heads=heads, q_lora_rank=256,
        o_groups=4, o_lora_rank=128, index_n_heads=heads, n_routed_experts=experts, num_hidden_layers=len(ratios),
        compress_ratios=ratios, vocab_size=vocab, num_hash_layers=1, num_nextn_predict_layers=0,
    )  # fmt: skip
    return Model.of(config, 0)


MODELS = [
    _model(512, 16, (0, 4, 128), 8, 1024),
    _model(1024, 8, (0, 0, 0, 128, 16), 16, 8192),
    _model(256, 64, (4, 4, 4, 4, 4, 4), 32, 512),
    _model(768, 32, (0, 4, 128, 4), 12, 40000),
]
LOADS = [Load(1, 1, 1024), Load(1, 1, 262144), Load(8, 1, 4096), Load(1, 64, 0), Load(1, 512, 0), Load(1, 128, 65536)]


def _points(noise=0.0):
    g = np.random.default_rng(3)
    each = np.array([TRUE[t] for t in TERMS])
    return [
        Point(m, load, float(terms(m, load) @ each) * (1 + noise * g.uniform(-1, 1))) for m in MODELS for load in LOADS
    ]


def _calibration(**changes):
    made = Calibration(
        processor="A processor, 2 cores", threads=1, level="avx512", engine=installed("pyrosome"),
        torch=installed("torch"), when="2026-01-02T03:04:05+00:00", seconds=TRUE, read_bytes_s=31e9,
        flops_s=300e9, disk_bytes_s=2e9, link_bytes_s=0.0, residual=0.03, worst=0.2, points=24,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_the_rates_that_made_the_times_are_found_again():
    found = fitted(_points(), 31e9, 300e9)
    assert found == pytest.approx(TRUE, rel=1e-3)


def test_times_with_noise_are_predicted_where_nothing_was_fitted():
    found = fitted(_points(noise=0.05), 31e9, 300e9)
    other = _model(640, 24, (0, 4, 128, 4, 128), 24, 2048)
    for load in (Load(1, 1, 16384), Load(1, 256, 8192), Load(4, 1, 131072)):
        made = float(terms(other, load) @ np.array([TRUE[t] for t in TERMS]))
        assert residuals([Point(other, load, made)], found)[0] == pytest.approx(0, abs=0.05)


def test_nothing_is_faster_than_it_can_be():
    found = fitted(_points(), 5e9, 50e9)
    assert found["read"] >= 1 / 10e9
    assert all(found[g] >= 1 / 75e9 for g in ("matrices", "experts", "plain", "streams", "attention"))
    assert found["indexer"] >= 1 / 200e9


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_without_negatives_meet_the_conditions_of_the_best(seed):
    g = np.random.default_rng(seed)
    a, b = g.normal(size=(12, 6)), g.normal(size=12)
    x = non_negative(a, b)
    gain = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert gain.max() < 1e-8  # nothing more of any would help
    assert abs(gain[x > 0]).max(initial=0) < 1e-8  # and nothing less


def test_columns_that_are_alike_do_not_keep_it_from_ending():
    a = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert non_negative(a, np.array([1.0, 2.0, 3.0])).sum() == pytest.approx(1)
    assert non_negative(a, np.array([-1.0, -2.0, -3.0])).tolist() == [0, 0]


def test_a_calibration_comes_back_as_it_was_kept(state):
    kept = _calibration()
    path = calibration.save(kept)
    assert calibration.load(path) == kept
    assert path.parent == state / "pyrosome" / "calibrations"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left


def test_the_newest_that_still_holds_is_taken(state):
    assert calibration.latest("A processor, 2 cores") is None
    calibration.save(_calibration())
    calibration.save(_calibration(threads=2, when="2026-02-01T00:00:00+00:00"))
    calibration.save(_calibration(threads=4, when="2026-03-01T00:00:00+00:00", engine="0.0.0"))
    calibration.save(_calibration(processor="Another", when="2026-04-01T00:00:00+00:00"))
    newest = calibration.latest("A processor, 2 cores")
    assert (newest.threads, newest.outdated) == (2, "")
    assert calibration.latest("A processor, 2 cores", threads=1).threads == 1
    only_old = calibration.latest("A processor, 2 cores", threads=4)
    assert "pyrosome 0.0.0" in only_old.outdated
    assert installed("pyrosome") in only_old.outdated


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"seconds": {"read": 1}}, {"seconds": {**TRUE, "read": -1}}, {"seconds": {**TRUE, "read": "x"}},
        {"seconds": {**TRUE, "read": math.nan}}, {"read_bytes_s": 0}, {"flops_s": math.inf}, {"processor": 3},
        {"threads": True}, {"seconds": dict.fromkeys(TERMS, 0)}, {"more": 1},
    ],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_refused_and_passed_over(state, change):
    path = calibration.save(_calibration())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PlanError, match="again"):
        calibration.load(path)
    assert calibration.latest("A processor, 2 cores") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_file_is_refused(state, text):
    path = calibration.save(_calibration())
    path.write_text(text)
    with pytest.raises(PlanError, match="again"):
        calibration.load(path)


def test_terms_count_every_layer_token_and_step():
    counted = dict(zip(TERMS, terms(MODELS[0], Load(5, 7, 100)), strict=True))
    assert (counted["step"], counted["layer"], counted["token"]) == (1, 3, 3 * 5 * 7)
    assert all(n > 0 for n in counted.values())


def test_a_step_is_the_sum_of_its_terms():
    load = Load(2, 1, 4096)
    assert _calibration().predicted(MODELS[0], load) == pytest.approx(
        sum(TRUE[t] * n for t, n in zip(TERMS, terms(MODELS[0], load), strict=True))
    )
