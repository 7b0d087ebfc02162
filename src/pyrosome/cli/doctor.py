"""`pyrosome doctor`: this machine, this installation, whether it computes what it should, and what it can hold."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrosome.cli import accelerators, machine
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP
from pyrosome.cli.terminal import CHECK_FAILED, Screen, loading
from pyrosome.errors import KernelUnavailable

MOST_WARNINGS = 2  # that are told when a server starts


def doctor(
    model: Annotated[
        str, typer.Argument(help=f"The self-test's model, which is planned for too. {MODEL_HELP}")
    ] = BUILTIN,
    self_test: Annotated[bool, typer.Option(help="Load the model and run three prompts.")] = True,
    speeds: Annotated[bool, typer.Option(help="Measure memory and drives, for some seconds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check this machine and this installation, with a self-test of three prompts; say what it can hold, how fast.

    Exit status 1 where the self-test fails or a kernel that was asked for cannot run.  Warnings and advice change
    nothing of it.
    """
    from pyrosome.checkpoint.index import open_checkpoint
    from pyrosome.cli.checks import warnings
    from pyrosome.cli.doctor_report import show

    screen = Screen()
    if self_test:
        open_checkpoint(model)  # a wrong path is said at once, before torch is loaded
    report = survey(model)
    report["speeds"] = measured(model, report) if speeds else {}
    report["advice"] = _advice(model, report)
    way = experts_for(model, report) if self_test else ""
    report["self_test"] = _self_test(model, way, screen) if way else []
    report["not_tested"] = _left_out(report) if self_test and not way else ""
    report["ops"], report["accelerators"] = choices(), packages()
    report["warnings"] = warnings(report)
    report["ok"] = all(f["ok"] for f in report["self_test"]) and not any(o["error"] for o in report["ops"])
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        show(report, screen)
    if not report["ok"]:
        raise typer.Exit(CHECK_FAILED)


def survey(model: str) -> dict[str, Any]:
    """What there is, as it stands; nothing is measured or computed."""
    return basics() | {
        "gpus": machine.gpus(),
        "drivers": {
            "nvidia": accelerators.driver(),
            "tool": accelerators.has_tool(),
            "torch": accelerators.torch_build(),
            "links": accelerators.links(),
        },
        "disk": machine.disk(Path.cwd() if model == BUILTIN else place_of(model)),
        "versions": machine.versions(),
        "extras": machine.extras(),
        "model": model,
        "native": native(),
    }


def basics() -> dict[str, Any]:
    """What can be told at once, without torch or a driver."""
    from pyrosome.cli.own_folders import own_folders

    return {
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "folders": own_folders(),
        "limits": machine.limits(),
        "clock_behind_s": clock_behind(),
        "environment": machine.variables(),
    }


def short() -> list[str]:
    """One to three lines for a server's start: kernels, whether speeds were measured here, and what is wrong.

    Memory is what a server's plan tells.  Neither torch nor anything else that takes a second is loaded.
    """
    from pyrosome.cli.advice import Measured, calibrated, this_machine
    from pyrosome.cli.checks import AT_START, warnings
    from pyrosome.errors import PyrosomeError

    report = basics() | {"native": expected_native()}
    try:
        calibration = calibrated(this_machine(Measured(0, 0)))["text"]
    except PyrosomeError:  # a machine that is not planned for
        calibration = ""
    about = f"; this machine is {calibration}" if calibration else ""
    lines = [f"Native kernels: {report['native']['level'] or 'none'}{about}."]
    found = [f"{w['about']}: {w['text']}" for w in warnings(report, AT_START)]
    lines += [f"Warning: {text}." for text in found[:MOST_WARNINGS]]
    if len(found) > MOST_WARNINGS:
        lines[-1] += f" {len(found) - MOST_WARNINGS} more: `pyrosome doctor`."
    return lines


def clock_behind(now: float | None = None) -> float:
    """Seconds by which the clock is behind the newest of this package's own modules; 0: it is not."""
    here = Path(__file__).parent.parent
    try:
        newest = max(entry.stat().st_mtime for entry in os.scandir(here))
    except OSError:
        return 0.0
    return max(0.0, newest - (time.time() if now is None else now))


def measured(model: str, report: dict[str, Any]) -> dict[str, Any]:
    """Speeds of memory, of the drive that the model is on, and of the one where this package keeps things."""
    from pyrosome.cli import speeds

    cores = machine.allowed_cores(report["cpu"])
    found = {"memory": speeds.memory_speed(cores, machine.memory_free(report["memory"]))}
    state = report["folders"]["state"]
    if not state["why_not"]:
        found["state"] = speeds.folder_speed(Path(state["path"]))
    if model != BUILTIN and (shard := largest_file(model)):
        found["model"] = speeds.drive_read(shard)
    return found


def place_of(model: str) -> Path:
    """Where a checkpoint is, or what was named where there is none."""
    from pyrosome.checkpoint.index import locate
    from pyrosome.errors import CheckpointError

    try:
        return locate(model)
    except (CheckpointError, OSError):
        return Path(model).expanduser()


def largest_file(model: str) -> Path | None:
    """The largest shard of a checkpoint; None where there is none."""
    place = place_of(model)
    try:
        shards = [place] if place.is_file() else list(place.glob("*.safetensors"))
        return max(shards, key=lambda p: p.stat().st_size, default=None)
    except OSError:
        return None


def experts_for(model: str, report: dict[str, Any]) -> str:
    """Where the self-test's routed experts are to be: "resident", "mapped", or "" where memory holds neither."""
    plan = _plan_of(report)
    if model == BUILTIN or plan is None:
        return "resident"
    if not plan["fits"]:
        return ""
    return "mapped" if 0 < plan["free_bytes"] < plan["stored_bytes"] else str(plan["experts"])


