"""Several processes that compute one step together: who owns which part, and how the parts become one again.

What ranks cut between them is cut into 8 virtual shards first, on one rank too, and sums over those are one tree: so
1, 2, 4 and 8 ranks add in the same order, and their bits are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

from pyrosome.errors import EngineError, PlanError

VIRTUAL_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Mesh:
    """One rank among `size`, which all make the same calls in the same order.  On one rank every call is the identity.

    Raises:
        PlanError: a number of ranks that does not divide 8, or a rank there is not.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or VIRTUAL_SHARDS % self.size:
            raise PlanError(
                f"{self.size} ranks were asked for; sums are cut into {VIRTUAL_SHARDS} shards, so use 1, 2, 4 or 8"
            )
        if not 0 <= self.rank < self.size:
            raise PlanError(f"rank {self.rank} was asked for; {self.size} ranks are numbered 0 to {self.size - 1}")

    @classmethod
    def single(cls) -> Mesh:
        """The mesh of one process."""
        return cls()

    def part(self, num: int) -> range:
        """Which of `num` things this rank owns: whole virtual shards, where thing i is of shard i * 8 // num."""
        return range(-(-num * self.rank // self.size), -(-num * (self.rank + 1) // self.size))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape, in order of rank: [size, ...].

        Raises:
            EngineError: another rank is gone.
        """
        if self.size == 1:
            return tensor[None]
        with self._exchange("an all-gather", tensor):
            out = tensor.new_empty(self.size, *tensor.shape)
            self._gather(list(out), tensor.contiguous())
        return out

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's part, as the tree that one rank adds in (`tree_sum`).

        Raises:
            EngineError: another rank is gone.
        """
        return part if self.size == 1 else tree_sum(self.all_gather(part))

    def all_reduce_exact(self, planes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The bytes of tensors whose every element one rank has, while all others have zeros in its place.

        Bytes are added as integers, each to zeros, so any value of any dtype arrives as it was sent.

        Raises:
            EngineError: another rank is gone.
        """
        if self.size == 1:
            return tuple(planes)
        raw = [plane.contiguous().view(torch.uint8).flatten() for plane in planes]
        joined = torch.cat(raw)  # one exchange, whatever the number of planes
        with self._exchange("an all-reduce", joined):
            self._add(joined)
        parts = joined.split([len(r) for r in raw])
        return tuple(part.view(p.dtype).view(p.shape) for part, p in zip(parts, planes, strict=True))

    def _gather(self, out: list[Tensor], tensor: Tensor) -> None:
        distributed.all_gather(out, tensor)

    def _add(self, tensor: Tensor) -> None:
        distributed.all_reduce(tensor)

    @contextlib.contextmanager
    def _exchange(self, what: str, tensor: Tensor) -> Iterator[None]:
        if tensor.requires_grad:
            raise PlanError(f"gradients were asked for on {self.size} ranks, and they do not cross ranks; use one rank")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"rank {self.rank} of {self.size} lost the others in {what} of {tensor.numel():,} elements "
                f"({_first_sentence(error)}); start all ranks again, each from `init`"
            ) from error


def tree_sum(parts: Tensor) -> Tensor:
    """Sum of a power of two of parts [S, ...], neighbours first: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


def init(rank: int, size: int, init_method: str, *, timeout_s: float = 60.0) -> Mesh:
    """Meet the other ranks, over gloo; one rank meets nobody and returns at once.

    Args:
        init_method: where to meet, the same for all: "file:///shared/path" (a file that is not there yet) or
            "tcp://host:port" (rank 0's).
        timeout_s: how long to wait for the others, here and in every exchange.

    Raises:
        PlanError: the others did not come, this process has met others already, or torch has no gloo.
    """
    mesh = Mesh(rank, size)
    if size == 1:
        return mesh
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise PlanError(f"{size} ranks were asked for and this torch was built without gloo; use one rank")
    if distributed.is_initialized():
        raise PlanError(f"{size} ranks were asked for and this process is in a group already; `close` it first")
    try:
        distributed.init_process_group(
            "gloo",
            init_method=init_method,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise PlanError(
            f"rank {rank} of {size} waited at {init_method} and did not meet the others ({_first_sentence(error)}); "
            "start every rank with the same place and size, and give a file that is not there yet or a free port"
        ) from error
    return mesh


def close() -> None:
    """Leave the group that `init` met, if any: to be called before the process ends."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
