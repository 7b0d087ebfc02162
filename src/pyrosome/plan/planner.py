"""From what is asked to plans: places, sessions, speed and cost, modes ranked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pyrosome.cache.streams import KV_FORMATS, PLANNED_FORMATS
from pyrosome.errors import RequestError
from pyrosome.options import require_integer
from pyrosome.plan.cost import cost_of
from pyrosome.plan.estimate import estimated
from pyrosome.plan.fitting import (
    MAX_SESSIONS,
    changes,
    lacking,
    most_sessions,
    place_experts,
    room,
    session_bytes,
    told,
    why_not,
)
from pyrosome.plan.hardware import Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.memory import Site, fits, num_drafts, step_tokens
from pyrosome.plan.plan import Asked, Plan, Sessions, Speed

NUMERICS = ("trained", "exact")
MAX_PARKED = 10_000_000
MAX_STEP_TOKENS = 1 << 20

Estimate = Callable[[Asked, Layout, Placement], Speed]


def make_plan(asked: Asked, estimate: Estimate = estimated) -> Plan:
    """The plan of the asked mode; with "auto" the best of `make_plans`.

    Raises:
        RequestError: nonsense; the message names the field.
    """
    return make_plans(asked, estimate)[0]


def make_plans(asked: Asked, estimate: Estimate = estimated) -> list[Plan]:
    """A plan for each mode, the best first: those that fit by sessions per dollar, then tokens per dollar.

    Those that keep all experts on the devices go before those that do not, which are slower by far.  Of the latter the
    fastest is first: how many sessions they hold is how few experts are near.  All are of one machine, so its price
    decides nothing between them.  On one device every mode is the same, and there is one plan.
    Modes in which the model cannot be shared by these devices are left out of "auto".

    Args:
        estimate: how fast a way to run it is.

    Raises:
        RequestError: nonsense; the message names the field.
        PlanError: weights of a sort that this kind of device does not hold.
    """
    check(asked)
    count = asked.machine.count
    modes = [asked.mode] if asked.mode != "auto" else list(MODES if count > 1 else MODES[:1])
    layouts = [Layout.of(mode, count) for mode in modes]
    possible = [layout for layout in layouts if not why_not(asked, layout)]
    if not possible:
        raise RequestError(f"{asked.mode} over {count} devices: {why_not(asked, layouts[0])}; take fewer, or mode auto")
    placed = [(layout, place_experts(asked, layout)) for layout in possible]
    plans = [(_plan(asked, *both, estimate), both[1].experts_on_device < 1) for both in placed]
    return [plan for plan, _ in sorted(plans, key=lambda p: _rank(*p))]


def _rank(plan: Plan, is_spread: bool) -> tuple[bool, bool, int, float]:
    """Smaller is better; of plans that do not fit, the one that lacks least."""
    tokens = plan.speed.total_tok_s.mid if plan.speed else 0.0
    last = -tokens if plan.fits else -float(min(p.free_bytes for p in plan.places))
    is_spread = is_spread and plan.fits
    return not plan.fits, is_spread, 0 if is_spread else -plan.sessions.decoding, last


def _plan(asked: Asked, layout: Layout, placement: Placement, estimate: Estimate) -> Plan:
    site = Site(asked, layout, placement, asked.sessions)
    where = site.places()
    is_fit = fits(where)
    sessions = _sessions(asked, layout, placement, site)
    speed = estimate(asked, layout, placement) if is_fit else None
    return Plan(
        asked=described(asked),
        mode=layout.mode,
        fits=is_fit,
        why_not=lacking(where),
        change="" if is_fit else told(changes(asked, layout, placement)),
        places=where,
        sessions=sessions,
        speed=speed,
        cost=cost_of(asked, sessions, speed, layout.replicas) if speed else None,
        options=_options(asked, layout, placement, site),
        notes=tuple(_notes(asked, layout, placement, site)),
    )


def _sessions(asked: Asked, layout: Layout, placement: Placement, site: Site) -> Sessions:
    is_fit = fits(site.places())
    return Sessions(
        decoding=most_sessions(asked, layout, placement) if is_fit else room(asked, layout),
        prefilling=asked.prefilling,
        parked_ram=site.parked_room,
        parked_disk=max(0, site.disk_room) // site.parked.disk_bytes,
        device_bytes=session_bytes(asked, layout, placement),
        parked_bytes=site.parked.ram_bytes,
    )


def described(asked: Asked) -> dict[str, Any]:
    """What was asked as plain data: names, counts and bytes."""
    plain = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked) if f.name not in ("model", "machine")}
    model, machine = asked.model, asked.machine
    return plain | {
        "step_tokens": step_tokens(asked),
        "model": {
            "name": model.name, "stored_bytes": model.stored_bytes, "draft_stages": model.num_stages,
            "layers": model.config.num_hidden_layers, "positions": model.config.max_position_embeddings,
        },
        "machine": {
            "device": machine.device.name, "title": machine.device.title, "kind": machine.device.kind,
            "count": machine.count, "memory_bytes": machine.device.memory_bytes,
            "host": machine.host.name if machine.host else "", "ram_bytes": machine.ram_bytes,
            "nvme_bytes": machine.nvme_bytes, "usd_hour": machine.price_usd_hour,
        },
    }  # fmt: skip


def _options(asked: Asked, layout: Layout, placement: Placement, site: Site) -> dict[str, Any]:
    """What `serve --plan` replays, of the rank with the most sessions."""
    cache, drafts = site.cache(0), num_drafts(asked)
    prompts = -(-asked.prefilling // layout.replicas)
    rows = cache.sequences * (1 + drafts)
    waiting = asked.parked - site.parked_in_ram
    return {
        "max_sequences": max(1, cache.sequences),
        "max_context": asked.context,
        "cache_bytes": max(1, cache.cache_bytes),
        "snapshot_bytes": site.snapshot_bytes,
        "host_bytes": site.parked_in_ram * site.parked.ram_bytes,
        "step_tokens": max(prompts * step_tokens(asked), rows),  # of all spans of a step together
        "drafter": "auto" if drafts else "off",
        "max_drafts": drafts,
        "numerics": asked.numerics,
        "kv_format": asked.kv_format,
        "experts": "mapped" if site.is_cpu and placement.experts_on_nvme else "resident",
        **({"disk_bytes": waiting * site.parked.disk_bytes} if waiting else {}),
    }


def _notes(asked: Asked, layout: Layout, placement: Placement, site: Site) -> list[str]:
    notes = []
    if layout.ranks > 1:
        notes.append(
            "this engine runs on one device, or on ranks that deal out the routed experts and each hold all sessions; "
            f"{layout.mode} over {layout.ranks} devices is a plan for what is to come, or for another engine"
        )
    E = asked.model.config.n_routed_experts
    _, in_ram, on_nvme = placement.counts(E)
    if asked.machine.device.kind == "gpu" and (in_ram or on_nvme):
        notes.append(
            f"of {E} experts of each layer {in_ram} are in RAM and {on_nvme} on NVMe; this engine reads experts in "
            "place on a CPU only"
        )
    if in_ram or on_nvme:
        notes.append(
            "room is told with experts where they are; asked for more --sessions, a plan keeps fewer experts near them"
        )
    if placement.csa_on_host:
        notes.append("CSA rows in host memory are a plan for what is to come: this engine's pools are on one device")
    if site.is_cpu and on_nvme:
        notes.append(f"{on_nvme} of {E} experts of each layer stay in the checkpoint's files (experts: mapped)")
    if asked.kv_format not in KV_FORMATS:
        notes.append(
            f"rows in {asked.kv_format} are as other engines store them; this one stores {', '.join(KV_FORMATS)}"
        )
    if asked.model.left_out:
        notes.append(asked.model.left_out)
    if not asked.drafts and asked.model.num_stages:
        notes.append("the draft head is loaded with the trunk, though nothing is drafted")
    if asked.machine.price_usd_hour is None:
        notes.append("no price is known for this machine, so nothing is said of cost; give --price")
    if not asked.machine.ram_bytes and not site.has_one_memory:
        notes.append("it is not known how much RAM the host has; nothing is placed there, unless --ram is given")
    if asked.parked > site.parked_in_ram:
        notes.append("sessions on disk need a folder: serve --disk FOLDER")
    return notes


def check(asked: Asked) -> None:
    """Refuse nonsense.

    Raises:
        RequestError: naming the field.
    """
    if not isinstance(asked.model, Model):
        raise RequestError(f"model is {asked.model!r}; a Model was expected, as Model.open('flash')")
    config = asked.model.config
    positions = config.max_position_embeddings
    require_integer("context", asked.context, 1)
    if asked.context > positions:
        raise RequestError(
            f"context is {asked.context:,} tokens and {asked.model.name} has {positions:,} positions; ask for no more"
        )
    require_integer("sessions", asked.sessions, 1, MAX_SESSIONS)
    require_integer("prefilling", asked.prefilling, 0, MAX_SESSIONS)
    if asked.prefilling > asked.sessions:
        raise RequestError(
            f"prefilling is {asked.prefilling:,} and sessions is {asked.sessions:,}; a prompt that is computed is one "
            "of the sessions: ask for fewer prompts, or more sessions"
        )
    require_integer("parked", asked.parked, 0, MAX_PARKED)
    for name in ("shared_prefix", "prompt"):
        require_integer(name, getattr(asked, name), 0)
        if getattr(asked, name) > asked.context:
            raise RequestError(f"{name} is {getattr(asked, name):,} tokens, and the context has {asked.context:,}")
    require_integer("output", asked.output, 1, positions)
    require_integer("step_tokens", asked.step_tokens, 0, MAX_STEP_TOKENS)
    for name, values in (("mode", ("auto", *MODES)), ("kv_format", PLANNED_FORMATS), ("numerics", NUMERICS)):
        if getattr(asked, name) not in values:
            raise RequestError(f"{name} is {getattr(asked, name)!r}; it is one of {', '.join(values)}")
    for name in ("csa_host", "drafts"):
        if not isinstance(getattr(asked, name), bool):
            raise RequestError(f"{name} is {getattr(asked, name)!r}; true or false was expected")
    _check_machine(asked)
    Site(asked, Layout.of("tp", 1), Placement(), 1).cache(0)  # a format that cannot store this shape is refused here


def _check_machine(asked: Asked) -> None:
    machine = asked.machine
    if not isinstance(machine, Machine):
        raise RequestError(f"machine is {machine!r}; a Machine was expected, as machine('h200:2')")
    require_integer("devices", machine.count, 1, 4096)
    require_integer("ram", machine.ram_bytes, 0)
    require_integer("nvme", machine.nvme_bytes, 0)
    kind = machine.device.kind
    if kind == "cpu" and (machine.count != 1 or not machine.ram_bytes):
        raise RequestError(
            f"{machine.device.title} x {machine.count} with {machine.ram_bytes} bytes of RAM was asked for; a plan "
            "without accelerators is for one machine, and needs its RAM: --ram 512G"
        )
    if kind != "cpu" and machine.device.memory_bytes <= 0:
        raise RequestError(f"{machine.device.title} has {machine.device.memory_bytes} bytes of memory; give it some")
    if asked.csa_host and kind != "gpu":
        raise RequestError(f"csa_host was asked for on {machine.device.title}, which has no memory beside the host's")
    price = machine.price_usd_hour
    if price is not None and (isinstance(price, bool) or not math.isfinite(price) or price < 0):
        raise RequestError(f"price is {price!r} dollars per hour; a number from 0 was expected")
