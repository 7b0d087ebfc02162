"""Whether a row of a call has the same bits alone as among others, for calls whose arguments can be cut to one row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrosome.testing.equal import alike, difference, tensors


class NotCut(Exception):
    """Arguments that say of rows what cannot be seen: index tensors, layouts."""


def same_alone(
    run: Callable[..., Any],
    definition: Callable[..., Any],
    rows: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    allowed: float = 0.0,
) -> bool | None:
    """Whether the first and the last row have the bits that they have among all; None where one cannot be cut out.

    What is cut is every tensor with as many rows.  That this is the same call for one row is asked of the definition.

    Args:
        allowed: relative RMS that passes for equal bits, where bits are not a device's own.
    """
    if rows < 2:
        return None
    with torch.no_grad():
        try:
            alone = {at: (cut(arguments, rows, at), cut(options, rows, at)) for at in (0, rows - 1)}
        except NotCut:
            return None
        together = list(tensors(run(*copy.deepcopy(arguments), **copy.deepcopy(options))))
        wanted = list(tensors(definition(*copy.deepcopy(arguments), **copy.deepcopy(options))))
        if not together or any(t.shape[:1] != (rows,) for t in (*together, *wanted)):
            return None
        for at, (positional, named) in alone.items():
            try:
                meant = list(tensors(definition(*copy.deepcopy(positional), **copy.deepcopy(named))))
            except (RuntimeError, ValueError, IndexError, TypeError):
                return None
            if difference(meant, _row(wanted, at)) > 1e-3:  # float sums may differ a little
                return None
            found = list(tensors(run(*copy.deepcopy(positional), **copy.deepcopy(named))))
            if not alike(found, _row(together, at), allowed):
                return False
    return True


def _row(results: list[Tensor], at: int) -> list[Tensor]:
    return [t[at : at + 1] for t in results]


def cut(value: Any, rows: int, at: int) -> Any:
    """A value with row `at` alone of every tensor that has so many rows; what is stored stays whole.

    Raises:
        NotCut: integers tell of rows, and are not cut with them.
    """
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == rows:
            return value[at : at + 1]
        if value.dim() and not value.dtype.is_floating_point and value.dtype not in (torch.bool, torch.uint8):
            raise NotCut
        return value
    if isinstance(value, dict):
        return {key: cut(part, rows, at) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(part, int) for part in value):
            raise NotCut
        parts = [cut(part, rows, at) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
