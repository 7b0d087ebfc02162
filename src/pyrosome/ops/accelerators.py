"""Kernels of other packages: found by entry points, and held to the definitions before one is used.

A package names a function in the entry-point group `pyrosome.kernels`.  It is called with `add`, and adds an
`Accelerator` for each op that it has a kernel for.  Those are asked before the Triton kernels that are here.  On first
use at a place (device, capability, format, dtype) the kernel is run beside the definition; one that differs, or raises,
is passed over there, and `pyrosome doctor` has the reason.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from pyrosome.ops.seam import OPS, Kernel, Op, Place, place_of

log = logging.getLogger(__name__)
GROUP = "pyrosome.kernels"
OWN_NAMES = ("auto", "torch", "cpu", "triton")
MOST_CASES = 3  # calls that a kernel is held to, the smallest
TOLERANCE = 1e-2  # relative RMS, for cases of an accelerator's own
Case = tuple[tuple[Any, ...], dict[str, Any]]


class Accelerator(NamedTuple):
    """A kernel of another package for one op."""

    op: str
    name: str  # as PYROSOME_OPS and `doctor` call it
    when: Callable[[Place], str]  # "" where it applies, else the reason why not
    load: Callable[[], Callable[..., Any]]  # gives the function, with the op's own arguments
    cases: Callable[[torch.device], Iterable[Case]] | None = None  # what to hold it to, instead of the smallest calls
    tolerance: float = 0.0  # relative RMS; 0: what each call allows


class Package(NamedTuple):
    """An entry point that was found."""

    entry: str
    package: str  # and its version
    ops: tuple[str, ...]
    error: str  # why nothing of it is used; "" where all is well


def packages() -> list[Package]:
    """Every entry point of the group; those that name ops which there are not say so."""
    found = []
    for package in _found()[0]:
        unknown = [name for name in package.ops if name not in OPS]
        error = package.error or (f"there is no op {', '.join(unknown)}" if unknown else "")
        found.append(package._replace(error=error))
    return found


def kernels(op: Op) -> list[Kernel]:
    """The kernels that other packages have for an op, in the order of their entry points."""
    return _kernels(op.name, op.definition)


@functools.cache
def _kernels(name: str, definition: Callable[..., Any]) -> list[Kernel]:
    return [_kernel(definition, a) for a in _found()[1] if a.op == name]


def _kernel(definition: Callable[..., Any], accelerator: Accelerator) -> Kernel:
    load = functools.cache(accelerator.load)

    @functools.cache
    def held(place: Place) -> str:
        try:
            why_not = _unequal(definition, accelerator, load(), place)
        except Exception as error:  # code of others: whatever it raises is the reason
            why_not = f"{type(error).__name__}: {error}"
        if why_not:
            log.warning("%s: %s of another package is not used: %s", accelerator.op, accelerator.name, why_not)
        return why_not

    def when(place: Place) -> str:
        if place.device == "meta":
            return "nothing runs on meta"
        try:
            why_not = accelerator.when(place)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"
        return why_not or held(place._replace(grad=False))

    return Kernel(accelerator.name, when, load, has_backward=False)


@functools.cache
def _found() -> tuple[list[Package], list[Accelerator]]:
    """Entry points and what they added; one that fails adds nothing."""
    there, all_added = [], []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        added: list[Accelerator] = []
        error = ""
        try:
            entry.load()(added.append)
            for a in added:
                if not isinstance(a, Accelerator) or a.name in OWN_NAMES:
                    raise ValueError(f"an Accelerator with a name of its own is to be added, and this is {a!r}")
        except Exception as failed:  # code of others: whatever it raises is the reason
            error, added = f"{type(failed).__name__}: {failed}", []
            log.warning("%s of group %s is not used: %s", entry.name, GROUP, error)
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
        there.append(Package(entry.name, package, tuple(a.op for a in added), error))
        all_added += added
    return there, all_added


def _unequal(definition: Callable[..., Any], accelerator: Accelerator, run: Callable[..., Any], place: Place) -> str:
    """How a kernel differs from the definition at a place; "" where it does not."""
    from pyrosome.testing.equal import from_definition

    count = 0
    for what, tolerance, (arguments, options) in _cases(accelerator, place):
        off = from_definition(run, definition, arguments, options)
        if not off <= tolerance:
            return f"it is {off:.1e} from the definition on {what}, and {tolerance:g} is allowed"
        count += 1
    return "" if count else f"there is no case of {place.format or place.dtype} to hold it to"


def _cases(accelerator: Accelerator, place: Place) -> Iterator[tuple[str, float, Case]]:
    """What a kernel is held to at a place: words, tolerance, arguments."""
    from pyrosome.testing.calls import all_calls

    device = torch.device(place.device)
    if accelerator.cases:
        for i, case in enumerate(accelerator.cases(device)):
            yield f"its case {i}", accelerator.tolerance or TOLERANCE, case
        return
    calls = sorted((call for call in all_calls() if call.op.name == accelerator.op), key=lambda call: call.num_bytes)
    here = (call for call in calls if _is_at(place, call.make(torch.device("meta"))))
    for call in itertools.islice(here, MOST_CASES):
        yield call.title, accelerator.tolerance or call.tolerance, call.make(device)


def _is_at(place: Place, case: Case) -> bool:
    """Whether arguments on meta are of the format and dtype of a place."""
    found = place_of(*case[0][:2])
    return (found.format, found.dtype) == (place.format, place.dtype)
