"""`pyrosome doctor`: this machine, this installation, and whether it computes what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome import env
from pyrosome.cli import machine
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP
from pyrosome.cli.terminal import CHECK_FAILED, Screen, loading, printable, size
from pyrosome.errors import KernelUnavailable

if TYPE_CHECKING:
    from rich.console import Console


def doctor(
    model: Annotated[str, typer.Argument(help=f"The self-test's model. {MODEL_HELP}")] = BUILTIN,
    self_test: Annotated[bool, typer.Option(help="Load the model and run three prompts.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check this machine and this installation, with a self-test of three prompts.

    Exit status 1 where the self-test fails.
    """
    from pyrosome.checkpoint.index import open_checkpoint

    screen = Screen()
    if self_test:
        open_checkpoint(model)  # a wrong path is said at once, before torch is loaded
    report: dict[str, Any] = {
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "gpus": machine.gpus(),
        "disk": machine.disk(Path.cwd() if model == BUILTIN else Path(model).expanduser()),
        "versions": machine.versions(),
        "environment": machine.variables(),
        "model": model,
        "self_test": _self_test(model, screen) if self_test else [],
        "ops": choices(),
        "native": _native(),
    }
    report["ok"] = all(f["ok"] for f in report["self_test"]) and not any(o["error"] for o in report["ops"])
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report, screen)
    if not report["ok"]:
        raise typer.Exit(CHECK_FAILED)


def _self_test(model: str, screen: Screen) -> list[dict[str, Any]]:
    from pyrosome.cli.self_test import self_test
    from pyrosome.llm import load_model

    with loading(screen) as progress:
        loaded = load_model(model, numerics="exact", progress=progress)
    try:
        return self_test(loaded, model)
    except (KernelUnavailable, RuntimeError) as error:  # a kernel that cannot run here, or one that failed
        return [{"check": "runs", "prompt": "", "ok": False, "detail": str(error)}]


def _native() -> dict[str, str]:
    """The vector instructions native kernels use here, or why there are none."""
    from pyrosome.ops import native

    try:
        return {"level": native.level(), "error": ""}
    except OSError as error:
        return {"level": "", "error": str(error)}


def choices() -> list[dict[str, Any]]:
    """For each op, at each place it ran at in this process: the version chosen, and why not the others."""
    import pyrosome.model.deepseek_v4  # noqa: F401  # every op of the network registers itself
    from pyrosome.ops.seam import OPS, Place

    found = []
    for name, op in sorted(OPS.items()):
        for place in sorted(op.passed_over) or [Place("cpu", (0, 0), "", False)]:
            chosen, error = "", ""
            try:
                chosen = op.pick(place).name
            except KernelUnavailable as refused:
                error = str(refused)
            found.append(
                {
                    "op": name,
                    "device": place.device,
                    "format": place.format,
                    "chosen": chosen,
                    "passed_over": list(op.passed_over[place]),
                    "versions": ["torch", *(k.name for k in op.kernels)],
                    "error": error,
                }
            )
    return found


def _print(report: dict[str, Any], screen: Screen) -> None:
    from pyrosome.cli.tables import console, heading, table

    out = console(screen)
    heading(out, "machine")
    _print_machine(report, out)
    heading(out, "versions")
    out.print(", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items()))
    heading(out, "environment")
    for name, value in report["environment"]["set"].items():
        out.print(printable(f"{name}={value}"))
    for name in report["environment"]["unknown"]:
        out.print(printable(f"{name} is set, and nothing here reads it: is it misspelt?"))
    if not any(report["environment"].values()):
        out.print("no variable is set that matters here")
    heading(out, "ops")
    rows = [(o["op"], o["device"], o["format"] or "-", o["chosen"] or "none", _why(o)) for o in report["ops"]]
    native = report["native"]
    out.print(printable(f"native kernels: {native['level'] or 'none, ' + native['error']}"))
    table(out, ("op", "device", "format", "version", "why"), rows, left=5)
    if report["self_test"]:
        heading(out, f"self-test of {report['model']}")
        for f in report["self_test"]:
            out.print(printable(f"{'ok  ' if f['ok'] else 'FAIL'}  {f['check']}: {f['prompt']!r}: {f['detail']}"))
    heading(out, "all is well" if report["ok"] else "something is wrong: see FAIL above")


def _why(op: dict[str, Any]) -> str:
    if op["error"] or op["passed_over"]:
        return printable(op["error"] or "; ".join(op["passed_over"]))
    if len(op["versions"]) == 1:
        return "the definition is the only version"
    return f"asked for by {env.OPS.name}" if op["chosen"] == "torch" else "the first that applies"


def _print_machine(report: dict[str, Any], out: Console) -> None:
    cpu, memory, disk = report["cpu"], report["memory"], report["disk"]
    out.print(f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} of {cpu['cores']} cores usable")
    if cpu["flags"] is not None:
        there = [f for f, found in cpu["flags"].items() if found]
        out.print(f"instructions: {', '.join(there) or 'none of those that matter'}")
    out.print(f"memory {size(memory['total'])}, {size(memory['available'])} available")
    for gpu in report["gpus"]:
        out.print(f"{gpu['name']}, capability {gpu['capability']}, {size(gpu['memory'])}")
    if not report["gpus"]:
        out.print("no GPU that torch can use")
    out.print(f"{size(disk['free'])} free at {disk['path']}")
