"""Which checks run, and that what goes wrong inside one stops no other."""

from __future__ import annotations

import sys
import types

import pytest

from pyrosome.errors import CheckpointError, DoesNotFit, RequestError
from pyrosome.verify import run as runner
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.run import CHECKS, chosen, run
from tests.checkpoint.files import SHARD, copied


@pytest.fixture
def checks(monkeypatch):
    """Two checks in place of all, which do as they are told."""

    def put(**bodies):
        found = {}
        for name, body in bodies.items():
            module = types.ModuleType(f"checks_of_tests.{name}")
            module.check = body
            monkeypatch.setitem(sys.modules, module.__name__, module)
            found[name] = module.__name__
        monkeypatch.setattr(runner, "CHECKS", found)

    return put


def well(wanted):
    yield Finding("second", "all", True, "well")


def breaking(error):
    def check(wanted):
        yield Finding("first", "one", True, "well")
        raise error

    return check


def test_checks_are_chosen_in_their_order():
    assert chosen() == list(CHECKS)
    assert chosen(["layers", "files"]) == ["files", "layers"]
    assert chosen(None, ["files", "layers"]) == [c for c in CHECKS if c not in ("files", "layers")]


@pytest.mark.parametrize(
    ("only", "skip", "said"),
    [
        (["fils"], [], "--only names 'fils'"),
        (None, ["x"], "--skip names 'x'"),
        (["files"], ["files"], "no check is left"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(only, skip, said):
    with pytest.raises(RequestError, match=said):
        chosen(only, skip)


@pytest.mark.parametrize(
    ("error", "what", "ok", "said"),
    [
        (DoesNotFit("weights", 2 << 30, 1 << 30, "cpu", "buy"), "memory", None, "2.000 GiB"),
        (CheckpointError("a scale is NaN"), "checkpoint", False, "a scale is NaN"),
        (ZeroDivisionError("by nothing"), "the check itself", False, "ZeroDivisionError: by nothing"),
    ],
)
def test_a_check_that_breaks_off_is_a_finding_and_the_next_one_runs(error, what, ok, said, checks):
    checks(first=breaking(error), second=well)
    findings = list(run(Wanted("builtin:nano"), ["first", "second"]))
    assert [(f.check, f.what, f.ok) for f in findings] == [
        ("first", "one", True),
        ("first", what, ok),
        ("second", "all", True),
    ]
    assert said in findings[1].detail


def test_an_interruption_is_none(checks):
    checks(first=breaking(KeyboardInterrupt()), second=well)
    with pytest.raises(KeyboardInterrupt):
        list(run(Wanted("builtin:nano"), ["first", "second"]))


def test_where_a_checkpoint_cannot_be_opened_only_its_files_are_looked_at(tmp_path):
    path = copied(tmp_path)
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-50])
    findings = list(run(Wanted(str(path), quick=True), ["files", "scales", "layers"]))
    assert [f.what for f in findings if f.ok is False] == ["headers"]
    assert [(f.check, f.ok) for f in findings[-2:]] == [("scales", None), ("layers", None)]
    (alone,) = run(Wanted(str(path)), ["scales"])  # nobody else says it
    assert alone.ok is False and "header promises" in alone.detail


def test_findings_come_while_a_check_goes_on(checks):
    going_on = []

    def slow(wanted):
        yield Finding("first", "one", True, "")
        going_on.append(True)
        yield Finding("first", "two", True, "")

    checks(first=slow)
    findings = run(Wanted("builtin:nano"), ["first"])
    assert next(findings).what == "one" and not going_on
    assert next(findings).what == "two"
