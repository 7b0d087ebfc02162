"""What a check found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

Progress = Callable[[int, int, str], None]  # (done, in all, of what)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One question asked of a model and its answer.  `ok` None: it could not be asked, and `detail` says why.

    `figures` are kept in the receipt as they are.  Among them `plots` is a list of what `plots.drawn` takes, each
    {"title", "kind": "bars" or "lines", "x": labels or numbers, "series": {name: values}} with, if wanted, "x_title",
    "y_title", "bound" (a level drawn across), "log" (a logarithmic scale) and "low" and "high" (intervals, as series).
    """

    check: str  # the group: "files", "scales", "layers", "routes", ...
    what: str  # "layer 3, sparse_attention", "prompt cut at every token"
    ok: bool | None
    detail: str  # figures in words, with the bound they are held to
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the receipt's tables and plots
    warns: bool = False  # it holds, and somebody should look at it all the same


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
    device: str = "cpu"
    progress: Progress | None = dataclasses.field(default=None, compare=False)

    def tell(self, done: int, total: int, of_what: str) -> None:
        """Say how far a long check is."""
        if self.progress is not None:
            self.progress(done, total, of_what)


class Check(Protocol):
    """Findings as they come; a check never raises for what is wrong with a model."""

    def __call__(self, wanted: Wanted) -> Iterator[Finding]: ...
