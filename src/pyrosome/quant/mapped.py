"""Weights read in place: matrices that stay in their files, mapped into memory and brought in when they are used.

Nothing is copied, so what takes memory is the system's cache of the files, which it gives up when it needs the room.
A file must not change while it is mapped: values would change with it, and reading past the end of one that was cut
ends the process.  Replacing it by another of the same name, as downloads do, is harmless.
Shape letters: E matrices of a stack, N output rows, K inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pyrosome.errors import WrongShape
from pyrosome.quant.formats import QuantTensor, Shape


def map_file(path: Path) -> Tensor:
    """The bytes of a file, uint8, read-only, mapped as long as a view of them is held.

    Raises:
        OSError: there is no such file, or it cannot be mapped.
        ValueError: it is empty.
    """
    with path.open("rb") as f:
        # Shared and read-only: such pages count against no limit on what may be promised, so a file may be larger than
        # memory and swap together, which a private mapping that could be written may not.
        mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to weights
        return torch.frombuffer(mapping, dtype=torch.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class MappedStack(QuantTensor):
    """A stack [E, N, K] whose matrices lie apart, each as stored; there is no `data` or `scale` of all of them.

    Raises:
        WrongShape: a matrix is of another shape or format than was said, or its bytes do not lie in a row.
    """

    matrices: tuple[QuantTensor, ...] = ()
    num_rows: int = 0
    num_inputs: int = 0

    @classmethod
    def of(cls, kind: str, matrices: tuple[QuantTensor, ...], num_rows: int, num_inputs: int) -> MappedStack:
        """The stack of these matrices, each [num_rows, num_inputs] in format `kind`."""
        nothing = torch.empty(0, dtype=torch.uint8)
        return cls(kind, nothing, nothing, matrices, num_rows, num_inputs)

    def __post_init__(self) -> None:
        for i, m in enumerate(self.matrices):
            if (m.format, m.shape) != (self.format, (self.num_rows, self.num_inputs)):
                raise WrongShape(
                    f"matrix {i} of a mapped stack is {m.format} {m.shape} and the stack is of {self.format} "
                    f"{(self.num_rows, self.num_inputs)}; a stack's matrices are alike"
                )
            if not (m.data.is_contiguous() and m.scale.is_contiguous()):
                raise WrongShape(f"matrix {i} of a mapped stack does not lie in one piece; give it as its file has it")

    @property
    def shape(self) -> Shape:
        """Logical shape [E, N, K]."""
        return (len(self.matrices), self.num_rows, self.num_inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices in their files; how many of them are in memory is the system's to decide."""
        return sum(m.nbytes for m in self.matrices)

    @functools.cached_property
    def table(self) -> Tensor:
        """Where each matrix's data and scale are, int64 [E, 2] addresses: how kernels find them."""
        found = [(m.data.data_ptr(), m.scale.data_ptr()) for m in self.matrices]
        return torch.tensor(found, dtype=torch.int64).view(-1, 2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exact values [E, N, K], rounded only where `dtype` cannot hold them; NaN under a NaN scale."""
        if not self.matrices:
            return torch.empty(self.shape, dtype=dtype)
        return self._copied(range(len(self.matrices))).dequantize(dtype)

    def index_select(self, index: Tensor) -> QuantTensor:
        """A copy of the matrices `index` (integers [M]), still as stored."""
        return self._copied(index.tolist())

    def to(self, device: torch.device | str) -> QuantTensor:
        """A copy of all matrices on `device`."""
        return self._copied(range(len(self.matrices))).to(device)

    def _copied(self, numbers: range | list[int]) -> QuantTensor:
        if not len(numbers):
            raise WrongShape("no matrix of a mapped stack was asked for; ask for one at least")
        chosen = [self.matrices[i] for i in numbers]
        return QuantTensor(self.format, _stacked([m.data for m in chosen]), _stacked([m.scale for m in chosen]))

    def __deepcopy__(self, memo: object) -> MappedStack:
        return self  # it cannot change, and a copy of a view would be a copy of its whole file


def _stacked(parts: list[Tensor]) -> Tensor:
    # Eight-bit floats are not stacked on every version of torch: their bytes are.
    return torch.stack([p.view(torch.uint8) for p in parts]).view(parts[0].dtype)
