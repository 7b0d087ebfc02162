"""Flags of the commands that generate: what the engine may use, and what it says of its work."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from typing import Annotated, Any

import typer

from pyrosome.engine.trace import checked_path
from pyrosome.errors import RequestError
from pyrosome.options import DRAFTERS, EXPERTS, NUMA, EngineOptions, LoadOptions

CACHE_GIB = EngineOptions().cache_bytes / 2**30

CacheGiB = Annotated[float, typer.Option("--cache-gib", help="Memory for the KV cache, in GiB; it bounds the context.")]
Drafter = Annotated[
    str,
    typer.Option(
        help=f"Who guesses tokens ahead: {', '.join(DRAFTERS)}. auto is the checkpoint's own MTP head, where it has "
        "one; tokens at temperature 0 are the same with each."
    ),
]
Experts = Annotated[
    str,
    typer.Option(
        help=f"Where routed experts are held: {', '.join(EXPERTS)}. mapped reads them in the checkpoint's files, which "
        "must not change meanwhile: slower, for less memory than they take."
    ),
]
LockMemory = Annotated[bool, typer.Option("--lock-memory", help="Never swap out quantised weights that are in memory.")]
Numa = Annotated[
    str,
    typer.Option(help=f"{', '.join(NUMA)}. auto spreads weights over memory nodes, where there are several."),
]
Device = Annotated[
    str,
    typer.Option("--device", help="Where the model runs: cpu, cuda, or cuda:N for one of several GPUs."),
]
LogEvery = Annotated[int, typer.Option(help="Steps between lines about the engine on standard error; 0: none.")]
TracePath = Annotated[
    str | None,
    typer.Option("--trace", help="File for a timeline of steps and requests, to be read at ui.perfetto.dev."),
]


def engine_options(cache_gib: float, drafter: str, log_every: int, trace: str | None) -> EngineOptions:
    """What the flags ask for, checked before anything is loaded.

    Raises:
        RequestError: a flag outside its range, or a trace that cannot be written where it is to be.
    """
    if not math.isfinite(cache_gib) or cache_gib * 2**30 < 1:
        raise RequestError(f"--cache-gib is {cache_gib}; a number of GiB above 0 was expected")
    if trace is not None:
        checked_path(trace)
    options = EngineOptions(
        cache_bytes=int(cache_gib * 2**30), drafter=drafter, log_every=log_every, trace_path=trace or ""
    )
    if log_every:  # asked for by name: whatever level the other lines have
        logging.getLogger("pyrosome.engine.engine").setLevel(logging.INFO)
    return options


def load_options(experts: str, lock_memory: bool, numa: str, device: str = "cpu") -> dict[str, Any]:
    """Keywords of `LLM` for what the flags change, checked before anything is loaded.

    Raises:
        RequestError: a flag outside its range, or experts that only a processor can read where they are.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RequestError(f"--device is {device!r}; it is cpu, cuda, or cuda:N for one of several GPUs")
    options = LoadOptions(experts, lock_memory, numa)
    options.check_device(device)
    usual, asked = dataclasses.asdict(LoadOptions()), dataclasses.asdict(options)
    changed = {name: value for name, value in asked.items() if value != usual[name]}
    return changed if device == "cpu" else {**changed, "device": device}
