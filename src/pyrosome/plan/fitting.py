"""What fits: the most sessions, the longest context, where experts go, and the smallest change that makes it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from pyrosome.cache.streams import BLOCK_TOKENS, KV_FORMATS
from pyrosome.errors import PyrosomeError
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.memory import Site, fits, places, step_tokens
from pyrosome.plan.plan import Asked, Place

GIB, GB = 1 << 30, 10**9
ENDLESS = 1 << 60  # bytes, to see how many are needed
MAX_SESSIONS = 1_000_000
MAX_DEVICES = 64  # that are looked at when more are needed
LEAST_STEP_TOKENS = 256
SHORTEST = 16  # a context shorter than this part of the asked one is another task, not a change


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that could be otherwise, and then it fits; one unit less and it does not."""

    # "step_tokens", "prefilling", "csa_host", "mode", "kv_format", "sessions", "context", "ram", "nvme" or "devices"
    what: str
    text: str
    asked: Asked
    layout: Layout
    placement: Placement


def most(test: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n in low..high of which `test` is true, if it is true up to some n and false beyond; else low - 1."""
    low -= 1
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if test(middle) else (low, middle - 1)
    return low


def most_sessions(asked: Asked, layout: Layout, placement: Placement) -> int:
    """How many sessions of the asked context fit, at most a million; 0: not one.

    Raises:
        PlanError: as `memory.places`.
    """

    def test(n: int) -> bool:
        return fits(places(asked, layout, placement, n))

    high = 1
    while high < MAX_SESSIONS and test(high):
        high = min(2 * high, MAX_SESSIONS)
    return most(test, 1, high)


def fractional_sessions(asked: Asked, layout: Layout, placement: Placement) -> float:
    """As `most_sessions`, with the part of a session that what is left would hold: for comparing with formulas."""
    whole = most_sessions(asked, layout, placement)
    if not whole and not fits(places(asked, layout, placement, 0)):
        return 0.0
    groups = layout.replicas  # a session more in each
    here, there = (places(asked, layout, placement, n) for n in (whole, whole + groups))
    parts = []
    for a, b in zip(here, there, strict=True):
        if (each := b.used_bytes - a.used_bytes) > 0:
            parts.append(groups * a.free_bytes / each)
    return whole + min([p for p in parts if p >= 0] or [0.0])


def longest_context(asked: Asked, layout: Layout, placement: Placement) -> int:
    """The longest context that the asked sessions fit with, in whole blocks of 128 tokens; 0: none."""
    least = max(asked.shared_prefix, asked.prompt, 1)

    def test(blocks: int) -> bool:
        return fits(
            places(dataclasses.replace(asked, context=blocks * BLOCK_TOKENS), layout, placement, asked.sessions)
        )

    low = -(-least // BLOCK_TOKENS)
    found = most(test, low, asked.model.config.max_position_embeddings // BLOCK_TOKENS)
    return found * BLOCK_TOKENS if found >= low else 0


def place_experts(asked: Asked, layout: Layout) -> Placement:
    """All experts on the devices where weights and one session fit there; else as many as fit beside what was asked.

    The others are in RAM as far as it holds them, the rest on NVMe: whole experts, as many of each layer.  Where
    nothing helps all are on the devices, and the plan says what they lack.
    """
    everything = Placement(csa_on_host=asked.csa_host)
    if _on_devices(asked, layout, everything, 1):
        return everything
    return _spread(asked, layout, asked.sessions) or _spread(asked, layout, 1) or everything


def _placed(asked: Asked, layout: Layout) -> Placement | None:
    """As `place_experts`, with all that was asked for; None where it does not fit."""
    everything = Placement(csa_on_host=asked.csa_host)
    if not _on_devices(asked, layout, everything, 1):
        return _spread(asked, layout, asked.sessions)
    return everything if _fit(asked, layout, everything) else None


def room(asked: Asked, layout: Layout) -> int:
    """How many sessions there is room for, at most a million, with experts where so many leave them; 0: for none.

    Where devices hold all experts beside one session they keep them; else those of more sessions make way for rows.
    """
    high = 1
    while high < MAX_SESSIONS and _placed(_with_sessions(asked, high), layout):
        high = min(2 * high, MAX_SESSIONS)
    return most(lambda n: _placed(_with_sessions(asked, n), layout) is not None, 1, high)


def _with_sessions(asked: Asked, sessions: int) -> Asked:
    return dataclasses.replace(asked, sessions=sessions, prefilling=min(asked.prefilling, sessions))


def why_not(asked: Asked, layout: Layout) -> str:
    """Why the model cannot be shared so by these devices; "" where it can."""
    device = asked.machine.device
    if layout.ranks > 1 and layout.mode != "dp" and not (device.peer_bytes_s or device.host_bytes_s):
        return f"no link between devices of {device.title} is known, and {layout.mode} needs one"
    return layout.why_not(asked.model.config)


def _spread(asked: Asked, layout: Layout, sessions: int) -> Placement | None:
    """The placement with the most experts on the devices, then the most in RAM."""
    E, csa, machine = asked.model.config.n_routed_experts, asked.csa_host, asked.machine
    apart = machine.device.kind == "gpu" and machine.ram_bytes > 0

    def on_device(k: int) -> bool:
        return _on_devices(asked, layout, Placement.of(k, 0, E, csa_on_host=csa), sessions)

    if not on_device(0):
        return None
    near = most(on_device, 1, E)

    def in_ram(k: int) -> bool:
        found = Site(asked, layout, Placement.of(near, k, E, csa_on_host=csa), sessions).hosts()
        return all(p.free_bytes >= 0 for p in found if p.name == "RAM")

    far = 0
    if apart:
        far = E - near if in_ram(E - near) else max(0, most(in_ram, 0, E - near - 1))
    if near + far < E and not (machine.nvme_bytes and machine.nvme_read_bytes_s > 0):
        return None
    placement = Placement.of(near, far, E, csa_on_host=csa)
    return placement if fits(places(asked, layout, placement, sessions)) else None


def _on_devices(asked: Asked, layout: Layout, placement: Placement, sessions: int) -> bool:
    return fits(places(asked, layout, placement, sessions)[: layout.ranks])


def lacking(where: Sequence[Place]) -> str:
    """Which places hold too much, and how much; "" for none."""
    short = [(p, -p.free_bytes) for p in where if p.free_bytes < 0]
    devices = [(p, n) for p, n in short if p.name not in ("RAM", "NVMe")]
    hosts = [(p, n) for p, n in short if p.name in ("RAM", "NVMe")]
    parts = []
    if devices:
        place, worst = max(devices, key=lambda d: d[1])
        all_of = f"each of {len(devices)} devices" if len(devices) > 1 else place.name
        least = min(n for _, n in devices)
        amount = gib(worst) if gib(least) == gib(worst) else f"{gib(least)} to {gib(worst)}"
        parts.append(f"{all_of} lacks {amount} of {gib(place.used_bytes)}, and has {gib(place.total_bytes)}")
    for place, n in hosts:
        has = f"and has {gib(place.total_bytes)}" if place.total_bytes else "and it is not known how much there is"
        parts.append(f"{place.name} lacks {gib(n)} of {gib(place.used_bytes)}, {has}")
    return "; ".join(parts)


def changes(asked: Asked, layout: Layout, placement: Placement) -> list[Change]:
    """Single changes that make it fit, the least harmful first.

    The order: prompts that are computed in smaller steps; fewer of them at once; CSA rows in host memory; another mode;
    another format of rows; fewer sessions; a shorter context; experts in more RAM; experts in files; more devices.
    """
    looks = (
        _smaller_steps, _fewer_prompts, _rows_on_host, _another_mode, _another_format, _fewer_sessions, _shorter,
        _more_ram, _files, _devices,
    )  # fmt: skip
    return [change for look in looks for change in look(asked, layout, placement)]


def told(found: Sequence[Change]) -> str:
    """The changes in one sentence."""
    if not found:
        return (
            f"no single change makes it fit, {MAX_DEVICES} such devices not either; take larger ones, or ask for less"
        )
    *others, last = [c.text for c in found]
    return f"it fits with {', or '.join([', '.join(others), last]) if others else last}"


def _smaller_steps(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    if not asked.prefilling:
        return
    now = step_tokens(asked)

    def smaller(units: int) -> Asked:
        return dataclasses.replace(asked, step_tokens=units * LEAST_STEP_TOKENS)

    found = most(lambda n: _placed(smaller(n), layout) is not None, 1, (now - 1) // LEAST_STEP_TOKENS)
    if found >= 1:
        text = f"prompts computed {found * LEAST_STEP_TOKENS:,} tokens at a time instead of {now:,}"
        yield Change("step_tokens", text, smaller(found), layout, place_experts(smaller(found), layout))


def _fewer_prompts(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    def fewer(prompts: int) -> Asked:
        return dataclasses.replace(asked, prefilling=prompts)

    found = most(lambda n: _placed(fewer(n), layout) is not None, 1, asked.prefilling - 1)
    if found >= 1:
        text = f"{found:,} prompt{'s' * (found > 1)} computed at once instead of {asked.prefilling:,}"
        yield Change("prefilling", text, fewer(found), layout, place_experts(fewer(found), layout))


def _rows_on_host(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    if asked.csa_host or asked.machine.device.kind != "gpu" or 4 not in asked.model.config.layer_ratios:
        return
    if _on_devices(asked, layout, placement, asked.sessions):
        return  # it is the host that lacks memory
    changed = dataclasses.replace(asked, csa_host=True)
    moved = dataclasses.replace(placement, csa_on_host=True)
    where = places(changed, layout, moved, asked.sessions)
    if not fits(where[: layout.ranks]):
        return
    text = "CSA rows in host memory (--csa-host)"
    if not fits(where):
        needed = math.ceil(sum(p.used_bytes for p in where if p.name == "RAM") / GIB)
        changed = dataclasses.replace(changed, machine=dataclasses.replace(asked.machine, ram_bytes=needed * GIB))
        text = f"CSA rows in host memory, of which {needed:,} GiB are needed (--csa-host --ram {needed}G)"
        if not _fit(changed, layout, moved):
            return
    yield Change("csa_host", text, changed, layout, moved)


def _another_mode(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    if layout.ranks == 1:
        return
    found = []
    for mode in MODES:
        other = Layout.of(mode, layout.ranks)
        if mode == layout.mode or why_not(asked, other) or not (spread := _placed(asked, other)):
            continue
        found.append((spread.experts_on_device == 1, room(asked, other), other, spread))
    if found:
        _, most_held, other, spread = max(found, key=lambda f: f[:2])
        text = f"mode {other.mode}, which has room for {most_held:,} session{'s' * (most_held != 1)}"
        yield Change("mode", text, dataclasses.replace(asked, mode=other.mode), other, spread)


def _another_format(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    at = KV_FORMATS.index(asked.kv_format) if asked.kv_format in KV_FORMATS else len(KV_FORMATS)  # the widest first
    for kv_format in KV_FORMATS[at + 1 :]:
        changed = dataclasses.replace(asked, kv_format=kv_format)
        try:
            spread = _placed(changed, layout)
        except PyrosomeError:  # a shape that this format does not store
            continue
        if spread:
            text = f"rows stored as {kv_format} instead of {asked.kv_format}"
            yield Change("kv_format", text, changed, layout, spread)
            return


def _fewer_sessions(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    found = room(asked, layout)
    if 0 < found < asked.sessions:
        changed = _with_sessions(asked, found)
        text = f"{found:,} session{'s' if found > 1 else ''} instead of {asked.sessions:,}"
        yield Change("sessions", text, changed, layout, place_experts(changed, layout))


def _shorter(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    def shorter(blocks: int) -> Asked:
        return dataclasses.replace(asked, context=blocks * BLOCK_TOKENS)

    least = max(asked.shared_prefix, asked.prompt, asked.context // SHORTEST, 1)
    low, high = -(-least // BLOCK_TOKENS), (asked.context - 1) // BLOCK_TOKENS
    found = most(lambda n: _placed(shorter(n), layout) is not None, low, high)
    if low <= found <= high:
        text = f"a context of {found * BLOCK_TOKENS:,} tokens instead of {asked.context:,}"
        yield Change("context", text, shorter(found), layout, place_experts(shorter(found), layout))


def _more_ram(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    """As much RAM as it takes, in whole GiB: for what is there already, or for experts that devices do not hold."""
    machine = asked.machine
    endless = dataclasses.replace(asked, machine=dataclasses.replace(machine, ram_bytes=ENDLESS))
    is_enough = machine.device.kind != "unified" and _fit(endless, layout, placement)
    spread = placement if is_enough else _spread_if_needed(endless, layout) if machine.device.kind == "gpu" else None
    if spread is None:
        return

    def with_ram(units: int) -> Asked:
        return dataclasses.replace(asked, machine=dataclasses.replace(machine, ram_bytes=units * GIB))

    enough = math.ceil(_used("RAM", endless, layout, spread) / GIB)
    # A drive may hold what is in RAM where that is endless.
    needed = most(lambda n: _placed(with_ram(n), layout) is None, machine.ram_bytes // GIB + 1, enough - 1) + 1
    changed = with_ram(needed)
    if needed * GIB <= machine.ram_bytes or not (found := _placed(changed, layout)):
        return
    spread, E = found, asked.model.config.n_routed_experts
    _, there, far = spread.counts(E)
    moved = f"{there} of {E} experts of each layer in RAM, " if there else ""
    moved += f"{far} of {E} on NVMe, " if far else ""
    more = f"{gib(needed * GIB - machine.ram_bytes)} more than there are" if machine.ram_bytes else "if it has so much"
    yield Change("ram", f"{moved}{needed:,} GiB of RAM in all ({more})", changed, layout, spread)


def _files(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    """A drive of so many whole GB: for what is there already, or for experts that neither devices nor RAM hold."""
    machine = asked.machine
    speed = machine.nvme_read_bytes_s if machine.nvme_read_bytes_s > 0 else 1.0
    endless = dataclasses.replace(
        asked, machine=dataclasses.replace(machine, nvme_bytes=ENDLESS, nvme_read_bytes_s=speed)
    )
    spread = placement if _fit(endless, layout, placement) else _spread_if_needed(endless, layout)
    if spread is None:
        return
    needed = -(-_used("NVMe", endless, layout, spread) // GB)
    changed = dataclasses.replace(
        asked, machine=dataclasses.replace(machine, nvme_bytes=needed * GB, nvme_read_bytes_s=speed)
    )
    if needed * GB <= machine.nvme_bytes or not _fit(changed, layout, spread):
        return
    E = asked.model.config.n_routed_experts
    there = spread.counts(E)[2]
    moved = f"{there} of {E} experts of each layer read from " if there else ""
    yield Change("nvme", f"{moved}{needed:,} GB of NVMe (--nvme {needed}G)", changed, layout, spread)


def _spread_if_needed(asked: Asked, layout: Layout) -> Placement | None:
    """Where experts go if they do not all stay on the devices; None where those hold them beside one session."""
    if _on_devices(asked, layout, Placement(csa_on_host=asked.csa_host), 1):
        return None
    return _spread(asked, layout, asked.sessions)


def _used(name: str, asked: Asked, layout: Layout, placement: Placement) -> int:
    return sum(p.used_bytes for p in places(asked, layout, placement, asked.sessions) if p.name == name)


def _devices(asked: Asked, layout: Layout, placement: Placement) -> Iterator[Change]:
    machine = asked.machine
    if machine.device.kind == "cpu" or _on_devices(asked, layout, placement, asked.sessions):
        return  # it is the host that lacks memory

    def with_devices(count: int) -> Change | None:
        other = Layout.of(layout.mode, count)
        changed = dataclasses.replace(asked, machine=dataclasses.replace(machine, count=count, price_usd_hour=None))
        spread = _placed(changed, other)
        if spread is None:
            return None
        return Change("devices", f"{count} devices instead of {machine.count}", changed, other, spread)

    more = range(machine.count + 1, MAX_DEVICES + 1)
    counts = [n for n in more if not why_not(asked, Layout.of(layout.mode, n))]
    if counts and with_devices(counts[-1]):  # else there is nothing to look for
        yield next(change for count in counts if (change := with_devices(count)))


def _fit(asked: Asked, layout: Layout, placement: Placement) -> bool:
    return fits(places(asked, layout, placement, asked.sessions))


def session_bytes(asked: Asked, layout: Layout, placement: Placement) -> int:
    """What one decoding session more takes on all devices together, rows and rings; where experts are does not matter.

    A share of the pages for branches is in it: what so many sessions more take, divided by their number.
    """
    many = 16
    few, more = (
        sum(Site(asked, layout, placement, n).pool_bytes(rank) for rank in range(layout.ranks))
        for n in (layout.replicas, layout.replicas + many)
    )
    return -(-(more - few) // many)


def gib(num_bytes: int) -> str:
    """Bytes in GiB, exact to a MiB or so where there are few."""
    value = num_bytes / GIB
    return f"{value:,.1f} GiB" if value >= 0.095 else f"{num_bytes / (1 << 20):,.0f} MiB"
