"""Kernels of other packages: one that equals the definition is used, any other is passed over and the reason kept."""

from __future__ import annotations

import functools
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from pyrosome.errors import KernelUnavailable
from pyrosome.ops import accelerators, seam
from pyrosome.ops.accelerators import Accelerator
from pyrosome.ops.seam import Op, Place
from pyrosome.testing import calls
from pyrosome.testing.calls import Call

CPU = Place("cpu", (0, 0), "", False)


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """Ops and calls of these tests alone, and no entry points but theirs."""
    monkeypatch.setattr(seam, "OPS", {})
    monkeypatch.setattr(accelerators, "OPS", seam.OPS)
    monkeypatch.delenv("PYROSOME_OPS", raising=False)
    install(monkeypatch)
    yield
    forget()


def forget():
    accelerators._found.cache_clear()
    accelerators._kernels.cache_clear()


def install(monkeypatch, **registers):
    """Entry points of these names, each of which loads to a function or raises."""

    def entry(name, register):
        def load():
            if isinstance(register, Exception):
                raise register
            return register

        return SimpleNamespace(name=name, load=load, dist=SimpleNamespace(name="fast-kernels", version="1.2"))

    found = [entry(*item) for item in registers.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == accelerators.GROUP else [])
    forget()


def doubling(monkeypatch, *rows, tolerance=1e-6):
    """An op with calls of so many rows, and what was run."""

    def twice(x, stored=None):
        return x * 2

    op, ran = Op(twice), []

    def make(M, device):
        return (torch.randn(M, 4, device=device),), {}

    made = [Call(op, "some", M, 0, functools.partial(make, M), 32 * M, tolerance=tolerance) for M in rows]
    monkeypatch.setattr(calls, "all_calls", lambda only="": iter(made))

    def fast(x, stored=None, by=2.0):
        ran.append(len(x))
        return x * by

    return op, fast, ran


def accelerator(run, name="fast", op="twice", **changes) -> Accelerator:
    return Accelerator(op, name, lambda place: "" if place.device == "cpu" else "only here", lambda: run, **changes)


def value(op, *args) -> float:
    with torch.no_grad():
        return float(op(torch.ones(3), *args)[0])


def test_an_equal_one_is_used_in_front_of_triton_and_held_to_the_smallest_calls_once(monkeypatch):
    op, fast, ran = doubling(monkeypatch, 64, 1, 16, 4)
    for name in ("cpu", "triton"):
        op.kernel(name, lambda place, name=name: "not here" if name == "cpu" else "")(lambda: None)
    install(monkeypatch, some=lambda add: add(accelerator(fast)))
    assert op.pick(CPU).name == "fast"
    assert op.passed_over[CPU] == ["cpu: not here"]
    assert [k.name for k in op.versions] == ["cpu", "fast", "triton"]
    assert value(op) == value(op) == 2.0
    assert ran == [1, 4, 16, 3, 3]  # held to three calls, then called twice
    assert accelerators.packages() == [("some", "fast-kernels 1.2", ("twice",), "")]


def test_one_that_differs_is_passed_over_with_a_figure(monkeypatch):
    op, fast, _ = doubling(monkeypatch, 8, tolerance=1e-4)
    off = functools.partial(fast, by=2.002)
    install(monkeypatch, some=lambda add: add(accelerator(off)), two=lambda add: add(accelerator(fast, "second")))
    assert value(op) == 2.0 and op.pick(CPU).name == "second"
    (why,) = op.passed_over[CPU]
    assert why == "fast: it is 1.0e-03 from the definition on twice some, M = 8, and 0.0001 is allowed"
    install(monkeypatch, some=lambda add: add(accelerator(off, tolerance=1e-2)))
    assert op.pick(CPU).name == "fast"


def wrong_shape(x, stored=None):
    return (x * 2)[..., :1]


def no_number(x, stored=None):
    return x * 2 + torch.full_like(x, torch.nan)


def failing(x, stored=None):
    raise ZeroDivisionError("of no use")


