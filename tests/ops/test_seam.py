"""How an op chooses what runs: once per place, with reasons, and never silently against what was asked."""

import logging
from types import SimpleNamespace

import pytest
import torch

from pyrosome.errors import KernelUnavailable
from pyrosome.ops import seam
from pyrosome.ops.seam import Kernel, Op, Place, place_of, use

CPU = Place("cpu", (0, 0), "", False)


@pytest.fixture(autouse=True)
def only_these_ops(monkeypatch):
    monkeypatch.setattr(seam, "OPS", {})
    monkeypatch.delenv("PYROSOME_OPS", raising=False)


def new_op():
    def double(x, stored=None):
        """Twice x."""
        return "torch", x

    return Op(double)


def add_kernel(op, name, why_not="", error=None, has_backward=False):
    """A kernel that returns its own name, and the lists of what it was asked and how often it was loaded."""
    asked, loads = [], []

    def run(x, stored=None):
        return name, x

    run.__module__ = f"pyrosome.ops.double.{name}"

    def when(place):
        asked.append(place)
        return why_not(place) if callable(why_not) else why_not

    @op.kernel(name, when, has_backward=has_backward)
    def load():
        loads.append(name)
        if error:
            raise error
        return run

    return asked, loads


def ran(op, *args):
    with torch.no_grad():
        return op(*(args or (torch.ones(2),)))[0]


def test_an_op_is_its_definition_until_a_kernel_applies():
    op, x = new_op(), torch.ones(2)
    assert (op.name, op.__name__, op.__doc__) == ("double", "double", "Twice x.")
    assert list(seam.OPS.items()) == [("double", op)]
    version, same = op(x)
    assert version == op.chosen(x) == "torch"
    assert same is x
    assert op.pick(CPU) == ("torch", op.definition)


def test_the_choice_is_made_once_per_place():
    op = new_op()
    asked, loads = add_kernel(op, "fast")
    for x in (torch.ones(2), torch.zeros(3, 4), torch.ones(1)):
        assert ran(op, x) == "fast"
    assert asked == [CPU]
    assert ran(op, torch.ones(1, dtype=torch.float64)) == "fast"
    assert asked == [CPU, CPU._replace(dtype="float64")]
    assert loads == ["fast"]  # whatever the place, a kernel is loaded once


def test_each_device_has_a_choice_of_its_own():
    op = new_op()
    asked, _ = add_kernel(op, "fast", lambda place: "" if place.device == "cpu" else "CPU only")
    for _ in range(2):
        assert ran(op, torch.ones(2)) == "fast"
        assert ran(op, torch.ones(2, device="meta")) == "torch"
    assert [place.device for place in asked] == ["cpu", "meta"]
    assert op.passed_over[asked[1]] == ["fast: CPU only"]
    assert op.passed_over[asked[0]] == []


def test_the_format_of_the_second_argument_counts():
    op = new_op()
    asked, _ = add_kernel(op, "fast", lambda place: "" if place.format == "fp8" else f"format {place.format!r}")
    fp8, fp4, plain = SimpleNamespace(format="fp8"), SimpleNamespace(format="fp4"), torch.ones(2)
    for _ in range(2):
        assert [ran(op, plain, second) for second in (fp8, fp4, plain)] == ["fast", "torch", "torch"]
        assert ran(op, plain) == "torch"
    assert [place.format for place in asked] == ["fp8", "fp4", ""]
    assert op.passed_over[asked[1]] == ["fast: format 'fp4'"]


def test_a_kernel_without_a_backward_is_passed_over_while_gradients_are_on():
    op, x = new_op(), torch.ones(2)
    asked, loads = add_kernel(op, "fast")
    assert op(x)[0] == op.chosen(x) == "torch"
    assert op.passed_over[CPU._replace(grad=True)] == ["fast: no backward"]
    assert asked == loads == []
    assert ran(op, x) == "fast"
    with torch.inference_mode():
        assert op(x)[0] == op.chosen(x) == "fast"
    assert op(x)[0] == "torch"


def test_a_kernel_with_a_backward_runs_while_gradients_are_on():
    op = new_op()
    add_kernel(op, "fast", has_backward=True)
    assert op(torch.ones(2))[0] == ran(op) == "fast"


def test_the_first_kernel_that_applies_wins_and_reasons_are_kept_in_order():
    op = new_op()
    add_kernel(op, "gpu", "no such device")
    add_kernel(op, "wide", "needs more lanes")
    add_kernel(op, "fast")
    asked, loads = add_kernel(op, "slow")
    assert ran(op) == "fast"
    assert op.passed_over[CPU] == ["gpu: no such device", "wide: needs more lanes"]
    assert asked == loads == []


def test_a_kernel_registered_after_a_call_is_seen():
    op = new_op()
    assert ran(op) == "torch"
    add_kernel(op, "fast")
    assert ran(op) == "fast"


