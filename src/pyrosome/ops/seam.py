"""The one place where an operation chooses how to run.

An op is written once, in plain torch, as the definition of what it means.
Faster versions register beside it and say when they apply.  The choice is made
once per (device, dtype, weight or cache format, gradients on), remembered, and the
reasons for every version that was passed over are kept for `pyrosome doctor`.
A version that is asked for by name and cannot run is an error, never a silent
definition.

    PYROSOME_OPS=torch             run every op by its definition
    PYROSOME_OPS=compress:torch    run one op by its definition
    PYROSOME_OPS=-triton           run every op without the version of this name; compress:-triton one op
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pyrosome import env
from pyrosome.errors import KernelUnavailable

log = logging.getLogger(__name__)
OPS: dict[str, Op] = {}


class Place(NamedTuple):
    """What the choice of a kernel depends on: everything else is an argument."""

    device: str
    capability: tuple[int, int]  # (0, 0) on CPU
    format: str  # of the weight or cache the op reads; "" for plain tensors
    grad: bool
    dtype: str = "float32"  # of the first argument


class Kernel(NamedTuple):
    name: str
    when: Callable[[Place], str]  # "" where it applies, else the reason why not
    load: Callable[[], Callable[..., Any]]
    has_backward: bool


class Version(NamedTuple):
    """What an op runs at some place: the definition, named "torch", or a kernel under its own name."""

    name: str
    run: Callable[..., Any]


class Op:
    """A definition, the kernels beside it, and the choice made for each place.

    The place is read off the first argument; an op that reads a stored weight or
    cache takes it as its second, whose `format` then counts.
    """

    def __init__(self, definition: Callable[..., Any]) -> None:
        functools.update_wrapper(self, definition)
        self.name, self.definition = definition.__name__, definition
        self.kernels: list[Kernel] = []
        self.choice, self.without = _choice_from_env(self.name)
        self.passed_over: dict[Place, list[str]] = {}
        self._picked: dict[tuple[torch.device, torch.dtype, str, bool], Callable[..., Any]] = {}
        OPS[self.name] = self

    def kernel(self, name: str, when: Callable[[Place], str], *, has_backward: bool = False) -> Callable[..., Any]:
        """Register a loader.  It runs once, on first use; failing to load is a recorded reason."""

        def register(load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
            self.kernels.append(Kernel(name, when, functools.cache(load), has_backward))
            self._picked.clear()
            return load

        return register

    @property
    def versions(self) -> list[Kernel]:
        """All kernels in the order in which they are asked: those of other packages before Triton's."""
        from pyrosome.ops import accelerators  # which is made of what is here

        at = next((i for i, k in enumerate(self.kernels) if k.name == "triton"), len(self.kernels))
        return [*self.kernels[:at], *accelerators.kernels(self), *self.kernels[at:]]

    def pick(self, place: Place) -> Version:
        """What runs at `place`.

        Raises:
            KernelUnavailable: a kernel was asked for by name and cannot run there.
        """
        reasons = self.passed_over[place] = []
        for k in self.versions if self.choice != "torch" else ():
            if self.choice not in ("auto", k.name):
                reasons.append(f"{k.name}: not asked for")
            elif self.choice == "auto" and k.name in self.without:
                reasons.append(f"{k.name}: left out by {env.OPS.name}")
            elif place.grad and not k.has_backward:
                reasons.append(f"{k.name}: no backward")
            elif why_not := k.when(place):
                reasons.append(f"{k.name}: {why_not}")
            else:
                try:
                    return Version(k.name, k.load())
                except (ImportError, OSError) as error:
                    log.warning("%s: the %s kernel did not load: %s", self.name, k.name, error)
                    reasons.append(f"{k.name}: {error}")
        if self.choice not in ("auto", "torch"):
            raise KernelUnavailable(
                f"{self.name}: version {self.choice!r} was asked for and cannot run on {place.device} in {place.dtype} "
                f"({'; '.join(reasons) or 'there is none'}); {env.OPS.name} chooses versions, 'auto' takes what can run"
            )
        return Version("torch", self.definition)

    def chosen(self, *args: Any) -> str:
        """Name of what a call with these arguments runs: tests and `doctor` assert on it."""
        return self.pick(place_of(*args[:2])).name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A step makes hundreds of calls: the remembered choice is found by what is at hand, without building a Place.
        key = (
            args[0].device,
            args[0].dtype,
            getattr(args[1], "format", "") if len(args) > 1 else "",
            torch.is_grad_enabled(),
        )
        run = self._picked.get(key)
        if run is None:
            run = self._picked[key] = self.pick(place_of(*args[:2])).run
        return run(*args, **kwargs)


@functools.cache
def _capability(device: str, index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if device == "cuda" else (0, 0)


def place_of(x: Any, stored: Any = None) -> Place:
    """Where a call with first arguments `x` and `stored` runs."""
    device = x.device
    return Place(
        device.type,
        _capability(device.type, device.index or 0),
        getattr(stored, "format", ""),
        torch.is_grad_enabled(),
        str(x.dtype).removeprefix("torch."),
    )


@contextlib.contextmanager
def use(op: Op, choice: str) -> Iterator[None]:
    """Force one implementation inside a block: `with use(compress, "torch"): ...`."""
    before, op.choice = op.choice, choice
    op._picked.clear()
    try:
        yield
    finally:
        op.choice = before
        op._picked.clear()


def _choice_from_env(name: str) -> tuple[str, frozenset[str]]:
    """The version asked for, and those that are not to run."""
    spec: dict[str, str] = {}
    without = set()
    for part in filter(None, map(str.strip, env.OPS.get().split(","))):
        op, _, version = part.rpartition(":")
        if version.startswith("-"):
            without |= {version[1:]} if op in ("", name) else set()
        else:
            spec[op] = version
    return spec.get(name, spec.get("", "auto")), frozenset(without)
