"""`pyrosome calibrate`: what this machine reaches, so that plans for it need not assume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.first_contact import BUILTIN
from pyrosome.cli.terminal import Screen
from pyrosome.errors import RequestError

if TYPE_CHECKING:
    from pyrosome.measure.steps import Sample
    from pyrosome.plan.calibration import Calibration

SECONDS = 120.0


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint: its drive is measured, and its own steps are predicted and timed.", show_default="none"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long it may take, about.")] = SECONDS,
    threads: Annotated[
        int, typer.Option(help="Threads of the engine.  [default: as many as it would use]", show_default=False)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every step that was timed.")] = False,
) -> None:
    """Time steps of a few networks on this machine, and fit to them what `pyrosome plan` then uses for it.

    The machine should have nothing else to do meanwhile.
    """  # fmt: skip
    from pyrosome.checkpoint.index import open_checkpoint

    if threads < 0:
        raise RequestError(f"--threads is {threads}; give 1 or more, or leave it out")
    index = open_checkpoint(model) if model else None

    import torch

    from pyrosome.measure.calibrate import calibrate as measured
    from pyrosome.plan.calibration import save

    screen = Screen()
    place = Path.cwd() if model in (None, BUILTIN) or index is None else Path(index.path)
    found, samples = measured(seconds, threads or torch.get_num_threads(), place, screen.notice)
    path = save(found)
    own = _own_steps(model, found, screen) if model else []
    if as_json:
        report = {"calibration": dataclasses.asdict(found), "path": str(path), "steps": _steps(samples, found),
                  "model": own}  # fmt: skip
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(screen, found, samples, path, own)


def _own_steps(model: str, found: Calibration, screen: Screen) -> list[dict[str, Any]]:
    from pyrosome.measure.own import own_steps
    from pyrosome.plan import history

    steps = own_steps(model, found.threads, screen.notice)
    for step in steps:
        history.keep(step["what"], step["predicted"], step["measured"], found.processor)
    return steps


def _steps(samples: list[Sample], found: Calibration) -> list[dict[str, Any]]:
    models = {s.shape.name: s.shape.model for s in samples}
    return [
        {
            "shape": s.shape.name, "sequences": s.load.sequences, "tokens": s.load.tokens, "context": s.load.context,
            "measured_s": s.seconds, "fitted_s": found.predicted(models[s.shape.name], s.load), "spread": s.spread,
        }
        for s in samples
    ]  # fmt: skip


def _print(screen: Screen, found: Calibration, samples: list[Sample], path: Path, own: list[dict[str, Any]]) -> None:
    from pyrosome.cli.tables import console, heading, table

    out = console(screen)
    heading(out, f"{found.processor}, {found.threads} thread{'s' * (found.threads != 1)}, kernels {found.level or '-'}")
    rows = [
        (
            s["shape"], f"{s['sequences']:,} x {s['tokens']:,}", f"{s['context']:,}", f"{1e3 * s['measured_s']:,.2f}",
            f"{1e3 * s['fitted_s']:,.2f}", f"{s['fitted_s'] / s['measured_s'] - 1:+.1%}",
        )
        for s in _steps(samples, found)
    ]  # fmt: skip
    table(out, ("network", "tokens", "at context", "measured ms", "fitted ms", "off by"), rows, left=2)
    heading(out, "what was fitted")
    for name, unit in (("read", "weights are read at"), ("rows", "cached rows are read at")):
        out.print(f"{unit} {_rate(found.seconds[name], 'GB/s')}")
    kinds = ("matrices", "experts", "plain", "streams", "attention", "indexer")
    out.print("arithmetic: " + ", ".join(f"{k} {_rate(found.seconds[k], 'GFLOP/s')}" for k in kinds))
    beside = (("layer", "a layer"), ("token", "a token in a layer"), ("step", "a step"))
    out.print("beside them: " + ", ".join(f"{what} {1e6 * found.seconds[k]:,.1f} us" for k, what in beside))
    out.print(f"off by {found.residual:.1%} (median), {found.worst:.1%} (most) of {found.points} steps")
    if own:
        heading(out, "this model")
        table(out, ("", "predicted", "measured", "off by"), [
            (s["what"] + s["at"], f"{s['predicted']:,.1f}", f"{s['measured']:,.1f}",
             f"{s['predicted'] / s['measured'] - 1:+.1%}") for s in own
        ])  # fmt: skip
    out.print(f"\nkept in {path}: `pyrosome plan` uses it for this machine until versions change")


def _rate(seconds: float, unit: str) -> str:
    return f"{1 / seconds / 1e9:,.1f} {unit}" if seconds else "(no time of its own)"
