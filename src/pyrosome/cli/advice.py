"""What this machine can hold, how fast it would be, and what to change: the planner asked about the machine at hand.

Every sentence has the figures that it follows from.  Where a part of the planner refuses, the reason stands in its
place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrosome.cli.terminal import size
from pyrosome.errors import PyrosomeError

if TYPE_CHECKING:
    from pyrosome.plan.calibration import Calibration
    from pyrosome.plan.hardware import Machine
    from pyrosome.plan.inventory import Model
    from pyrosome.plan.layout import Layout
    from pyrosome.plan.plan import Asked, Plan

FLASH = "flash"
CONTEXT, PROMPT = 131_072, 4096  # tokens of the session that is planned for, and of a turn of it
LEAST_DRIVE_BYTES = 1 << 20  # a planner's drive has some room


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of this machine, beside what the planner sees by itself.  Bytes, and bytes per second."""

    memory_bytes: int  # that this process may use; 0: as the planner finds
    free_bytes: int  # of it, now; 0: not known
    memory_read: float = 0.0  # 0: not measured
    cores: int = 1  # that it was measured with
    drive_read: float = 0.0  # of the drive that checkpoints are on


def advise(names: list[str], measured: Measured, here: Machine | None = None) -> dict[str, Any]:
    """Plans of models on this machine, and its calibration; each with its sentence.

    Args:
        names: "flash", or what `Model.open` takes.
        here: this machine; None: as the planner finds it.
    """
    try:
        found = here or this_machine(measured)
    except (PyrosomeError, OSError, RuntimeError) as error:
        return {"calibration": {"state": "unknown", "text": ""}, "plans": [], "why_not": str(error)}
    calibration = calibrated(found)
    plans = [told for name in names for told in _planned(name, found, measured, calibration["state"] == "current")]
    return {"calibration": calibration, "plans": plans, "why_not": ""}


def this_machine(measured: Measured) -> Machine:
    """This machine with the memory that this process may use.

    Raises:
        RequestError: it has a GPU that is not in the planner's table.
    """
    from pyrosome.plan.hardware import machine

    found = machine("here")
    if 0 < measured.memory_bytes < found.ram_bytes:  # a container's share
        found = dataclasses.replace(found, ram_bytes=measured.memory_bytes)
    return found


def calibrated(here: Machine) -> dict[str, Any]:
    """Whether this machine was calibrated and that still holds: "current", "outdated", "none" or "unknown"."""
    from pyrosome.plan.calibration import latest

    processor = here.device if here.device.kind == "cpu" else here.host
    try:
        found = latest(processor.title) if processor else None
    except (PyrosomeError, OSError, RuntimeError) as error:
        return {"state": "unknown", "text": f"not known to be calibrated: {error}"}
    again = "`pyrosome calibrate` takes two minutes"
    if found is None:
        text = "not calibrated: speeds are assumed, and may be half or twice as high"
        return {"state": "none", "text": f"{text}; {again}"}
    if found.outdated:
        text = f"not calibrated any more, as the calibration of {found.when[:10]} is outdated: {found.outdated}"
        return {"state": "outdated", "text": f"{text}; {again}"}
    return {"state": "current", "text": _current(found)}


def _current(found: Calibration) -> str:
    s = "s" * (found.threads != 1)
    return (
        f"calibrated {found.when[:10]} with {found.threads} thread{s}: {found.points} steps that were timed are met "
        f"within {found.residual:.0%} (median), {found.worst:.0%} (most)"
    )


def _planned(name: str, here: Machine, measured: Measured, is_calibrated: bool) -> list[dict[str, Any]]:
    """A model on the processor, where commands run without `--device`, and on the GPUs of this machine, if any."""
    from pyrosome.plan.inventory import Model

    try:
        model = Model.open(name)
        room = _drive_bytes(name, model)
    except (PyrosomeError, OSError, RuntimeError) as error:
        text = f"{name} is not planned for: {error}"
        return [{"model": name, "why_not": str(error), "text": text, "parts": [text]}]
    told = []
    for machine in _machines(here):
        # Whether the drive has room for the files is said apart from whether memory has room for what is read of them.
        drive = dataclasses.replace(
            machine, nvme_bytes=max(LEAST_DRIVE_BYTES, room, model.stored_bytes),
            nvme_read_bytes_s=measured.drive_read or machine.nvme_read_bytes_s,
        )  # fmt: skip
        try:
            told.append(_on(model, drive, room, measured, is_calibrated))
        except PyrosomeError as error:
            title = machine.device.title
            text = f"{name} is not planned for on {title}: {error}"
            told.append({"model": name, "on": title, "why_not": str(error), "text": text, "parts": [text]})
    return told


