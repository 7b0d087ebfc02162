"""Where each expert's matrices are in memory: what kernels read experts through, wherever they live."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrosome.quant import QuantTensor

CODES_PER_WORD = {"fp4": 8, "fp8": 4}  # 32 bits
MOST_KNOWN = 4096
_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Addresses(NamedTuple):
    """Experts of one shape, stored alike: data and scale of w1, w3 and w2 of each."""

    table_6E: Tensor  # int64: w1 data, w1 scale, w3 data, w3 scale, w2 data, w2 scale; no scale is 0
    kind: str  # "fp4", "fp8", "bf16", "f32" or "f16"
    hidden: int  # D
    inner: int  # I
    aligned: bool  # every address is a multiple of 16 bytes
    planes: tuple[Tensor | None, ...]  # what the table points at, held as long as it is used

    @property
    def num(self) -> int:
        """E."""
        return self.table_6E.shape[1]


def addresses_of(weights: Sequence[Tensor | QuantTensor]) -> Addresses | None:
    """Of w1 and w3 [E, I, D] and w2 [E, D, I], or of one expert's; None where kernels do not read them.

    Experts may lie apart, as long as each is one piece; else they are copied.

    Raises:
        RuntimeError: the shapes are not those of experts.
    """
    said = tuple(map(_facts, weights))
    if found := _known.get(said):
        return found._replace(planes=_stored(weights))
    kinds = {kind_of(w) for w in weights}
    kind = kinds.pop()
    if kinds or not kind:
        return None
    *lead, I, D = weights[0].shape  # noqa: E741
    shapes = [tuple(w.shape) for w in weights]
    if len(lead) > 1 or shapes != [(*lead, I, D), (*lead, I, D), (*lead, D, I)]:
        raise RuntimeError(
            f"experts were given with w1, w3 and w2 of {', '.join(map(str, shapes))}; they are [E, I, D], [E, I, D] "
            "and [E, D, I]"
        )
    planes = tuple(plane for w in weights for plane in _planes(w, len(lead)))
    E = lead[0] if lead else 1
    places = tuple(
        (0, 0) if p is None else (p.data_ptr(), p.stride(0) * p.element_size() if lead else 0) for p in planes
    )
    aligned = all(at % 16 == 0 and step % 16 == 0 for at, step in places)
    device = weights[0].device
    table = torch.empty(6, E, dtype=torch.int64, device="meta") if device.type == "meta" else _table(places, E, device)
    found = Addresses(table, kind, D, I, aligned, planes)
    if all(mine is given for mine, given in zip(planes, _stored(weights), strict=True)):
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[said] = found._replace(planes=())
    return found


def _facts(weight: Tensor | QuantTensor) -> tuple[Any, ...]:
    """All that addresses follow from, as fast as it can be asked: every layer asks in every step."""
    planes = (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scale)
    said = ((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in planes)
    return (type(weight), "" if isinstance(weight, Tensor) else weight.format, weight.device, *said)


def _stored(weights: Sequence[Tensor | QuantTensor]) -> tuple[Tensor | None, ...]:
    return tuple(p for w in weights for p in ((w, None) if isinstance(w, Tensor) else (w.data, w.scale)))


def kind_of(weight: Tensor | QuantTensor) -> str:
    """How kernels read it; "" where they do not."""
    if isinstance(weight, Tensor):
        return _KINDS.get(weight.dtype, "")
    if type(weight) is not QuantTensor or weight.shape[-1] % CODES_PER_WORD.get(weight.format, 1):
        return ""
    return weight.format if weight.format in CODES_PER_WORD else ""


def _planes(weight: Tensor | QuantTensor, lead: int) -> tuple[Tensor, Tensor | None]:
    """Data and scale, each expert's one piece; codes are read by words, and begin where one may."""
    if isinstance(weight, Tensor):
        return _in_pieces(weight, lead), None
    data, apart = weight.data, weight.data.stride(0) if lead else 0
    if data.data_ptr() % 4 or apart % 4:
        data = data.clone(memory_format=torch.contiguous_format)
    return _in_pieces(data, lead), _in_pieces(weight.scale, lead)


def _in_pieces(plane: Tensor, lead: int) -> Tensor:
    rows, step = plane.stride()[lead:]
    one_piece = step == 1 and rows == plane.shape[-1]
    return plane if one_piece or plane.numel() == 0 else plane.contiguous()


_known: dict[tuple[Any, ...], Addresses] = {}  # of experts that are not copied, without their planes


@functools.lru_cache(maxsize=MOST_KNOWN)
def _table(places: tuple[tuple[int, int], ...], num: int, device: torch.device) -> Tensor:
    # What it says follows from its key alone: where memory is used again, so is its table, and rightly.
    return torch.tensor([[at + e * step for e in range(num)] for at, step in places], dtype=torch.int64).to(device)
