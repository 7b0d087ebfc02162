"""Calls of ops at V4-Flash's true shapes: compiled ahead of time, timed on a device, and held to the definitions.

One module for each op, with a function `calls() -> list[Call]`; `all_calls` has them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pyrosome.ops.seam import Op


class Call(NamedTuple):
    """One call of one op.  Shape letters: M rows (tokens) of the call."""

    op: Op
    name: str  # what is computed, as tables show it: "wq_b"
    rows: int  # M
    context: int  # tokens remembered, 0 where it does not matter
    make: Callable[[torch.device], tuple[tuple[Any, ...], dict[str, Any]]]  # arguments there; on meta without values
    num_bytes: int  # the least that is read and written: weights once, rows once
    flops: int = 0  # of products
    kind: str = ""  # whose products they are: "fp8", "bf16", "f32"
    tolerance: float = 1e-2  # relative RMS from the definition

    @property
    def title(self) -> str:
        """One line for tables."""
        context = f", context {self.context:,}" if self.context else ""
        return f"{self.op.name} {self.name}, M = {self.rows}{context}"


def all_calls(only: str = "") -> Iterator[Call]:
    """The calls of every op, or of the module `only`."""
    for module in pkgutil.iter_modules(__path__):
        if only in ("", module.name):
            yield from importlib.import_module(f"{__name__}.{module.name}").calls()
