"""What a server tells at its end: rates it counted, beside those predicted for the same load."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pyrosome.config import ModelConfig
from pyrosome.engine.stats import Stats
from pyrosome.measure.served import predicted, told_after
from pyrosome.plan import history
from pyrosome.plan.hardware import machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import Layout, Placement
from pyrosome.plan.speed import coefficients_for, step_time
from pyrosome.plan.work import Load

FLASH = Model.of(ModelConfig.preset("flash"), 1)
HERE = machine("epyc-9654", ram="512G")


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def _stats(decode=(), prompts=()):
    stats = Stats()
    for seconds, spans in (*decode, *prompts):
        stats.step_computed(seconds, spans)
    return stats


def _seconds(load):
    return step_time(FLASH, HERE, Layout.of("tp", 1), Placement(), load, coefficients_for(HERE)).seconds


def test_nothing_is_told_of_a_server_that_did_nothing():
    assert told_after(None, FLASH, "fp8", HERE) == []
    assert told_after(Stats(), FLASH, "fp8", HERE) == []
    short = _stats(decode=[(0.1, [(5, 1, 0)])] * 7, prompts=[(0.01, [(0, 9, 0)])])
    assert told_after(short, FLASH, "fp8", HERE) == []
    assert history.summary() == []


def test_decoding_and_prompts_are_told_and_kept():
    stats = _stats(
        decode=[(0.2, [(1000, 1, 0), (3000, 1, 0)])] * 10, prompts=[(2.0, [(0, 512, 0)]), (2.0, [(512, 512, 0)])]
    )
    decoding, prompts = told_after(stats, FLASH, "fp8", HERE)
    assert decoding.startswith("decoding: 10.0 tok/s measured, ")
    assert "with 2.0 sequences of 2,000 tokens in a step" in decoding
    assert prompts.startswith("prompts: 256.0 tok/s measured, ")
    assert "assumed for a CPU" in prompts
    kept = {e.what: e for e in history.entries()[0]}
    assert kept["serve, decoding, tok/s"].measured == pytest.approx(10)
    assert kept["serve, decoding, tok/s"].predicted == pytest.approx(2 / _seconds(Load(2, 1, 2000)))
    assert kept["serve, prompts, tok/s"].predicted == pytest.approx(512 / _seconds(Load(1, 512, 256)))
    assert kept["serve, prompts, tok/s"].machine == HERE.device.title


def test_a_load_between_two_numbers_of_sequences_is_predicted_between_them():
    stats = _stats(decode=[(0.2, [(1000, 1, 0)] * n) for n in (1, 1, 1, 2) for _ in range(3)])
    band, _ = predicted(stats.decode_sums, FLASH, "fp8", HERE)
    mean = 0.75 * _seconds(Load(1, 1, 1000)) + 0.25 * _seconds(Load(2, 1, 1000))
    assert band.mid == pytest.approx(1.25 / mean)
    assert (band.low, band.high) == (pytest.approx(band.mid / 2), pytest.approx(band.mid * 2))


def test_drafts_are_tokens_of_a_step():
    stats = _stats(decode=[(0.2, [(1000, 3, 2)])] * 8)
    band, _ = predicted(stats.decode_sums, FLASH, "fp8", HERE)
    assert band.mid == pytest.approx(3 / _seconds(Load(1, 3, 1000)))


def test_a_machine_that_nothing_is_known_of_is_told_as_such():
    unknown = dataclasses.replace(HERE, device=dataclasses.replace(HERE.device, flops={}))
    (line,) = told_after(_stats(prompts=[(2.0, [(0, 512, 0)])]), FLASH, "fp8", unknown)
    assert line.startswith("prompts: no prediction to compare with: ")
    assert history.summary() == []


def test_a_server_needs_no_torch_for_it():
    code = "import sys, pyrosome.measure.served; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.lower()) is False
