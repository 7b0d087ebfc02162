"""What `pyrosome plan` prints: tables of at most 100 columns, which survive being piped and pasted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyrosome.cli.tables import console, heading, table
from pyrosome.cli.terminal import Screen, printable
from pyrosome.plan import words
from pyrosome.plan.cost import turn_cost
from pyrosome.plan.quantities import show_bytes, show_dollars, show_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from pyrosome.plan.hardware import Device
    from pyrosome.plan.history import Errors
    from pyrosome.plan.need import Need, Offer
    from pyrosome.plan.plan import Asked, Band, Plan
    from pyrosome.plan.sweep import Point

WIDTH = 100  # columns a plan is laid out for
MAX_COLUMNS = 4  # of places beside each other; of more, the first, the fullest and the last are shown
OFFERED = 8  # configurations that are shown of those that meet a need
NEAREST = 3  # and of those that do not, where none does
GIB = 1 << 30


def show_plan(screen: Screen, asked: Asked, plans: Sequence[Plan], longest: int) -> None:
    """The best plan whole, and the others in a line each.

    Args:
        longest: context that so many sessions fit with; 0: none.
    """
    out = console(screen)
    best = plans[0]
    _asked(out, asked)
    _verdict(out, best)
    _placed(out, best)
    _sessions(out, asked, best, longest)
    if best.speed:
        _speed(out, best)
        _cost(out, asked, best)
    if len(plans) > 1:
        _ranking(out, plans)
    _notes(out, [*best.notes, *(f"assumed: {a}" for a in asked.machine.assumed)])


def _say(out: Console, text: str, indent: str = "") -> None:
    """A paragraph, broken at blanks."""
    width = min(WIDTH, out.width)
    out.print(textwrap.fill(printable(text), width, subsequent_indent=indent, break_on_hyphens=False))


def machine_title(asked: Asked) -> str:
    """The machine in words: devices with their memory, then the host."""
    m = asked.machine
    memory = show_bytes(m.device.memory_bytes) if m.device.memory_bytes else ""
    parts = [
        f"{m.count} x {m.device.title} ({memory} each)"
        if m.count > 1
        else f"{m.device.title} ({memory})"
        if memory
        else m.device.title
    ]
    if m.host is not None and m.host.name != m.device.name:
        parts.append(m.host.title)
    if m.ram_bytes:
        parts.append(f"{show_bytes(m.ram_bytes)} of RAM")
    if m.nvme_bytes:
        parts.append(f"{m.nvme_bytes / 1e12:,.2f} TB of NVMe")
    return ", ".join(parts)


def _asked(out: Console, asked: Asked) -> None:
    model = asked.model
    heading(out, f"{model.name} on {machine_title(asked)}")
    _say(out, f"{model.parameters['trunk']:,} parameters, {model.stored_bytes:,} bytes stored")
    load = f"{asked.sessions:,} sessions of {asked.context:,} tokens" if asked.sessions != 1 else (
        f"1 session of {asked.context:,} tokens"
    )  # fmt: skip
    more = [f"cache rows {asked.kv_format}" + (", CSA rows on the host" if asked.csa_host else "")]
    if asked.prefilling != 1:
        more.append(f"{asked.prefilling:,} prompts computed at once")
    if asked.parked:
        more.append(f"{asked.parked:,} parked")
    if asked.shared_prefix:
        more.append(f"the first {asked.shared_prefix:,} tokens shared")
    _say(out, f"{load}; {', '.join(more)}")


def _verdict(out: Console, plan: Plan) -> None:
    several = plan.asked["machine"]["count"] > 1
    if plan.fits:
        out.print(f"\nIt fits, by {plan.mode}: {words.MEANING[plan.mode]}." if several else "\nIt fits.", style="bold")
        return
    out.print(f"\nIt does not fit by {plan.mode}." if several else "\nIt does not fit.", style="bold")
    _say(out, f"why     {plan.why_not}", " " * 8)
    if plan.change:
        _say(out, f"change  {plan.change}", " " * 8)


def _placed(out: Console, plan: Plan) -> None:
    found = words.columns(plan.places)
    shown = _few(found)
    heading(out, "what goes where, in GiB")
    lines: list[tuple[str, ...]] = []
    for kind, parts in words.rows(shown):
        if len(parts) == 1 and kind != "weights":
            lines.append((parts[0][0], *(_amount(n) for n in parts[0][1])))
            continue
        sums = [sum(amounts) for amounts in zip(*(amounts for _, amounts in parts), strict=True)]
        lines.append((kind, *(_amount(n) for n in sums)))
        lines += [(f"  {name}", *(_amount(n) for n in amounts)) for name, amounts in parts]
    places = [c.place for c in shown]
    lines.append(("used", *(_amount(p.used_bytes) for p in places)))
    lines.append(("of", *(_amount(p.total_bytes) if p.total_bytes else "unknown" for p in places)))
    lines.append(("free", *(_amount(p.free_bytes) if p.total_bytes else "" for p in places)))
    table(out, ("", *(c.title for c in shown)), lines)
    left_out = len(_devices(found)) - len(_devices(shown))
    if left_out:
        out.print(f"{left_out} more sorts of devices are between these, none of them fuller")


def _few(found: list[words.Column]) -> list[words.Column]:
    """At most so many columns: RAM and drives, and of devices the first ones with the fullest among them."""
    devices = _devices(found)
    host = [c for c in found if c.place.name in ("RAM", "NVMe") and c.place.items]
    room = MAX_COLUMNS - len(host)
    if len(devices) > room:
        fullest = min(devices, key=lambda c: c.place.free_bytes)
        kept = [devices[0], fullest, devices[-1]][:room] if room > 1 else [fullest]
        devices = [c for c in devices if any(c is k for k in kept)]
    return devices + host


def _devices(found: Sequence[words.Column]) -> list[words.Column]:
    return [c for c in found if c.place.name not in ("RAM", "NVMe")]


def _amount(num_bytes: int) -> str:
    """Bytes of a table in GiB; what is too little for two decimals is not shown as nothing."""
    if not num_bytes:
        return "-"
    return f"{num_bytes / GIB:,.2f}" if abs(num_bytes) >= GIB / 200 else "<0.01"


def _sessions(out: Console, asked: Asked, plan: Plan, longest: int) -> None:
    s = plan.sessions
    where = "on all devices together" if asked.machine.count > 1 else "in all"
    heading(out, f"room for sessions of {asked.context:,} tokens")
    for state, count, about in (
        ("decoding", s.decoding, f"{show_bytes(s.device_bytes, exact=True)} each, stored, {where}"),
        ("prefilling", s.prefilling, "of them at once; each takes the reserve while its prompt is computed"),
        ("parked in RAM", s.parked_ram, f"{show_bytes(s.parked_bytes, exact=True)} each"),
        ("parked on disk", s.parked_disk, ""),
    ):
        out.print(f"{state:<16}{count:>9,}  {about}".rstrip())
    each = f"each of {asked.sessions:,} sessions" if asked.sessions > 1 else "one session"
    mode = f", by {plan.mode}" if asked.machine.count > 1 else ""
    most = f"{longest:>10,}  tokens of" if longest else "      none  for"
    out.print(f"longest context{most} {each}{mode}")


def _speed(out: Console, plan: Plan) -> None:
    speed = plan.speed
    assert speed is not None
    heading(out, "speed, as a band")
    rows: list[tuple[str, Band]] = [
        ("decode, tok/s of one session", speed.decode_tok_s),
        ("decode, tok/s of all", speed.total_tok_s),
        ("prompt, tok/s", speed.prefill_tok_s),
        ("first token, s", speed.first_token_s),
    ]
    lines = [(what, words.figure(b.low), words.figure(b.mid), words.figure(b.high)) for what, b in rows]
    table(out, ("", "low", "middle", "high"), lines)
    _say(out, f"limited by {speed.limit}")
    _say(out, f"source: {speed.source}")


def _cost(out: Console, asked: Asked, plan: Plan) -> None:
    c = plan.cost
    if c is None:
        return  # a note says that no price is known
    heading(out, "cost")
    _say(out, words.cost_line(c))
    _say(
        out,
        f"per million tokens: {words.band(c.million_in, prefix='$')} in, {words.band(c.million_cached, prefix='$')} "
        f"cached, {words.band(c.million_out, prefix='$')} out",
    )
    computed = asked.prompt or asked.context
    _say(
        out,
        f"a turn of {asked.context:,} tokens, {computed:,} of them computed, and {asked.output:,} of answer: "
        f"{words.band(turn_cost(asked, c), prefix='$')}",
    )


def _ranking(out: Console, plans: Sequence[Plan]) -> None:
    heading(out, "modes, the best first")
    fit = [words.ranked(p) for p in plans if p.fits]
    if fit:
        titles = ("mode", "room for", "tok/s of one", "tok/s of all", "$/session-hour, full", "$/million out")
        table(out, titles, fit)
    for p in plans:
        if not p.fits:
            _say(out, f"{p.mode}    {p.why_not}" + (f"; {p.change}" if p.change else ""), " " * 6)


def _notes(out: Console, notes: Sequence[str]) -> None:
    if notes:
        heading(out, "to know")
    for note in notes:
        _say(out, f"- {note}", "  ")


def show_points(screen: Screen, points: Sequence[Point], title: str) -> None:
    """A sweep: sessions and their price over context and machine, then what each is like when full."""
    out = console(screen)
    heading(out, title)
    contexts = list(dict.fromkeys(p.context for p in points))
    machines = list(dict.fromkeys(p.machine for p in points))
    at = {(p.machine, p.context): p for p in points}
    heading(out, "sessions at once, by context; * on the frontier: none of these holds more for as little")
    lines = []
    for m in machines:
        price = at[m, contexts[0]].usd_hour
        each = [at[m, c] for c in contexts]
        lines.append((m, show_dollars(price) if price is not None else "-", *(_held(p) for p in each)))
    table(out, ("machine", "$/h", *(show_tokens(c) for c in contexts)), lines)
    if any(p.usd_session_hour is not None for p in points):
        heading(out, "dollars per session-hour")
        table(
            out,
            ("machine", *(show_tokens(c) for c in contexts)),
            [(m, *(_dollars(at[m, c].usd_session_hour) for c in contexts)) for m in machines],
        )
    heading(out, "each as full as it gets")
    table(
        out,
        ("machine", "context", "mode", "sessions", "tok/s of one", "tok/s of all"),
        [_full(p) for p in points if p.sessions],
    )
    for m in machines:
        reasons = [at[m, c] for c in contexts if not at[m, c].sessions]
        if reasons:
            _say(out, f"{m} at {show_tokens(reasons[0].context)}: {reasons[0].why_not}", "  ")


def _held(point: Point) -> str:
    return f"{point.sessions:,}{'*' if point.on_frontier else ' '}" if point.sessions else "- "


def _dollars(dollars: float | None) -> str:
    return "-" if dollars is None else show_dollars(dollars)


def _full(point: Point) -> tuple[str, ...]:
    one, everybody = (words.band(b) if b else "-" for b in (point.decode_tok_s, point.total_tok_s))
    return point.machine, show_tokens(point.context), point.mode, f"{point.sessions:,}", one, everybody


def show_offers(screen: Screen, need: Need, found: Sequence[Offer], title: str) -> None:
    """The cheapest configurations that meet a need; where none does, the nearest and what they lack."""
    out = console(screen)
    heading(out, title)
    _say(out, f"needed: {need}")
    meet = [o for o in found if not o.lacks]
    if not meet:
        out.print("\nNo configuration of the price list gives this. The nearest:", style="bold")
        for o in found[:NEAREST]:
            _say(out, f"{o.name}  {'; '.join(o.lacks)}", "  ")
            if o.plan.change:
                _say(out, f"  {o.plan.change}", "  ")
        return
    out.print(f"\n{len(meet)} of {len(found)} configurations give this; the cheapest first", style="bold")
    titles = ("configuration", "$/h", "mode", "room for", "tok/s of one", "tok/s of all", "first token, s", "sure")
    table(out, titles, [_offered(o) for o in meet[:OFFERED]])
    if len(meet) > OFFERED:
        out.print(f"{len(meet) - OFFERED} more; --json has all")
    out.print("sure: the worse end of each band gives it too; likely: its middle does")


def _offered(offer: Offer) -> tuple[str, ...]:
    s, price = offer.plan.speed, offer.machine.price_usd_hour
    bands = [words.band(b) for b in (s.decode_tok_s, s.total_tok_s, s.first_token_s)] if s else ["-", "-", "-"]
    sure = "sure" if offer.surely else "likely"
    return offer.name, _dollars(price), offer.plan.mode, f"{offer.plan.sessions.decoding:,}", *bands, sure


def show_devices(screen: Screen, devices: Sequence[Device]) -> None:
    """The hardware table: what each device has, and where that is from."""
    out = console(screen)
    heading(out, "memory as the driver reports it, in GiB; bandwidth in GB/s; dense TFLOP/s; links per direction")
    titles = ("name", "GiB", "GB/s", "bf16", "fp8", "fp4", "peer GB/s", "host GB/s")
    table(out, titles, [_device(d) for d in devices])
    heading(out, "sources")
    for d in devices:
        _say(out, f"{d.name}: {d.title}; {d.source}", "  ")


def _device(d: Device) -> tuple[str, ...]:
    memory = f"{d.memory_bytes / GIB:,.1f}" if d.memory_bytes else "-"
    flops = (f"{d.flops[t] / 1e12:,.0f}" if d.flops.get(t) else "-" for t in ("bf16", "fp8", "fp4"))
    links = (f"{b / 1e9:,.0f}" if b else "-" for b in (d.peer_bytes_s, d.host_bytes_s))
    return d.name, memory, f"{d.read_bytes_s / 1e9:,.0f}", *flops, *links


def show_vendor(screen: Screen, report: dict[str, Any]) -> None:
    """The vendor's cells: listed, reproduced, and what this engine holds by mode."""
    out = console(screen)
    heading(out, "sessions of 1,048,576 tokens: a vendor's list, reproduced; then what this engine holds, by mode")
    modes = list(dict.fromkeys(m for cell in report["cells"] for m in cell["ours"]))
    titles = ("table", "name", "weights", "GPUs", "mode", "listed", "predicted", *modes)
    table(out, titles, [_cell(cell, modes) for cell in report["cells"]], left=3)
    for why in dict.fromkeys(cell["why"] for cell in report["cells"]):
        _say(out, f"- {why}", "  ")


def show_history(screen: Screen, found: Sequence[Errors]) -> None:
    """How far plans were off on this machine, by what was predicted."""
    out = console(screen)
    if not found:
        out.print(
            "nothing was measured beside a prediction yet: `pyrosome serve` and the benchmarks keep what they see"
        )
        return
    heading(out, "predicted beside measured; errors are shares of what was measured")
    titles = ("what", "count", "median error", "90th percentile", "median with its sign", "last")
    lines = [
        (e["what"], f"{e['count']:,}", f"{e['median']:.1%}", f"{e['p90']:.1%}", f"{e['bias']:+.1%}", e["last"][:10])
        for e in found
    ]
    table(out, titles, lines)


def _cell(cell: dict[str, Any], modes: Sequence[str]) -> tuple[str, ...]:
    ours = (f"{cell['ours'][m]:,}" if m in cell["ours"] else "-" for m in modes)
    start = (cell["table"], cell["name"], cell["weights"], str(cell["gpus"]), cell["mode"])
    return *start, f"{cell['listed']:.3f}", f"{cell['predicted']:.3f}", *ours
