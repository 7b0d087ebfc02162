"""Predictions beside measurements: the table, what fails, and that nothing is kept of a quick run.  None is of time."""

import dataclasses

import pytest

from bench import plan, records
from pyrosome.measure.calibrate import SHAPES
from pyrosome.measure.steps import Sample
from pyrosome.ops import native
from pyrosome.plan import calibration, history
from tests.plan.test_calibration import _calibration


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def _samples(factor):
    model = {s.name: s.model for s in plan.SHAPES}
    return [
        Sample(s, load, factor * _calibration().predicted(model[s.name], load), 0.1)
        for s in plan.SHAPES
        for load in s.loads
    ]


def test_four_networks_and_three_contexts_that_nothing_was_fitted_to():
    fitted = {(s.hidden, s.width, s.heads, s.experts, s.ratios) for s in SHAPES}
    assert len(plan.SHAPES) == 4
    assert not fitted & {(s.hidden, s.width, s.heads, s.experts, s.ratios) for s in plan.SHAPES}
    used = {load.context for s in SHAPES for load in s.loads} - {0}  # prompts from the start are of other lengths
    lengths = {load.tokens for s in SHAPES for load in s.loads if not load.context}
    for shape in plan.SHAPES:
        assert {load.context for load in shape.loads if load.tokens == 1} == set(plan.CONTEXTS)
        assert len({load.context for load in shape.loads if load.tokens > 1}) == 3
        assert not used & {load.context for load in shape.loads}
        assert not lengths & {load.tokens for load in shape.loads if not load.context}
    for key in ("hidden", "width", "heads", "latent", "experts", "ratios"):
        assert len({getattr(s, key) for s in plan.SHAPES}) >= 3


def test_rates_are_those_of_the_calibration():
    found = plan.lines(_samples(1.0), _calibration())
    assert len(found) == 28
    assert all(x.error == pytest.approx(0) for x in found)
    assert plan.problems(found) == []
    decode = found[0]
    assert (decode.kind, decode.tokens, decode.context) == ("decode", 1, 4096)
    assert decode.predicted == pytest.approx(1 / _calibration().predicted(plan.SHAPES[0].model, plan.LOADS[0]))
    prompt = found[3]
    seconds = _calibration().predicted(plan.SHAPES[0].model, plan.LOADS[3])
    assert (prompt.kind, prompt.predicted) == ("prefill", pytest.approx(256 / seconds))


@pytest.mark.parametrize(("factor", "fails"), [(1.24, False), (1.26, True), (0.76, False), (0.74, True)])
def test_a_prediction_that_is_off_by_more_than_a_quarter_fails(factor, fails):
    found = plan.lines(_samples(factor), _calibration())
    assert bool(plan.problems(found)) is fails
    assert f"{found[0].error:+.1%}" in plan.table(found)


def test_a_quick_run_calibrates_nothing_and_keeps_nothing(monkeypatch, capsys):
    if not native.available():
        pytest.skip("no native library here")
    path = calibration.save(_calibration())
    monkeypatch.setattr(plan, "QUICK", (dataclasses.replace(plan.QUICK[0], loads=plan.QUICK[0].loads[:1]),))
    monkeypatch.setattr(records, "append", lambda *_: pytest.fail("a record was written"))
    assert plan.main(["--quick", "--calibration", str(path)]) == 0
    assert "1 predictions on A processor, 2 cores" in capsys.readouterr().out


def test_a_file_that_is_no_calibration_ends_it(tmp_path, capsys):
    (tmp_path / "c.json").write_text("{}")
    assert plan.main(["--quick", "--calibration", str(tmp_path / "c.json")]) == 2
    assert "is no calibration" in capsys.readouterr().err


def test_other_benchmarks_tell_and_keep_predictions(capsys):
    beside = records.Predictions("wide", plan.SHAPES[0].model)
    load = plan.LOADS[0]
    beside.step(load, 2 / beside.seconds(load))
    beside.rate("requests", "3 at once", 30.0, 20.0)
    told = capsys.readouterr().out
    assert "decode 1 x 1 at 4,096" in told and "off by -50%" in told
    assert "requests 3 at once: 30.0 (15.0 to 60.0), 20.0 measured, off by +50%" in told
    assert {s["what"]: round(s["bias"], 3) for s in history.summary()} == {
        "bench.wide, decode, tok/s": -0.5, "bench.wide, requests, tok/s": 0.5,
    }  # fmt: skip
    assert [x["kind"] for x in beside.lines] == ["decode", "requests"]
