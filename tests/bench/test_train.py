"""The benchmark of training runs its three ways on one step, and tells what it promised and did not find."""

import sys

import pytest

from bench import train


def test_the_quick_form_runs_all_ways_and_leaves_no_record(monkeypatch, capsys):
    monkeypatch.setattr(train.records, "append", lambda *args: pytest.fail("no record was asked for"))
    monkeypatch.setattr(sys, "argv", ["train", "--quick"])
    assert train.main() == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in train.WAYS)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, ""),
        ({"kernels": {"tokens_per_cpu_s": 149.0}}, "kernels train 1.49 times"),
        ({"kernels": {"loss": 7.15}}, "kernels: the first loss is 2.1% off"),
        ({"bfloat16": {"loss": 6.85}}, "bfloat16: the first loss is 2.1% off"),
    ],
)
def test_what_is_promised(changes, part):
    found = {name: {"tokens_per_cpu_s": 150.0, "loss": 7.0, **changes.get(name, {})} for name in train.WAYS}
    found["definitions"]["tokens_per_cpu_s"] = 100.0
    said = train.problems(found)
    assert [part in s for s in said] == ([True] if part else [])