@pytest.mark.parametrize(
    ("run", "said"),
    [(wrong_shape, "it is inf from"), (no_number, "it is inf from"), (failing, "ZeroDivisionError: of no use")],
)
def test_one_that_gives_something_else_is_passed_over(monkeypatch, run, said):
    op, *_ = doubling(monkeypatch, 2)
    install(monkeypatch, some=lambda add: add(accelerator(run)))
    assert value(op) == 2.0
    (why,) = op.passed_over[CPU]
    assert why.startswith(f"fast: {said}")


def test_what_is_written_into_arguments_counts(monkeypatch):
    op, *_ = doubling(monkeypatch, 2)

    def spoiling(x, stored=None):
        y = x * 2
        x.zero_()
        return y

    install(monkeypatch, some=lambda add: add(accelerator(spoiling)))
    assert op.pick(CPU).name == "torch"


def test_without_a_case_of_its_format_it_is_not_used(monkeypatch):
    op, fast, _ = doubling(monkeypatch, 2)
    install(monkeypatch, some=lambda add: add(accelerator(fast)))
    assert value(op, SimpleNamespace(format="fp4")) == 2.0
    place = CPU._replace(format="fp4")
    assert op.passed_over[place] == ["fast: there is no case of fp4 to hold it to"]
    own = [((torch.ones(5, 2), SimpleNamespace(format="fp4")), {})]
    install(monkeypatch, some=lambda add: add(accelerator(fast, cases=lambda device: own)))
    assert op.pick(place).name == "fast"


def test_where_it_does_not_apply_it_is_not_loaded(monkeypatch):
    op, _, _ = doubling(monkeypatch, 2)
    loaded = []
    elsewhere = accelerator(None)._replace(when=lambda place: "needs another device", load=lambda: loaded.append(1))
    raising = accelerator(None, "other")._replace(when=lambda place: place.nothing)
    install(monkeypatch, some=lambda add: (add(elsewhere), add(raising)))
    assert op.pick(CPU).name == "torch" and not loaded
    assert op.passed_over[CPU][0] == "fast: needs another device"
    assert op.passed_over[CPU][1].startswith("other: AttributeError")
    assert op.pick(CPU._replace(device="meta")).name == "torch"


@pytest.mark.parametrize(
    ("register", "said"),
    [
        (ImportError("no such library"), "ImportError: no such library"),
        (lambda add: add("fast"), "ValueError: an Accelerator with a name of its own"),
        (lambda add: add(accelerator(None, "triton")), "ValueError: an Accelerator with a name of its own"),
        (lambda add: add(accelerator(None, op="thrice")), "there is no op thrice"),
    ],
)
def test_a_package_that_fails_is_recorded_and_harms_no_other(monkeypatch, register, said):
    op, fast, _ = doubling(monkeypatch, 2)
    install(monkeypatch, broken=register, whole=lambda add: add(accelerator(fast)))
    assert op.pick(CPU).name == "fast"
    broken, whole = accelerators.packages()
    assert broken.error.startswith(said) and not whole.error


def test_the_environment_names_one_or_leaves_one_out(monkeypatch):
    def chosen(spec, **other):
        monkeypatch.setenv("PYROSOME_OPS", spec)
        op, fast, _ = doubling(monkeypatch, 2)
        install(monkeypatch, some=lambda add: add(accelerator(fast)), **other)
        return op, op.pick(CPU).name

    assert chosen("twice:fast")[1] == "fast"
    for spec in ("-fast", "twice:-fast", "thrice:-other,-fast"):
        op, name = chosen(spec)
        assert name == "torch" and op.passed_over[CPU] == ["fast: left out by PYROSOME_OPS"]
    assert chosen("thrice:-fast")[1] == chosen("-other")[1] == "fast"
    assert chosen("-fast,twice:fast")[1] == "fast"  # what is asked for by name runs
    with pytest.raises(KernelUnavailable, match="fast: not asked for"):
        chosen("twice:slow")


def test_an_unequal_one_that_was_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("PYROSOME_OPS", "twice:fast")
    op, fast, _ = doubling(monkeypatch, 2)
    install(monkeypatch, some=lambda add: add(accelerator(functools.partial(fast, by=3.0))))
    with pytest.raises(KernelUnavailable, match=r"it is 5\.0e-01 from the definition"):
        value(op)