def _plan_of(report: dict[str, Any]) -> dict[str, Any] | None:
    """The plan of the model that was named, on the processor; None where there is none."""
    named = [p for p in report["advice"]["plans"] if p["model"] == report["model"] and p.get("kind") == "cpu"]
    return named[0] if named else None


def _left_out(report: dict[str, Any]) -> str:
    plan = _plan_of(report)
    return plan["text"] if plan else ""


def _advice(model: str, report: dict[str, Any]) -> dict[str, Any]:
    from pyrosome.cli.advice import FLASH, Measured, advise

    memory, speeds = report["memory"], report["speeds"]
    read = speeds.get("memory", {"one_core": 0.0, "all_cores": 0.0, "cores": 1})
    drives = [speeds[name]["read"] for name in ("model", "state") if name in speeds]
    found = Measured(
        memory_bytes=machine.memory_here(memory), free_bytes=machine.memory_free(memory),
        # All cores together are no slower than one: where it seems so, others keep them busy.
        memory_read=max(read["one_core"], read["all_cores"]),
        cores=read["cores"] if read["all_cores"] >= read["one_core"] else 1,
        drive_read=next((rate for rate in drives if rate), 0.0),
    )  # fmt: skip
    return advise(list(dict.fromkeys([FLASH] if model == BUILTIN else [FLASH, model])), found)


def _self_test(model: str, experts: str, screen: Screen) -> list[dict[str, Any]]:
    from pyrosome.cli.self_test import self_test
    from pyrosome.llm import load_model

    with loading(screen) as progress:
        loaded = load_model(model, numerics="exact", experts=experts, progress=progress)
    try:
        return self_test(loaded, model)
    except (KernelUnavailable, RuntimeError) as error:  # a kernel that cannot run here, or one that failed
        return [{"check": "runs", "prompt": "", "ok": False, "detail": str(error)}]


def native() -> dict[str, Any]:
    """The vector instructions that native kernels use here, or why there are none; and why not those above them."""
    from pyrosome import env
    from pyrosome.ops import native

    asked = env.CPU.get()
    try:
        level = native.level()
    except OSError as error:
        return {"level": "", "error": str(error), "asked": asked, "above": []}
    above = [
        {"level": name, "why_not": _why_not(name, asked)} for name in native.LEVELS[native.LEVELS.index(level) + 1 :]
    ]
    return {"level": level, "error": "", "asked": asked, "above": above}


def expected_native() -> dict[str, Any]:
    """As `native`, by what the processor has and whether there is a compiler: nothing is loaded or built."""
    from pyrosome import env
    from pyrosome.ops import toolchain

    asked, have = env.CPU.get(), toolchain.supported()
    found: dict[str, Any] = {"level": "", "error": "", "asked": asked, "above": []}
    level = have[-1] if asked == "auto" else asked
    if level not in have:
        return found | {"error": f"{env.CPU.name} is {asked!r}; here it is auto, {', '.join(have)}"}
    try:
        if not (toolchain.SHIPPED / f"libpyrosome-{level}-{toolchain.key(level)}.so").exists():
            toolchain.compiler()
    except OSError as error:
        return found | {"error": str(error)}
    above = [{"level": name, "why_not": f"{env.CPU.name} asks for {asked}"} for name in have[have.index(level) + 1 :]]
    return found | {"level": level, "above": above}


def _why_not(level: str, asked: str) -> str:
    """Why kernels of a level above the one in use do not run."""
    from pyrosome import env
    from pyrosome.ops import native

    if lacking := machine.lacking_flags(level):
        return f"this processor has no {', '.join(lacking)}"
    if asked != "auto":
        return f"{env.CPU.name} asks for {asked}"
    try:
        with native.use_level(level):
            return ""
    except OSError as error:
        return str(error)


def choices() -> list[dict[str, Any]]:
    """For each op, at each place it ran at in this process: the version chosen, and why not the others.

    On GPUs, where nothing ran, it is what would be chosen for what ran elsewhere.
    """
    import pyrosome.model.deepseek_v4
    import pyrosome.ops.sample.batch  # noqa: F401  # ops register themselves
    from pyrosome.ops.seam import OPS, Place

    capabilities = [tuple(map(int, text.split("."))) for text in sorted({g["capability"] for g in machine.gpus()})]
    found = []
    for name, op in sorted(OPS.items()):
        ran = sorted(op.passed_over) or [Place("cpu", (0, 0), "", False)]
        expected = [p._replace(device="cuda", capability=(c[0], c[1])) for c in capabilities for p in ran]
        for place in dict.fromkeys([*ran, *expected]):
            chosen, error = "", ""
            try:
                chosen = op.pick(place).name
            except KernelUnavailable as refused:
                error = str(refused)
            passed_over = op.passed_over[place] if place in ran else op.passed_over.pop(place)
            found.append(
                {
                    "op": name,
                    "device": place.device,
                    "capability": ".".join(map(str, place.capability)) if place.device == "cuda" else "",
                    "format": place.format,
                    "chosen": chosen,
                    "passed_over": list(passed_over),
                    "versions": ["torch", *(k.name for k in op.versions)],
                    "error": error if place in ran else "",  # what was asked for may be for the place it ran at
                }
            )
    return found


def packages() -> list[dict[str, Any]]:
    """Packages that bring kernels of their own, and what is wrong with them."""
    from pyrosome.ops import accelerators

    return [package._asdict() for package in accelerators.packages()]
