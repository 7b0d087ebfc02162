"""`pyrosome plan`: what fits which machine, how fast it would be and what it would cost, before anything is rented."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pyrosome.cli import plan_flags as flags
from pyrosome.cli.terminal import CHECK_FAILED, Screen
from pyrosome.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from pyrosome.plan.hardware import Machine
    from pyrosome.plan.inventory import Model
    from pyrosome.plan.need import Offer

MODEL, GPU, CONTEXT = "flash", "here", "128K"


@dataclasses.dataclass(frozen=True)
class Rented:
    """What the flags say about machines."""

    gpu: str | None
    cpu: str | None
    ram: str | None
    nvme: str | None
    price: str | None
    hardware: Path | None
    prices: Path | None


def plan(
    model: flags.ModelName = MODEL,
    gpu: flags.Gpu = None,
    context: flags.Context = None,
    sessions: flags.Sessions = None,
    weights: flags.Weights = "native",
    mode: flags.Mode = "auto",
    csa_host: flags.CsaHost = False,
    cpu: flags.Cpu = None,
    ram: flags.Ram = None,
    nvme: flags.Nvme = None,
    price: flags.Price = None,
    kv_format: flags.KvFormat = "fp8",
    prefilling: flags.Prefilling = 1,
    parked: flags.Parked = 0,
    shared_prefix: flags.SharedPrefix = None,
    prompt: flags.Prompt = None,
    output: flags.Output = 512,
    step_tokens: flags.StepTokens = 0,
    drafts: flags.Drafts = True,
    numerics: flags.Numerics = "trained",
    hardware: flags.Hardware = None,
    prices: flags.Prices = None,
    sweep: flags.Sweep = False,
    plot: flags.Plot = None,
    need: flags.Need = None,
    list_devices: flags.List = False,
    vendor: flags.Vendor = False,
    history: flags.History = False,
    out: flags.Out = None,
    as_json: flags.AsJson = False,
) -> None:
    """Say what a machine holds, how fast it would be and what it would cost.  Nothing is loaded.

    Exit status 1 where what is asked for does not fit, or no configuration gives what is needed.
    """
    from pyrosome.plan.quantities import tokens

    views = {"--sweep": sweep, "--need": need, "--list": list_devices, "--vendor": vendor, "--history": history}
    view = _only_one(views)
    _check_together(view, plot=plot, out=out, gpu=gpu, context=context, sessions=sessions)
    screen = Screen()
    if view == "--list":
        _list(screen, hardware, as_json=as_json)
        return
    if view == "--vendor":
        _vendor(screen, as_json=as_json)
        return
    if view == "--history":
        _history(screen, as_json=as_json)
        return
    rented = Rented(gpu, cpu, ram, nvme, price, hardware, prices)
    fields: dict[str, Any] = {
        "mode": mode, "csa_host": csa_host, "kv_format": kv_format, "prefilling": prefilling, "parked": parked,
        "shared_prefix": 0 if shared_prefix is None else tokens(shared_prefix, "--shared-prefix"),
        "prompt": 0 if prompt is None else tokens(prompt, "--prompt"), "output": output, "step_tokens": step_tokens,
        "drafts": drafts, "numerics": numerics,
    }  # fmt: skip
    opened = _model(model, weights)
    if view == "--sweep":
        _sweep(screen, opened, rented, fields, context, plot, as_json=as_json)
    elif need is not None:
        _need(screen, opened, rented, fields, need, as_json=as_json)
    else:
        fields["sessions"] = 1 if sessions is None else sessions
        fields["context"] = tokens(CONTEXT if context is None else context, "--context")
        _one(screen, opened, rented, fields, out, as_json=as_json)


def _only_one(views: dict[str, Any]) -> str:
    asked = [name for name, value in views.items() if value is not None and value is not False]
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} were asked for; each is an answer of its own: give one of them")
    return asked[0] if asked else ""


def _check_together(view: str, **given: Any) -> None:
    """Refuse flags that would have no effect."""
    without = {
        "": ("plot",),
        "--sweep": ("out", "sessions"),
        "--need": ("plot", "out", "gpu", "context", "sessions"),
    }.get(view, tuple(given))
    why = {
        "": "it draws a --sweep",
        "--sweep": "a sweep fills each machine",
        "--need": "that is said in --need, and machines come from the price list (--prices)",
    }.get(view, f"{view} takes no plan")
    for name in without:
        if given[name] is not None:
            raise RequestError(f"--{name} has no effect {f'with {view}' if view else 'here'}: {why}; leave it out")


def _model(model: str, weights: str) -> Model:
    """The model of the argument, or of --weights where that is a checkpoint."""
    from pyrosome.plan.inventory import Model

    if weights in flags.WEIGHTS:
        return Model.open(model, weights)
    if model != MODEL:
        raise RequestError(
            f"MODEL is {model!r} and --weights {weights!r}; a checkpoint is named once, and --weights is else one of "
            f"{', '.join(flags.WEIGHTS)}"
        )
    try:
        return Model.open(weights)
    except CheckpointError as error:
        raise RequestError(f"--weights {weights}: {', '.join(flags.WEIGHTS)}, or a checkpoint; {error}") from None


def _machine(rented: Rented, gpu: str) -> Machine:
    """One machine, with the price that was given or is listed for it."""
    from pyrosome.plan.hardware import machine
    from pyrosome.plan.prices import priced

    found = machine(gpu, rented.cpu, rented.ram, rented.nvme, rented.price, rented.hardware)
    return priced(found, rented.prices, rented.hardware)


def _one(
    screen: Screen, model: Model, rented: Rented, fields: dict[str, Any], out: Path | None, *, as_json: bool
) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.fitting import longest_context, place_experts
    from pyrosome.plan.layout import Layout
    from pyrosome.plan.plan import Asked
    from pyrosome.plan.planner import make_plans

    asked = Asked(model, _machine(rented, GPU if rented.gpu is None else rented.gpu), **fields)
    plans = make_plans(asked)
    layout = Layout.of(plans[0].mode, asked.machine.count)
    longest = longest_context(asked, layout, place_experts(asked, layout))
    if out is not None:
        _write(plans[0].to_json(), out)
    if as_json:
        best, *others = (json.loads(p.to_json()) for p in plans)
        found = {**best, "longest_context": longest, "others": others}  # `serve --plan` reads this too
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        plan_tables.show_plan(screen, asked, plans, longest)
        if out is not None:
            screen.notice(f"The plan is in {out}: pyrosome serve --plan {out}")
    if not plans[0].fits:
        raise typer.Exit(CHECK_FAILED)


def _write(text: str, path: Path) -> None:
    """A file that is whole or not there.

    Raises:
        RequestError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(f"the plan was to be written to {path}: {error.strerror}; name another file") from None


