"""`pyrosome train`: run a recipe, go on with one, or say what it would do."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.data import RECIPE_HELP, Set, marked_text, num_learnt, samples_of, segments
from pyrosome.cli.terminal import INTERRUPTED, Screen, Stop, can_style, size
from pyrosome.errors import RequestError

if TYPE_CHECKING:
    from pyrosome.train.recipe import Mix, Recipe, Stage

DEVICES = ("cpu", "cuda")
RUNS = Path("runs")
_KEPT_TOKENS = (16, 40)  # of a sample, at its beginning and its end
_TRAINING_BYTES = 16  # of a parameter: float32 master, the network's copy, gradient, momentum
_ADAMW_BYTES = 4  # more, of embedding and head: the second moment


def train(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    out: Annotated[Path | None, typer.Option(help="The run's directory.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there, if one is.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; nothing is written.")] = False,
    overrides: Set = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="probed")] = None,
    device: Annotated[str, typer.Option(help=f"Where to train: {' or '.join(DEVICES)}.")] = "cpu",
    seconds: Annotated[float | None, typer.Option(help="Save and stop after so long.", show_default="no limit")] = None,
    start_from: Annotated[
        Path | None, typer.Option("--from", help="A checkpoint to begin with.", show_default="seeded")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Train the network a recipe describes; a run that was cut off goes on with --resume.

    The result goes to standard output, progress to standard error.  Ctrl-C saves and stops it.
    """
    from pyrosome.train.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    if device not in DEVICES:
        raise RequestError(f"--device is {device!r}; it is {' or '.join(DEVICES)}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise RequestError(f"--seconds is {seconds}; give a number above 0, or leave it out to train to the end")
    loaded.check_samples()
    screen = Screen()
    if dry_run:
        report = describe(loaded)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            _print(report, screen)
        return
    directory = out or RUNS / loaded.name
    _check_directory(directory, resume)
    result = _run(loaded, directory, resume, threads, device, seconds, start_from, screen)
    report = {"directory": str(directory), **dataclasses.asdict(result)}
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, default=str))
        return
    for key, found in report.items():
        screen.text(f"{key.replace('_', ' ')}: {_shown(found)}\n")


def _check_directory(directory: Path, resume: bool) -> None:
    from pyrosome.train.state import has_state

    if has_state(directory) and not resume:
        raise RequestError(
            f"{directory} holds a run already; give --resume to go on with it, or another directory with --out"
        )


def _run(
    recipe: Recipe,
    directory: Path,
    resume: bool,
    threads: int | None,
    device: str,
    seconds: float | None,
    start_from: Path | None,
    screen: Screen,
) -> Any:
    from rich.console import Console

    from pyrosome.train import trainer
    from pyrosome.train.progress import Progress

    styled = screen.err_is_terminal and can_style()
    console = Console(file=screen.err, force_terminal=styled, highlight=False, emoji=False, markup=False)
    progress = Progress(recipe, console)  # the trainer begins and ends it
    try:
        with Stop() as asked:
            result = trainer.train(
                recipe, directory, resume=resume, threads=threads, device=device, seconds=seconds, progress=progress,
                start_from=start_from, stop=lambda: asked.asked,
            )  # fmt: skip
        if not asked.asked or result.finished:
            return result
        screen.notice(f"stopped and saved; go on with --resume --out {directory}")
    except KeyboardInterrupt:  # the second one: in the middle of a step
        screen.notice(f"stopped; go on from what was saved last with --resume --out {directory}")
    raise typer.Exit(INTERRUPTED) from None


