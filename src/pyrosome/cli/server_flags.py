"""Flags of `pyrosome serve`, and how much memory its cache gets where none is named."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyrosome.cgroups import available_memory as available_memory
from pyrosome.cli.accelerators import driver
from pyrosome.errors import RequestError

if TYPE_CHECKING:
    from pyrosome.checkpoint.index import CheckpointIndex

NUMERICS = {"trained": "fp8", "exact": "f32"}  # each with the cache rows it takes where none are named
KV_FORMATS = ("f32", "bf16", "fp8")
DIALECTS = ("preview", "0731")
SPARE_BYTES = 2 << 30  # for the system, the server and a step's own numbers
LEAST_BYTES, USUAL_BYTES = 64 << 20, 1 << 30

Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all, which needs keys.")]
Port = Annotated[int, typer.Option(help="Port to listen at; 0: any free one.")]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        help="The model's name in requests and answers; several times for several, the first is its own.",
        show_default="its directory's",
    ),
]
ExactNames = Annotated[bool, typer.Option("--exact-names", help="Refuse requests for models of other names.")]
Compat = Annotated[
    str,
    typer.Option(
        help="deepseek: the official API to the letter, with its refusals and its forced sampling. Else every client "
        "gets what it asks for.",
        show_default="none",
    ),
]
TokenizerDir = Annotated[
    Path | None, typer.Option("--tokenizer", help="Directory of the tokenizer.", show_default="the model's")
]
Dialect = Annotated[
    str | None,
    typer.Option(
        help=f"How the checkpoint writes its effort: {', '.join(DIALECTS)}.",
        show_default="as the checkpoint's files say",
    ),
]
Thinking = Annotated[
    bool,
    typer.Option("--thinking/--no-thinking", help="Whether a request that says nothing about it is thought about."),
]
Effort = Annotated[str, typer.Option(help="And how hard: low, high or max.")]
ReasoningField = Annotated[
    bool, typer.Option("--reasoning-field", help="Give thoughts as `reasoning` too, beside `reasoning_content`.")
]
MaxQueue = Annotated[int, typer.Option(help="Requests that wait for their turn; one more is answered 429.")]
Deadline = Annotated[
    float, typer.Option(help="Seconds a request may take, from its arrival to its end; 0: as long as it takes.")
]
KeepAlive = Annotated[float, typer.Option(help="Seconds between two signs of life while a prompt is computed.")]
Drain = Annotated[float, typer.Option(help="Seconds that running requests may go on at the end.")]
MaxBody = Annotated[float, typer.Option("--max-body-mib", help="Size of a request's body, in MiB.")]
Cors = Annotated[
    list[str] | None,
    typer.Option(
        "--cors", help="Origin whose pages may call from a browser; several times for several.", show_default="none"
    ),
]
AllowHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="Name the server may be called by where it needs no key; addresses and localhost always are.",
        show_default="none",
    ),
]
Keys = Annotated[
    str, typer.Option(help="Whether a key is needed: auto (on any address but this machine's own), required, off.")
]
SignUp = Annotated[bool, typer.Option("--sign-up", help="Whoever has an invite code may make an account.")]
UsageDays = Annotated[int, typer.Option(help="Days that lines of the usage ledger are kept; 0: for ever.")]
Certificate = Annotated[str, typer.Option("--tls-certificate", help="PEM file, for HTTPS.", show_default="none")]
TlsKey = Annotated[str, typer.Option("--tls-key", help="PEM file of its key.", show_default="none")]
NumericsName = Annotated[str, typer.Option("--numerics", help=f"Arithmetic: {', '.join(NUMERICS)}.")]
KvFormat = Annotated[
    str | None,
    typer.Option(help=f"Cache rows: {', '.join(KV_FORMATS)}.", show_default="fp8 for trained, f32 for exact"),
]
Cache = Annotated[
    float | None,
    typer.Option(
        "--cache-gib",
        help="Memory for the KV cache, in GiB.",
        show_default="half of what the weights leave, and no more than they take",
    ),
]
Sequences = Annotated[int, typer.Option(help="Sequences that are computed at once; more wait.")]
Context = Annotated[
    int, typer.Option(help="Tokens of one sequence; 0: as many as the model has positions for and the cache holds.")
]
Disk = Annotated[
    str, typer.Option("--disk", help="Folder for history that does not fit into memory.", show_default="none")
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="A plan of `pyrosome plan --out`: its options are taken, but for flags that are given.",
        show_default="none",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON line on standard output once requests are answered, and no advice.")
]


def memory_for(device: str) -> int:
    """Bytes that a model may still take on its device; 0 where nothing tells."""
    if device == "cpu":
        return available_memory()
    seen = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    number = int(device.partition(":")[2] or 0)
    number = int(seen[number]) if number < len(seen) and seen[number].isdigit() else number
    gpus = driver()["gpus"]
    return int(gpus[number]["memory_free"]) if number < len(gpus) else 0


def check_arithmetic(numerics: str, kv_format: str | None, dialect: str | None) -> str:
    """See that the names are known; returns the format of cache rows.

    Raises:
        RequestError: one is not.
    """
    for flag, value, known in (
        ("--numerics", numerics, tuple(NUMERICS)),
        ("--kv-format", kv_format or KV_FORMATS[0], KV_FORMATS),
        ("--dialect", dialect or DIALECTS[0], DIALECTS),
    ):
        if value not in known:
            raise RequestError(f"{flag} is {value!r}; it is one of {', '.join(known)}")
    return kv_format or NUMERICS[numerics]


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """How large a cache is made, and why."""

    num_bytes: int
    reason: str


def cache_size(
    index: CheckpointIndex, kv_format: str, max_sequences: int, max_context: int, available_bytes: int, *, mapped: bool
) -> CacheSize:
    """A cache for a model on a machine.

    Half of what the weights leave of the memory that is available, so that nothing else on the machine suffers; but no
    more than the weights themselves take, or the usual size where they are small, and no more than all sequences at
    full length take twice, once for those that run and once for prefixes that are kept.

    Args:
        available_bytes: 0: not known; then it is the usual size.
        mapped: routed experts stay in their files.
    """
    from pyrosome.cache.streams import plan_cache

    config = index.config
    context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
    plan = plan_cache(config, kv_format, 2 * max_sequences, context)
    weights = sum(t.nbytes for name, t in index.tensors.items() if not (mapped and ".experts." in name))
    sizes = [
        CacheSize(
            max(LEAST_BYTES, sum(b * plan.num_pages[r] for r, b in plan.page_bytes.items())),
            f"room for {max_sequences} sequences of {context:,} tokens, and as much again to reuse",
        ),
        CacheSize(max(USUAL_BYTES, weights), "as much as the weights take, or the usual size where they are small"),
    ]
    if available_bytes:
        left = CacheSize(
            max(LEAST_BYTES, (available_bytes - weights - SPARE_BYTES) // 2),
            f"half of what {weights / 2**30:,.1f} GiB of weights leave of {available_bytes / 2**30:,.1f} GiB available",
        )
    else:
        left = CacheSize(USUAL_BYTES, "the usual size, since this machine does not say what memory it has available")
    return min(*sizes, left, key=lambda s: s.num_bytes)


def at_least(size: CacheSize, num_bytes: int, context: int) -> CacheSize:
    """A cache that takes one sequence of the context that was asked for, whatever else speaks for a smaller one."""
    return size if size.num_bytes >= num_bytes else CacheSize(num_bytes, f"room for one sequence of {context:,} tokens")