def _sweep(
    screen: Screen,
    model: Model,
    rented: Rented,
    fields: dict[str, Any],
    contexts: str | None,
    picture: Path | None,
    *,
    as_json: bool,
) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.picture import check_path, plot
    from pyrosome.plan.plan import Asked
    from pyrosome.plan.quantities import tokens
    from pyrosome.plan.sweep import contexts_up_to, sweep

    if picture is not None:
        check_path(picture)
    names = _names(GPU if rented.gpu is None else rented.gpu, "--gpu")
    machines = [(name, _machine(rented, name)) for name in names]
    longest = model.config.max_position_embeddings
    wanted = (
        [tokens(c, "--context") for c in _names(contexts, "--context")]
        if contexts
        else (contexts_up_to(longest, max(fields["shared_prefix"], fields["prompt"])))
    )
    points = sweep(Asked(model, machines[0][1], **fields), machines, wanted)
    title = f"{model.name}, cache rows {fields['kv_format']}"
    if as_json:
        typer.echo(json.dumps({"points": [dataclasses.asdict(p) for p in points]}, ensure_ascii=False))
    else:
        plan_tables.show_points(screen, points, title)
    if picture is not None:
        plot(points, picture, title)
        screen.notice(f"The sweep is drawn in {picture}")
    if not any(p.sessions for p in points):
        raise typer.Exit(CHECK_FAILED)


def _names(text: str, flag: str) -> list[str]:
    """What stands between commas, each once."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise RequestError(f"{flag} is {text!r}, and between two commas there is nothing; write it as a,b,c")
    return list(dict.fromkeys(found))


def _need(screen: Screen, model: Model, rented: Rented, fields: dict[str, Any], text: str, *, as_json: bool) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.need import offers, parse
    from pyrosome.plan.plan import Asked
    from pyrosome.plan.prices import listed

    needed = parse(text)
    machines = listed(rented.prices, rented.hardware)
    found = offers(needed, Asked(model, machines[0][1], **fields), machines)
    if as_json:
        told = {"need": dataclasses.asdict(needed), "offers": [_offered(o) for o in found]}
        typer.echo(json.dumps(_finite(told), ensure_ascii=False))
    else:
        plan_tables.show_offers(screen, needed, found, f"{model.name}, cache rows {fields['kv_format']}")
    if not any(not o.lacks for o in found):
        raise typer.Exit(CHECK_FAILED)


def _offered(offer: Offer) -> dict[str, Any]:
    return {
        "name": offer.name, "usd_hour": offer.machine.price_usd_hour, "lacks": list(offer.lacks),
        "surely": offer.surely, "shortfall": offer.shortfall, "plan": json.loads(offer.plan.to_json()),
    }  # fmt: skip


def _finite(found: Any) -> Any:
    """Infinity, which JSON cannot hold, as null: no limit was given, or nothing helps."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _list(screen: Screen, hardware: Path | None, *, as_json: bool) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.hardware import devices

    found = list(devices(hardware).values())
    if as_json:
        typer.echo(json.dumps({"devices": [dataclasses.asdict(d) for d in found]}, ensure_ascii=False))
    else:
        plan_tables.show_devices(screen, found)


def _vendor(screen: Screen, *, as_json: bool) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.vendor import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        plan_tables.show_vendor(screen, found)


def _history(screen: Screen, *, as_json: bool) -> None:
    from pyrosome.cli import plan_tables
    from pyrosome.plan.history import summary

    found = summary()
    if as_json:
        typer.echo(json.dumps({"errors": found}, ensure_ascii=False))
    else:
        plan_tables.show_history(screen, found)