def _machines(here: Machine) -> list[Machine]:
    if here.device.kind != "gpu" or here.host is None:
        return [here]
    return [dataclasses.replace(here, device=here.host, count=1), here]


def _drive_bytes(name: str, model: Model) -> int:
    """Room for its files: free where it is or would be fetched to, and what it takes there already."""
    from pyrosome.checkpoint.index import locate
    from pyrosome.cli.machine import disk
    from pyrosome.folders import models_home
    from pyrosome.plan.inventory import PRESET_STAGES

    if name in PRESET_STAGES:
        return int(disk(models_home())["free"])
    return int(disk(Path(locate(name)))["free"]) + model.stored_bytes


def _on(model: Model, machine: Machine, room: int, measured: Measured, is_calibrated: bool) -> dict[str, Any]:
    from pyrosome.plan.plan import Asked
    from pyrosome.plan.planner import make_plan

    context = min(CONTEXT, model.config.max_position_embeddings)
    is_cpu, basis = machine.device.kind == "cpu", ""
    if is_cpu and not is_calibrated and measured.memory_read:
        machine, basis = _as_measured(machine, measured)
    asked = Asked(model, machine, context, prompt=min(PROMPT, context))
    plan = make_plan(asked)
    basis = basis or (plan.speed.source if plan.speed else "")
    if is_cpu and not is_calibrated and plan.options["experts"] == "mapped":
        known = "measured" if measured.drive_read else "assumed"
        basis += f"; its drive at {machine.nvme_read_bytes_s / 1e9:.1f} GB/s, {known}"
    found: dict[str, Any] = {
        "model": model.name, "on": machine.device.title, "kind": machine.device.kind, "count": machine.count,
        "fits": plan.fits, "mode": plan.mode, "experts": plan.options["experts"] if plan.fits else "",
        "context": context, "positions": model.config.max_position_embeddings, "kv_format": asked.kv_format,
        "drive_bytes": room, "stored_bytes": model.stored_bytes, "free_bytes": measured.free_bytes,
        "speed": dataclasses.asdict(plan.speed) if plan.speed else None,
        "basis": basis, "lacks": plan.why_not, "change": plan.change,
        "why_not": "", **_sizes(asked, plan),
    }  # fmt: skip
    title = (
        f"{model.name} on {machine.count} x {found['on']}" if machine.count > 1 else f"{model.name} on {found['on']}"
    )
    parts = [*(_on_processor(found) if is_cpu else _on_devices(found)), *_room(found)]
    return found | {"parts": [title, *parts], "text": f"{title}: {'; '.join(parts)}"}


def _sizes(asked: Asked, plan: Plan) -> dict[str, Any]:
    """Bytes that the devices have and need, experts held there or (on a processor) in files; what there is room for."""
    from pyrosome.plan.fitting import longest_context, most_sessions, place_experts
    from pyrosome.plan.layout import Layout, Placement
    from pyrosome.plan.memory import places

    machine, layout = asked.machine, Layout.of(plan.mode, asked.machine.count)
    held, files = Placement(), Placement.of(0, 0, asked.model.config.n_routed_experts)

    def needed(placement: Placement) -> int:
        return sum(p.used_bytes for p in places(asked, layout, placement, asked.sessions)[: layout.ranks])

    if machine.device.kind != "cpu":
        placed = place_experts(asked, layout)
        longest = longest_context(asked, layout, placed) if plan.fits else 0
        has = machine.count * machine.device.memory_bytes
        return {
            "memory_bytes": has, "needed_bytes": needed(held), "mapped_bytes": 0, "max_context": longest,
            "csa_host_context": _with_rows_on_host(asked, layout, longest) if plan.fits else 0,
            "sessions": plan.sessions.decoding, "spread": placed.counts(asked.model.config.n_routed_experts),
        }  # fmt: skip
    way = files if plan.options["experts"] == "mapped" else held
    longest = longest_context(asked, layout, way) if plan.fits else 0
    room = most_sessions(asked, layout, way) if plan.fits else 0
    return {
        "memory_bytes": machine.ram_bytes, "needed_bytes": needed(held), "mapped_bytes": needed(files),
        "max_context": longest, "csa_host_context": 0, "sessions": room, "spread": None,
    }  # fmt: skip