def _shown(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in found.items()) or "none"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, int):
        return f"{found:,}"
    return f"{found:,.4g}" if isinstance(found, float) else str(found)


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe would do, as plain data, with one encoded sample of each kind.  Sizes are in bytes."""
    from pyrosome.plan.inventory import count_parameters

    config, run = recipe.config, recipe.run
    parameters = count_parameters(config, config.num_nextn_predict_layers)
    weights = parameters["trunk"] + parameters["draft"]
    memory = _TRAINING_BYTES * weights + _ADAMW_BYTES * 2 * config.vocab_size * config.hidden_size
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint(),
        "parameters": parameters,
        "memory_bytes": memory,
        "max_tokens": run.max_tokens,
        "step_tokens": run.step_tokens,
        "steps": -(-run.max_tokens // run.step_tokens),
        "decay_tokens": run.decay_tokens,
        "quantize_tokens": run.quantize_tokens,
        "dtype": run.dtype,
        "stages": [_stage(s) for s in recipe.stages],
        "samples": _samples(recipe),
    }


def _stage(stage: Stage) -> dict[str, Any]:
    whole = sum(m.share for m in stage.mix)
    return {
        "name": stage.name,
        "selection": stage.selection,
        "min_tokens": stage.min_tokens,
        "max_tokens": stage.max_tokens,
        "gate": dataclasses.asdict(stage.gate) if stage.gate else None,
        "mix": [{"kind": m.kind, "share": m.share / whole, "length": list(m.length), **m.knobs} for m in stage.mix],
    }


def _samples(recipe: Recipe) -> list[dict[str, Any]]:
    """The first source of each kind, one sample of it."""
    sources: dict[str, Mix] = {}
    for stage in recipe.stages:
        for mix in stage.mix:
            sources.setdefault(mix.label, mix)
    rng = random.Random(recipe.seed)
    found = []
    with samples_of(recipe) as samples:
        for label, mix in sources.items():
            encoded = samples.encoded(mix, rng, heldout=False)
            text = marked_text(segments(encoded, samples.encoder, _KEPT_TOKENS))
            found.append({"kind": label, "tokens": len(encoded.ids), "learnt": num_learnt(encoded), "text": text})
    return found


def _print(report: dict[str, Any], screen: Screen) -> None:
    from rich.text import Text

    from pyrosome.cli.tables import console, heading, table

    out = console(screen)
    p = report["parameters"]
    heading(out, f"recipe {report['recipe']} ({report['fingerprint'][:12]}), a dry run")
    out.print(f"{p['trunk']:,} parameters, {p['active']:,} active per token; draft head {p['draft']:,} more")
    out.print(
        f"{size(report['memory_bytes'])} for weights, gradients and moments, activations aside; in {report['dtype']}"
    )
    out.print(
        f"at most {report['max_tokens']:,} tokens in {report['steps']:,} steps of {report['step_tokens']:,}; the "
        f"learning rate falls over the last {report['decay_tokens']:,}, FP8 and FP4 rounding in the last "
        f"{report['quantize_tokens']:,}"
    )
    heading(out, "stages")
    rows = []
    for stage in report["stages"]:
        gate = f"{stage['gate']['kind']} {stage['gate']['accuracy']:.0%}" if stage["gate"] else "-"
        tokens = f"{stage['min_tokens']:,} to {stage['max_tokens']:,}" if stage["gate"] else f"{stage['max_tokens']:,}"
        for at, mix in enumerate(stage["mix"]):
            first = (stage["name"], stage["selection"], tokens, gate) if not at else ("",) * 4
            rows.append((*first, f"{mix['share']:.0%}", mix["kind"], _source(mix)))
    table(out, ("stage", "selection", "tokens", "gate", "share", "kind", "length and knobs"), rows, left=7)
    heading(out, "one sample of each kind; what is learnt stands between « and »")
    for sample in report["samples"]:
        out.print(Text(f"{sample['kind']}, {sample['tokens']} tokens, {sample['learnt']} learnt:", style="dim"))
        out.print(Text(f"  {sample['text']}"))


def _source(mix: dict[str, Any]) -> str:
    low, high = mix["length"]
    knobs = [f"{k} {v}" for k, v in mix.items() if k not in ("kind", "share", "length")]
    return ", ".join([f"{low}" if low == high else f"{low} to {high}", *knobs])
