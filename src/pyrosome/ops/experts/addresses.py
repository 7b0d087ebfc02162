"""Where each expert's matrices are in memory: what kernels read experts through, wherever they live."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrosome.quant import QuantTensor

CODES_PER_WORD = 8
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
    return Addresses(table, kind, D, I, aligned, planes)


def kind_of(weight: Tensor | QuantTensor) -> str:
    """How kernels read it; "" where they do not."""
    if isinstance(weight, Tensor):
        return _KINDS.get(weight.dtype, "")
    if type(weight) is not QuantTensor or (weight.format == "fp4" and weight.shape[-1] % CODES_PER_WORD):
        return ""
    return weight.format if weight.format in ("fp8", "fp4") else ""


def _planes(weight: Tensor | QuantTensor, lead: int) -> tuple[Tensor, Tensor | None]:
    """Data and scale, each expert's one piece; FP4 is read by words, and begins where one may."""
    if isinstance(weight, Tensor):
        return _in_pieces(weight, lead), None
    data = weight.data.clone() if weight.format == "fp4" and weight.data.data_ptr() % 4 else weight.data
    return _in_pieces(data, lead), _in_pieces(weight.scale, lead)


def _in_pieces(plane: Tensor, lead: int) -> Tensor:
    rows, step = plane.stride()[lead:]
    one_piece = step == 1 and rows == plane.shape[-1]
    return plane if one_piece or plane.numel() == 0 else plane.contiguous()


@functools.lru_cache(maxsize=4096)
def _table(places: tuple[tuple[int, int], ...], num: int, device: torch.device) -> Tensor:
    # What it says follows from its key alone: where memory is used again, so is its table, and rightly.
    return torch.tensor([[at + e * step for e in range(num)] for at, step in places], dtype=torch.int64).to(device)
