"""How far apart two results are, of anything that has tensors in it: what a kernel gave, and its definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PACKAGE = __package__.partition(".")[0]


def from_definition(
    run: Callable[..., Any], definition: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> float:
    """How far `run` is from the definition on the same arguments, which each is given a copy of.

    What a call writes into its arguments counts as what it gives.
    """
    given = [copy.deepcopy((arguments, options)) for _ in range(2)]
    results = []
    with torch.no_grad():
        for function, (positional, named) in zip((run, definition), given, strict=True):
            results.append((function(*positional, **named), positional, named))
    return difference(*results)


def difference(found: Any, wanted: Any) -> float:
    """The largest difference of any two tensors; infinite where they have other shapes.

    Of floats it is the root mean square relative to what was wanted, of anything else the share of unequal elements.
    """
    pairs = list(tensors(found)), list(tensors(wanted))
    if len(pairs[0]) != len(pairs[1]):
        return math.inf
    return max((_apart(a, b) for a, b in zip(*pairs, strict=True)), default=0.0)


def _apart(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not wanted.numel():
        return 0.0
    if not wanted.dtype.is_floating_point:
        return float((found != wanted).double().mean())
    found, wanted = found.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(found[~finite].nan_to_num(nan=1.5), wanted[~finite].nan_to_num(nan=1.5)):
        return math.inf
    off = float((found[finite] - wanted[finite]).norm() / wanted[finite].norm().clamp(min=1e-30))
    return off if math.isfinite(off) else math.inf


def same_bits(found: Any, wanted: Any) -> bool:
    """Whether all tensors of two results are equal to the bit."""
    pairs = list(tensors(found)), list(tensors(wanted))
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
        for a, b in zip(*pairs, strict=True)
    )


def alike(found: Any, wanted: Any, allowed: float) -> bool:
    """Equal to the bit, or within what is allowed where that is more than nothing."""
    return same_bits(found, wanted) or (allowed > 0 and difference(found, wanted) <= allowed)


def _bytes(x: Tensor) -> Tensor:
    # A copy: a tensor of one element counts as contiguous whatever its stride is, and then has no bytes to show.
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a value: in tuples, lists, tables and this package's objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif type(value).__module__.partition(".")[0] == PACKAGE:
        yield from tensors(vars(value) if hasattr(value, "__dict__") else _slots(value))


def _slots(value: Any) -> list[Any]:
    return [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
