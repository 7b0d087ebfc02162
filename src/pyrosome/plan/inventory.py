"""One inventory of every tensor: what a checkpoint stores, and what a device holds of it once loaded.

The loader checks a checkpoint against it, the planner adds it up, and a test holds what is allocated to it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pyrosome.config import ModelConfig

Form = Literal["stored", "tiles", "float32"]  # as a GPU, as the native CPU kernels, or as torch on a small CPU holds it
Weights = Literal["native", "fp8", "w4a16", "bf16"]  # what is stored, where there is no checkpoint to look at

PARTS = (
    "routed experts", "shared experts", "attention", "indexer", "compressors", "routers", "hyper-connections",
    "norms", "embedding", "head", "draft head",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One weight with its scale, if it has one."""

    name: str
    part: str  # one of PARTS
    layer: int  # -1: of no layer (embedding, head, last norm); the draft stages come after the last
    expert: int  # -1: not of a routed expert
    shape: tuple[int, ...]  # logical
    dtype: str  # as the container names it; "I4" for INT4 in groups of 128
    stored_bytes: int  # scale included


@dataclasses.dataclass(frozen=True)
class Model:
    """What is planned for."""

    name: str
    config: ModelConfig
    num_stages: int  # draft stages that are loaded
    tensors: tuple[StoredTensor, ...]

    @classmethod
    def of(cls, config: ModelConfig, num_stages: int, weights: str = "native", name: str = "") -> Model:
        """From a configuration alone."""
        raise NotImplementedError

    @classmethod
    def open(cls, path_or_name: str, weights: str = "native") -> Model:
        """A preset ("flash", "flash-0731", "pro"), or what a checkpoint's headers say (directory, file, built-in)."""
        raise NotImplementedError


def held_bytes(tensor: StoredTensor, form: Form) -> int:
    """Bytes a device takes for a tensor once it is loaded, exactly."""
    raise NotImplementedError
