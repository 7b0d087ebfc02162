"""`pyrosome calibrate`: what it keeps, prints and refuses, with measuring left out."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pyrosome.cli import app
from pyrosome.errors import CheckpointError, RequestError
from pyrosome.measure import calibrate as calibrating
from pyrosome.measure import own
from pyrosome.measure.steps import Load, Sample, Shape
from pyrosome.plan import calibration, history
from tests.plan.test_calibration import _calibration

LOADS = (Load(1, 1, 300), Load(1, 20, 0))
TINY = Shape("tiny", 64, 32, 2, 32, 1, 32, 2, 4, 2, (0, 4, 128), 64, LOADS)


@pytest.fixture(autouse=True)
def asked(tmp_path, monkeypatch):
    """What measuring was asked for; it gives the same calibration whatever that was."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    seen = []

    def measured(seconds, threads, place, say):
        seen.append((seconds, threads, str(place)))
        say("memory is read at 1 GB/s")
        return _calibration(threads=threads), [Sample(TINY, load, 0.5, 0.1) for load in LOADS]

    monkeypatch.setattr(calibrating, "calibrate", measured)
    steps = [{"what": "decode tok/s", "at": " at 64", "predicted": 90.0, "measured": 100.0}]
    monkeypatch.setattr(own, "own_steps", lambda model, threads, say: steps)
    return seen


def _run(*args):
    return CliRunner().invoke(app, ["calibrate", *args])


def test_it_is_kept_and_told_in_words(asked, tmp_path):
    done = _run("--threads", "1")
    assert (done.exit_code, asked[0][:2]) == (0, (120.0, 1))
    (path,) = (tmp_path / "pyrosome" / "calibrations").iterdir()
    assert calibration.load(path) == _calibration()
    assert "A processor, 2 cores, 1 thread, kernels avx512" in done.stdout
    assert "weights are read at 30.0 GB/s" in done.stdout
    assert "indexer 500.0 GFLOP/s" in done.stdout
    assert "a layer 80.0 us" in done.stdout
    assert "off by 3.0% (median), 20.0% (most) of 24 steps" in done.stdout
    assert path.name in done.stdout.replace("\n", "")
    assert "this model" not in done.stdout
    assert "memory is read at 1 GB/s" in done.stderr
    assert history.summary() == []


def test_as_many_threads_as_the_engine_would_use(asked):
    assert _run("--seconds", "200").exit_code == 0
    assert asked[0][:2] == (200.0, torch.get_num_threads())


def test_a_model_s_own_steps_are_predicted_told_and_kept(asked):
    done = _run("builtin:nano", "--threads", "1")
    assert done.exit_code == 0
    assert "this model" in done.stdout
    assert "decode tok/s at 64" in done.stdout
    assert "-10.0%" in done.stdout
    (kept,) = history.summary()
    assert (kept["what"], kept["count"], round(kept["bias"], 3)) == ("decode tok/s", 1, -0.1)


def test_one_json_object_has_all(asked):
    report = json.loads(_run("builtin:nano", "--threads", "1", "--json").stdout)
    assert report["calibration"]["threads"] == 1
    assert [s["context"] for s in report["steps"]] == [300, 0]
    assert report["steps"][0]["fitted_s"] == pytest.approx(_calibration().predicted(TINY.model, LOADS[0]))
    assert report["model"][0]["measured"] == 100.0


def test_what_cannot_be_is_refused_before_anything_is_measured(asked, tmp_path):
    assert isinstance(_run("--threads", "-1").exception, RequestError)
    assert isinstance(_run(str(tmp_path / "nowhere")).exception, CheckpointError)
    assert asked == []
