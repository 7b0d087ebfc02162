"""Results of an evaluation as one JSON object: what was asked of which model, and the figures; kept, and as tables."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrosome import __version__
from pyrosome.checkpoint.fingerprint import fingerprint
from pyrosome.errors import RequestError
from pyrosome.evals.subject import Subject

Report = dict[str, Any]


def about(subject: Subject, name: str) -> dict[str, Any]:
    """Which model, and how it was run: the same fingerprint is the same checkpoint, numerics and row format."""
    model = subject.model
    return {
        "model": name,
        "fingerprint": fingerprint(model.index, model.numerics, model.kv_format)[:16],
        "numerics": model.numerics,
        "kv_format": model.kv_format,
        "window": model.config.sliding_window,
        "topk": model.config.index_topk,
        "draft_head": model.has_drafts,
    }


def report(evaluation: str, subject: Subject, name: str, command: str, seed: int, **rest: Any) -> Report:
    """A report of "recall", "text", "modes" or "tools": the model, what repeats the evaluation, and `rest`, figures."""
    return {
        "eval": evaluation,
        **about(subject, name),
        "seed": seed,
        "command": command,
        "version": __version__,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **rest,
    }


def check_out(path: Path) -> None:
    """Refuse a file that could not be written to, before minutes of work for it.

    Raises:
        RequestError
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise RequestError(f"results were to be appended to {path}: {error.strerror}; name another file") from None


def append(path: Path, one: Report) -> None:
    """Add a report to a file of reports, one on each line.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RequestError(f"results were to be appended to {path}: {error.strerror}; name another file") from None


def read(path: Path) -> list[Report]:
    """Every report of a file.

    Raises:
        RequestError: the file cannot be read, or a line of it is no report.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error}); name a file written by --out") from None
    out = []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if not isinstance(one, dict) or "eval" not in one:
            raise RequestError(f"line {number} of {path} is no result of an evaluation; name a file written by --out")
        out.append(one)
    return out


class Table(NamedTuple):
    """A heading, titles of columns (the first `left` are words, the others figures) and rows."""

    heading: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def tables(one: Report) -> list[Table]:
    """A report for people: its figures with their 95 % intervals, or standard errors where they are no shares."""
    return {"recall": _recall, "text": _text, "modes": _modes, "tools": _tools}[one["eval"]](one)


def share(found: dict[str, Any]) -> str:
    """A share of right answers with its interval; - where nothing was asked."""
    if not found["n"]:
        return "-"
    low, high = (f"{found[end]:.2f}".removeprefix("0") for end in ("low", "high"))  # three fit in a terminal's line
    return f"{found['share']:.3f} [{low}, {high}]"


def margin(found: dict[str, Any]) -> str:
    """A paired difference with its interval."""
    if not found["n"]:
        return "-"
    return f"{found['difference']:+.3f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _recall(one: Report) -> list[Table]:
    titles = ("ablation", "context", "n", "right", "beyond window", "first draft")
    out = [Table(_recall_heading(one), titles, [_recall_row(r) for r in one["results"]])]
    if one["results"]:
        out.append(_places([r for r in one["results"] if r["ablation"] == one["results"][0]["ablation"]]))
    if one.get("over_none"):
        rows = [(d["ablation"], str(d["context"]), str(d["n"]), margin(d)) for d in one["over_none"]]
        out.append(Table("ablations: difference to the whole model", ("ablation", "context", "n", "difference"), rows))
    if other := one.get("against"):
        heading = f"against {other['model']}, {other['numerics']} numerics"
        out.append(Table(heading, titles, [_recall_row(r) for r in other["results"]]))
        rows = [(d["ablation"], str(d["context"]), str(d["n"]), margin(d)) for d in other["differences"]]
        heading = f"{one['model']} over {other['model']}"
        out.append(Table(heading, ("ablation", "context", "n", "difference"), rows))
    return out


def _recall_heading(one: Report) -> str:
    return f"recall of {one['facts']} facts, {one['kind']}, {one['numerics']} numerics, seed {one['seed']}"


def _recall_row(r: dict[str, Any]) -> tuple[str, ...]:
    figures = (r["right"], r["beyond_window"], r["drafts"])
    return r["ablation"], str(r["context"]), str(r["right"]["n"]), *map(share, figures)


def _places(results: Sequence[dict[str, Any]]) -> Table:
    """Shares by length and by distance, a column for each context."""
    rows = [["prompt tokens", *("{}-{}".format(*x["tokens"]) for x in results)]]
    rows += [[f"mod 4: {r}", *(share(x["by_mod4"][r]) for x in results)] for r in results[0]["by_mod4"]]
    rows += [[f"mod 128: {r}", *(share(x["by_mod128"][r]) for x in results)] for r in results[0]["by_mod128"]]
    rows.append(["in window", *(share(x["in_window"]) for x in results)])
    for i, name in enumerate(("nearest quarter", "second", "third", "farthest")):
        quarters = [x["by_distance"][i] if i < len(x["by_distance"]) else None for x in results]
        rows.append([name, *(share(q) if q else "-" for q in quarters)])
        rows.append(["  tokens back", *(f"{q['from']}-{q['to']}" if q else "-" for q in quarters)])
    return Table(f"where, {results[0]['ablation']}", ("", *(f"{x['context']} tokens" for x in results)), rows)


def _text(one: Report) -> list[Table]:
    size = f"{one['tokens']:,} tokens, {one['bytes']:,} bytes"
    heading = f"{one['n']} held-out passages of {one['documents']} documents: {size}"
    rows = [_text_row(r, "") for r in one["results"]] + [_text_row(r, "+") for r in one["margins"]]
    return [Table(heading, ("", "bits per byte", "nats per token"), rows)]


def _text_row(r: dict[str, Any], sign: str) -> tuple[str, ...]:
    def figure(key: str) -> str:
        error = r[f"{key}_error"]
        return f"{r[key]:{sign}.3f} ± {'-' if error is None else format(error, '.3f')}"

    return r["name"], figure("bits_per_byte"), figure("nats_per_token")


def _modes(one: Report) -> list[Table]:
    titles = ("thinking", "n", "right", "thought tokens", "most", "cut", "first draft")
    rows = [
        (r["thinking"], str(r["right"]["n"]), share(r["right"]), f"{r['thought_tokens']['mean']:.1f}",
         str(r["thought_tokens"]["most"]), share(r["cut"]), share(r["drafts"]))
        for r in one["results"]
    ]  # fmt: skip
    margins = [
        (m["thinking"], m["over"], str(m["n"]), margin(m), "yes" if m["apart"] else "no") for m in one["margins"]
    ]
    head = ("thinking", "over", "n", "margin", "intervals apart")
    title = f"held-out sums of {one.get('terms', 2)} numbers, seed {one['seed']}"
    return [Table(title, titles, rows), Table("margins", head, margins, 2)]


_TOOL_ROWS = {
    "called": "look-ups: calls made",
    "well_formed": "of calls: well formed",
    "right": "look-ups: call right",
    "answer_right": "of right calls: answer to the result right",
    "exchange_right": "look-ups: whole exchange right",
    "direct_without_call": "no tool needed: answered without a call",
    "direct_right": "no tool needed: answered rightly",
    "drafts": "first draft",
}


def _tools(one: Report) -> list[Table]:
    rows = [[title, *(share(r[key]) for r in one["results"])] for key, title in _TOOL_ROWS.items()]
    heading = f"the tool lookup, thinking {one['thinking']}, seed {one['seed']}"
    return [Table(heading, ("", *(r["manner"] for r in one["results"])), rows)]
