"""What a check found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Finding:
    """One question asked of a model and its answer.  `ok` None: it could not be asked, and `detail` says why."""

    check: str  # the group: "files", "scales", "layers", "routes", ...
    what: str  # "layer 3, sparse_attention", "prompt cut at every token"
    ok: bool | None
    detail: str  # figures in words, with the bound they are held to
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the receipt's tables and plots


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How thoroughly to look."""

    model: str  # as `open_checkpoint` takes it
    quick: bool = False  # fewer samples of everything
    seed: int = 0
    numerics: str = "trained"
    logprobs: Path | None = None  # stored official vectors
    checksums: Path | None = None  # "sha256  name" lines; None: SHA256SUMS beside the shards, where there is one
    tokenizer: Path | None = None


class Check(Protocol):
    """Findings as they come; a check never raises for what is wrong with a model."""

    def __call__(self, wanted: Wanted) -> Iterator[Finding]: ...