@pytest.mark.parametrize(
    "error", [ImportError("no compiler"), OSError("no compiler"), ModuleNotFoundError("no compiler")]
)
def test_a_loader_that_fails_falls_back_with_a_reason_and_a_log_line(error, caplog):
    op = new_op()
    add_kernel(op, "built", error=error)
    with caplog.at_level(logging.WARNING, logger=seam.log.name):
        assert ran(op) == ran(op) == "torch"
    assert op.passed_over[CPU] == ["built: no compiler"]
    assert [r.getMessage() for r in caplog.records] == ["double: the built kernel did not load: no compiler"]
    add_kernel(op, "fast")
    assert ran(op) == "fast"


def test_a_fault_inside_a_loader_is_not_swallowed():
    op = new_op()
    add_kernel(op, "broken", error=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        ran(op)


def test_the_definition_that_was_asked_for_consults_no_kernel():
    op = new_op()
    asked, loads = add_kernel(op, "fast")
    with use(op, "torch"):
        assert ran(op) == "torch"
    assert asked == loads == []


def test_a_version_asked_for_by_name_leaves_the_others_alone():
    op = new_op()
    asked, loads = add_kernel(op, "fast")
    add_kernel(op, "slow")
    with use(op, "slow"):
        assert ran(op) == "slow"
        assert op.passed_over[CPU] == ["fast: not asked for"]
    assert asked == loads == []


@pytest.mark.parametrize(
    ("choice", "kernel", "reason"),
    [
        ("fast", {"why_not": "needs a GPU"}, "fast: needs a GPU"),
        ("fast", {"error": ImportError("no compiler")}, "fast: no compiler"),
        ("other", {}, "fast: not asked for"),
    ],
)
def test_a_version_asked_for_that_cannot_run_is_an_error_every_time(choice, kernel, reason):
    op = new_op()
    add_kernel(op, "fast", **kernel)
    with use(op, choice):
        for _ in range(2):
            with pytest.raises(KernelUnavailable, match=f"double: version '{choice}' was asked for") as raised:
                ran(op)
            assert reason in str(raised.value)


def test_a_version_asked_for_without_a_backward_is_an_error_only_while_gradients_are_on():
    op = new_op()
    add_kernel(op, "fast")
    with use(op, "fast"):
        assert ran(op) == "fast"
        with pytest.raises(KernelUnavailable, match="no backward"):
            op(torch.ones(2))


def test_use_restores_what_was_before_even_after_an_error():
    op = new_op()
    add_kernel(op, "fast")
    assert ran(op) == "fast"
    with use(op, "torch"):
        assert ran(op) == "torch"
        with use(op, "fast"):
            assert ran(op) == "fast"
        assert ran(op) == "torch"
    assert ran(op) == "fast"
    with pytest.raises(KeyError), use(op, "torch"):
        raise KeyError
    assert op.choice == "auto"
    assert ran(op) == "fast"


@pytest.mark.parametrize(
    ("spec", "choice"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("torch", "torch"),
        ("double:torch", "torch"),
        ("double:fast", "fast"),
        ("other:torch", "auto"),
        ("other:torch,double:fast", "fast"),
        ("torch,double:fast", "fast"),
        ("double:fast,torch", "fast"),
        ("torch,double:auto", "auto"),
        ("torch,other:fast", "torch"),
        ("double:slow,double:fast", "fast"),
        ("", "auto"),
        ("other:torch,", "auto"),
        ("torch, double:fast ,", "fast"),
    ],
)
def test_the_environment_chooses(monkeypatch, spec, choice):
    if spec is not None:
        monkeypatch.setenv("PYROSOME_OPS", spec)
    op = new_op()
    add_kernel(op, "slow")
    add_kernel(op, "fast")
    assert op.choice == choice
    assert ran(op) == {"auto": "slow"}.get(choice, choice)


def test_place_of_reads_device_format_and_gradients(monkeypatch):
    x = torch.ones(2)
    assert place_of(x) == CPU._replace(grad=True)
    with torch.no_grad():
        assert place_of(x) == place_of(x, x) == CPU
        assert place_of(x, SimpleNamespace(format="fp4")) == CPU._replace(format="fp4")
        assert place_of(torch.ones(2, device="meta")).device == "meta"
        seam._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", {0: (8, 9), 1: (9, 0)}.__getitem__)
        devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
        assert [place_of(SimpleNamespace(device=d, dtype=torch.float32)).capability for d in devices] == [
            (8, 9),
            (9, 0),
        ]
        seam._capability.cache_clear()


def test_a_registered_kernel_is_listed_with_what_it_said():
    op = new_op()
    add_kernel(op, "fast", "not today", has_backward=True)
    (kernel,) = op.kernels
    assert isinstance(kernel, Kernel)
    assert (kernel.name, kernel.when(CPU), kernel.has_backward) == ("fast", "not today", True)
