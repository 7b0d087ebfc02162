"""Variants are timed on every call, held to one another's bits, and the fastest of each class of shapes is written."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

pytest.importorskip("triton")

from bench import kernels_gpu, tune
from bench.device_clock import CpuClock
from bench.kernels_gpu import TINY
from bench.tune import Trial, choices, tried, write
from pyrosome.ops import gpu, tuned
from pyrosome.ops.gpu import Target, Variant
from tests.bench.test_kernels_gpu import call
from tests.ops.gpu.doubled import doubled

CPU = torch.device("cpu")
made = importlib.import_module("tests.ops.gpu.doubled.triton")


class Paced(CpuClock):
    """A clock by which the variant that runs has the time that is told; it is exact, as a device's is."""

    exact = True

    def __init__(self, **seconds: float) -> None:
        self.each = seconds

    def captured(self, run):
        with gpu.telling() as told:
            run()
        self.now = self.each[told[-1].taken]
        return run

    def seconds(self, run, count):
        return [self.now] * count


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.choices.cache_clear()
    yield tmp_path
    tuned.choices.cache_clear()


def test_the_fastest_variant_of_a_class_is_taken(capsys):
    trials, problems = tried([call(1), call(16), call(17)], CPU, Paced(few=2.0, many=1.0), TINY)
    assert problems == [] and set(trials) == {("doubled", "M<=16"), ("doubled", "M>16")}
    assert trials["doubled", "M<=16"].ratios == {"few": [1.0, 1.0], "many": [0.5, 0.5]}
    assert choices(trials) == {"doubled": {"M<=16": "many"}}  # of more rows it is the default
    assert "doubled (M>16): many 1,000,000.0 us, few 2,000,000.0 us" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "failed", "best"),
    [
        ({"few": [1.0], "many": [0.99]}, {}, "few"),  # within what times differ by
        ({"few": [1.0], "many": [0.97]}, {}, "many"),
        ({"few": [1.0], "many": [0.5]}, {"many": "other bits"}, "few"),
        ({"few": [1.0, 1.0], "many": [0.5, 1.9]}, {}, "many"),
        ({"few": [1.0, 1.0], "many": [0.5, 2.1]}, {}, "few"),
        ({}, {"few": "no room"}, "few"),
    ],
)
def test_a_default_stays_where_nothing_is_clearly_faster(ratios, failed, best):
    assert Trial("few", ratios, failed).best() == best


def test_a_variant_with_other_bits_is_a_problem_and_not_taken(monkeypatch):
    monkeypatch.setitem(made.VARIANTS, "many", Variant("many", {"BLOCK": 64, "WRONG": 1}))
    trials, problems = tried([call(2)], CPU, Paced(few=2.0, many=1.0), TINY)
    assert problems == ["doubled some, M = 2: doubled gives other bits as many than by default"]
    assert choices(trials) == {"doubled": {}}


def test_a_variant_that_cannot_run_is_passed_over(monkeypatch, capsys):
    monkeypatch.setitem(made.VARIANTS, "many", Variant("many", {"BLOCK": 63, "WRONG": 0}))
    trials, problems = tried([call(2)], CPU, Paced(few=2.0, many=1.0), TINY)
    assert not problems and choices(trials) == {"doubled": {}}
    assert list(trials["doubled", "M<=16"].failed) == ["many"] and "many: " in capsys.readouterr().out


def test_a_call_that_fails_is_a_problem_and_others_follow():
    def broken(device):
        return (torch.randn(4, 8, dtype=torch.float64),), {}

    trials, problems = tried([call(make=broken), call(1)], CPU, Paced(few=1.0, many=1.0), TINY)
    assert len(trials) == 1 and len(problems) == 1 and "KernelUnavailable" in problems[0]


def test_what_is_written_is_what_kernels_then_choose(folder):
    record = {"device": "Some GPU", "capability": 90, "versions": {}, "command": "", "date": ""}
    target = Target(90, device="Some GPU")
    assert gpu.chosen("doubled", "M<=16", made.VARIANTS, "few", target).name == "few"
    path = write(folder, {**record, "choices": {"doubled": {"M<=16": "many"}, "other": {"k": "wide"}}})
    tuned.choices.cache_clear()
    assert path == folder / "some-gpu.json" == tuned.path_of("Some GPU")
    assert gpu.chosen("doubled", "M<=16", made.VARIANTS, "few", target).name == "many"
    write(folder, {**record, "choices": {"doubled": {}}})  # `other` was not tried again
    assert json.loads(path.read_text())["choices"] == {"other": {"k": "wide"}}


def test_the_whole_run_in_the_interpreter(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.tiny_calls.all_calls", lambda: iter([call(1), call(20)]))
    assert tune.main(["--device", "cpu", "--calls", "tiny"]) == 0
    assert not list(folder.iterdir())  # the interpreter's times are nobody's
    assert "Triton's interpreter: " in capsys.readouterr().out
    assert tune.main(["--device", "cpu", "--calls", "tiny", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "triton-s-interpreter.json").read_text())
    assert record["command"].startswith("python -m bench.tune --device cpu --calls tiny --out ")
    assert {"device", "capability", "versions", "date", "commit", "pyrosome", "choices"} <= set(record)


def test_without_a_gpu_it_is_status_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        tune.main(["--device", "cuda"])
    assert ended.value.code == 2 and "bench.tune: --device cuda: torch finds no GPU" in capsys.readouterr().err
    assert doubled.name == "doubled" and kernels_gpu.FULL.samples >= 20