def _with_rows_on_host(asked: Asked, layout: Layout, longest: int) -> int:
    """The longest context with CSA rows in host memory, where that is longer; 0: it is not."""
    from pyrosome.plan.fitting import longest_context, place_experts

    machine = asked.machine
    if machine.device.kind != "gpu" or not machine.ram_bytes or longest >= asked.model.config.max_position_embeddings:
        return 0
    changed = dataclasses.replace(asked, csa_host=True)
    found = longest_context(changed, layout, place_experts(changed, layout))
    return found if found > longest else 0


def _as_measured(machine: Machine, measured: Measured) -> tuple[Machine, str]:
    """The machine with the memory speed that was measured in place of the one that is assumed."""
    device = dataclasses.replace(machine.device, read_bytes_s=measured.memory_read)
    s = "s" * (measured.cores != 1)
    basis = f"memory was read at {measured.memory_read / 1e9:.1f} GB/s just now with {measured.cores} core{s}"
    return dataclasses.replace(machine, device=device, host=device), f"{basis}; not calibrated"


def _on_processor(p: dict[str, Any]) -> list[str]:
    """One model in a machine's own memory."""
    has, all_of_it, mapped = p["memory_bytes"], p["needed_bytes"], p["mapped_bytes"]
    lacks = (
        f"RAM lacks {size(all_of_it - has)} to hold the experts ({size(all_of_it)} are needed, {size(has)} are there)"
    )
    if p["experts"] == "resident":
        return [f"RAM holds all of it, the experts too: {size(all_of_it)} of {size(has)}", *_rates(p)]
    if p["experts"] == "mapped":
        how = f"with --experts mapped they are read in the checkpoint's files, and {size(mapped)} of RAM are needed"
        return [lacks, how, *_rates(p)]
    more = size(mapped - has)
    return [lacks, f"with --experts mapped {size(mapped)} would be needed, {more} more than there are"]


def _on_devices(p: dict[str, Any]) -> list[str]:
    """One model on GPUs, or in the memory that a GPU shares."""
    if p["fits"]:
        near, in_ram, in_files = p["spread"]
        by = f"it fits by {p['mode']}" if p["count"] > 1 else "it fits"
        where = f", of {near + in_ram + in_files} experts of each layer {in_ram} in RAM and {in_files} on the drive"
        parts = [by + (where if in_ram + in_files else ""), *_rates(p)]
    else:
        parts = [f"it does not fit: {p['lacks']}", p["change"]]
    return [*parts, "commands of this version run on the processor"]


def _rates(p: dict[str, Any]) -> list[str]:
    from pyrosome.plan.plan import Band
    from pyrosome.plan.words import band

    speed = p["speed"]
    each, prompt = (band(Band(**speed[name])) for name in ("decode_tok_s", "prefill_tok_s"))
    most, positions = p["max_context"], p["positions"]
    context = (
        f"{most:,} tokens, all that it has positions for," if most == positions else f"{most:,} of {positions:,} tokens"
    )
    return [
        f"expect {each} tok/s of one session at {p['context']:,} tokens, and {prompt} tok/s of prompt ({p['basis']}; "
        f"limit: {speed['limit']})",
        f"the longest context is {context} with rows in {p['kv_format']}",
        *([f"{p['csa_host_context']:,} with CSA rows in host memory"] if p["csa_host_context"] else []),
        f"there is room for {p['sessions']:,} session{'s' * (p['sessions'] != 1)} of {p['context']:,} tokens",
    ]


def _room(p: dict[str, Any]) -> list[str]:
    """What of memory and drive is taken by something else now."""
    found = []
    needed = p["mapped_bytes"] if p["experts"] == "mapped" else p["needed_bytes"]
    if p["kind"] == "cpu" and p["fits"] and 0 < p["free_bytes"] < needed:
        found.append(f"{size(p['free_bytes'])} of RAM are free now, so end what else runs")
    if p["drive_bytes"] < p["stored_bytes"]:
        lacking = size(p["stored_bytes"] - p["drive_bytes"])
        found.append(
            f"its files take {size(p['stored_bytes'])}, and {size(p['drive_bytes'])} are free where `pyrosome pull` "
            f"puts them, so {lacking} lack (--to names another drive)"
        )
    return found
