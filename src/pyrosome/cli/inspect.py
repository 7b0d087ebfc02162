"""`pyrosome inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.first_contact import MODEL_HELP
from pyrosome.cli.terminal import CHECK_FAILED, Screen, printable, size
from pyrosome.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from pyrosome.checkpoint.index import CheckpointIndex
    from pyrosome.config import ModelConfig

CONTEXTS = (4096, 32768, 131072, 262144, 1048576)
FORMATS = ("fp8", "bf16")
LISTED = 10  # findings of each sort that are printed; --json has all
KINDS = {"window": "·", "CSA": "C", "HCA": "H"}
ROUTES = {"hash": "h", "bias": "b"}
BRIEF = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size", "sliding_window",
    "index_n_heads", "index_topk", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hc_mult",
    "max_position_embeddings", "expert_dtype",
)  # fmt: skip
FAULTS = ("missing", "unexpected", "wrong_shape", "wrong_dtype")  # each a list of the report, and status 1


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every finding.")] = False,
) -> None:
    """Show what a checkpoint holds and what it lacks; no tensor is read.

    Exit status 1 where tensors are missing, unexpected or wrong.
    """
    from pyrosome.checkpoint.index import open_checkpoint

    report = describe(open_checkpoint(model))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report, Screen())
    if not report["ok"]:
        raise typer.Exit(CHECK_FAILED)


def describe(index: CheckpointIndex) -> dict[str, Any]:
    """Everything `inspect` knows about a checkpoint, as plain data.  Sizes are in bytes."""
    from pyrosome.plan.inventory import count_parameters, part_of

    c = index.config
    findings = _findings(index)
    stages = index.num_stages
    return {
        "path": str(index.path),
        "release": c.release,
        "config": {key: getattr(c, key) for key in BRIEF},
        "unknown_config_keys": list(c.unknown_keys),
        "tensors": len(index.tensors),
        "bytes": index.nbytes,
        "by_dtype": _grouped((t.dtype, t.nbytes) for t in index.tensors.values()),
        "by_part": _grouped((part_of(n) or "unknown", t.nbytes) for n, t in index.tensors.items()),
        "parameters": count_parameters(c, 0 if findings["problem"] else stages),
        "layers": [{"attention": layer_kind(r), "routing": _route(c, i)} for i, r in enumerate(c.layer_ratios)],
        "draft": _draft(index),
        "kv": {f: _kv_bytes(c, f, drafts=stages > 0 and c.dspark is None) for f in FORMATS},
        **findings,
        "ok": not any(findings[key] for key in (*FAULTS, "problem")),
    }


def _findings(index: CheckpointIndex) -> dict[str, Any]:
    keys = (*FAULTS, "ignored")
    try:
        found = index.check()
    except CheckpointError as error:  # tensors that fit no release: there is no inventory to hold them against
        return {key: [] for key in keys} | {"problem": str(error)}
    return {key: list(getattr(found, key)) for key in keys} | {"problem": ""}


def layer_kind(ratio: int) -> str:
    """What a layer attends to, by its compress ratio: its window only, or compressed rows besides."""
    return "window" if not ratio else "CSA" if ratio == 4 else "HCA"


def _route(config: ModelConfig, layer: int) -> str:
    return "hash" if config.is_hash(layer) else "bias"


def _draft(index: CheckpointIndex) -> dict[str, Any]:
    if not index.has_drafts:
        return {"type": None, "stages": 0}
    d = index.config.dspark
    if d is None:
        return {"type": "MTP", "stages": index.num_stages}
    return {
        "type": "DSpark",
        "stages": index.num_stages,
        "block_size": d.block_size,
        "target_layers": list(d.target_layer_ids),
    }


def _kv_bytes(config: ModelConfig, kv_format: str, *, drafts: bool) -> dict[str, Any]:
    from pyrosome.cache.streams import plan_cache

    longest = config.max_position_embeddings
    contexts = [n for n in CONTEXTS if n < longest] + [longest]
    try:
        plan = plan_cache(config, kv_format, 1, longest, drafts=drafts)
    except CheckpointError as error:
        return {"refused": str(error)}
    return {"per_token": plan.bytes_per_token, "at": {str(n): plan.sequence_bytes(n) for n in contexts}}


def _grouped(items: Iterator[tuple[str, int]]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for key, num_bytes in items:
        group = groups.setdefault(key, {"tensors": 0, "bytes": 0})
        group["tensors"] += 1
        group["bytes"] += num_bytes
    return dict(sorted(groups.items(), key=lambda item: -item[1]["bytes"]))


def _print(report: dict[str, Any], screen: Screen) -> None:
    from pyrosome.cli.tables import console, heading, table

    out = console(screen)
    c, p = report["config"], report["parameters"]
    heading(out, report["path"])
    out.print(
        f"DeepSeek-V4, release {report['release']}: {c['num_hidden_layers']} layers of width {c['hidden_size']:,}, "
        f"{c['num_attention_heads']} heads of {c['head_dim']}, {c['n_routed_experts']} experts of "
        f"{c['moe_intermediate_size']:,} ({c['num_experts_per_tok']} per token), vocabulary {c['vocab_size']:,}, "
        f"context {c['max_position_embeddings']:,}"
    )
    out.print(
        f"{p['trunk']:,} parameters, {p['active']:,} active per token; draft head {p['draft']:,} more\n"
        f"{report['tensors']:,} tensors, {report['bytes']:,} bytes ({size(report['bytes'])})"
    )
    draft = report["draft"]
    about = (
        f", blocks of {draft['block_size']} tokens from layers {draft['target_layers']}"
        if "block_size" in draft
        else ""
    )
    out.print(
        f"draft head: {draft['type'] or 'none'}" + (f", {draft['stages']} stage(s){about}" if draft["type"] else "")
    )
    for title, key in (("dtype", "by_dtype"), ("part", "by_part")):
        table(
            out,
            (title, "tensors", "bytes", "share"),
            [
                (k, f"{g['tensors']:,}", f"{g['bytes']:,}", f"{g['bytes'] / max(report['bytes'], 1):.1%}")
                for k, g in report[key].items()
            ],
        )
    _print_map(report, out)
    _print_kv(report, out)
    _print_findings(report, out)


def _print_map(report: dict[str, Any], out: Console) -> None:
    from pyrosome.cli.tables import heading

    layers = report["layers"]
    counts = {k: sum(x["attention"] == k for x in layers) for k in KINDS}
    heading(out, "layers")
    out.print(", ".join(f"{KINDS[k]} {k} {n}" for k, n in counts.items()) + "; experts by h hash, b bias")
    per_row = max(10, (out.width - 8) // 10 * 10)
    for first in range(0, len(layers), per_row):
        row = layers[first : first + per_row]
        out.print("        " + "".join(f"{first + i:<10}" for i in range(0, len(row), 10)).rstrip())
        out.print("attend  " + "".join(KINDS[x["attention"]] for x in row))
        out.print("route   " + "".join(ROUTES[x["routing"]] for x in row))


def _print_kv(report: dict[str, Any], out: Console) -> None:
    from pyrosome.cli.tables import heading, table

    heading(out, "KV bytes of one sequence, windows and tails included")
    kv = report["kv"]
    stored = [f for f in FORMATS if "at" in kv[f]]
    if stored:
        contexts = list(kv[stored[0]]["at"])
        rows = [(f"{int(n):,}", *(f"{kv[f]['at'][n]:,}" for f in stored)) for n in contexts]
        per_token = ("per token more", *(f"{kv[f]['per_token']:,.2f}" for f in stored))
        table(out, ("context", *stored), [*rows, per_token])
    for f in FORMATS:
        if "refused" in kv[f]:
            out.print(f"{f}: {kv[f]['refused']}")


def _print_findings(report: dict[str, Any], out: Console) -> None:
    from pyrosome.cli.tables import heading

    heading(out, "check")
    for key in report["unknown_config_keys"]:
        out.print(printable(f"config.json has {key}, unknown here and without effect"))
    if report["ignored"]:
        out.print(f"ignored copies: {', '.join(report['ignored'])}")
    if report["problem"]:
        out.print(printable(report["problem"]))
    for key in FAULTS:
        title = key.replace("_", " ")
        names = report[key]
        for name in names[:LISTED]:
            out.print(printable(f"{title}: {name}"))
        if len(names) > LISTED:
            out.print(f"{title}: {len(names) - LISTED} more (--json lists all)")
    out.print("every tensor the configuration implies is there" if report["ok"] else "this checkpoint will not load")
