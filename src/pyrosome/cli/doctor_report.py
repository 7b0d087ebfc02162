"""What `pyrosome doctor` found, in words and columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyrosome import env
from pyrosome.cli.machine import allowed_cores
from pyrosome.cli.tables import console, heading, table
from pyrosome.cli.terminal import Screen, printable, size

if TYPE_CHECKING:
    from rich.console import Console

Report = dict[str, Any]
HUGE_PAGES = {"always": "always given", "madvise": "given to weights", "never": "off", "": "not told"}


def show(report: Report, screen: Screen) -> None:
    """Everything, section by section, and the verdict last."""
    out = console(screen)
    sections = {
        "machine": _machine, "GPUs and drivers": _gpus, "speeds": _speeds, "versions": _versions,
        "environment": _environment, "folders": _folders, "native kernels": _native,
    }  # fmt: skip
    for title, lines in sections.items():
        _section(out, title, lines(report))
    _ops(report, out)
    _section(out, f"self-test of {report['model']}", _tested(report))
    _section(out, "warnings", _warnings(report))
    _section(out, "what this machine can hold", _advice(report))
    heading(out, _verdict(report))


def _section(out: Console, title: str, lines: Iterator[str]) -> None:
    """A heading and what stands under it; nothing where that is nothing."""
    found = list(lines)
    if found:
        heading(out, title)
    for line in found:
        out.print(printable(line))


def _verdict(report: Report) -> str:
    if not report["ok"]:
        return "something is wrong: see FAIL above"
    n = len(report["warnings"])
    well = "nothing wrong was found, and the model was not tested" if report["not_tested"] else "all is well"
    return well + (f", with {n} warning{'s' * (n != 1)}" if n else "")


def _machine(report: Report) -> Iterator[str]:
    cpu, memory, disk = report["cpu"], report["memory"], report["disk"]
    sockets = f", {cpu['sockets']} socket{'s' * (cpu['sockets'] != 1)}" if cpu["sockets"] else ""
    nodes = f", {cpu['nodes']} memory node{'s' * (cpu['nodes'] != 1)}" if cpu["nodes"] else ""
    quota = f", a quota of {cpu['quota']:g} cores' time" if cpu["quota"] else ""
    yield (
        f"{cpu['model']} ({cpu['architecture']}){sockets}{nodes}, {cpu['usable_cores']} of {cpu['cores']} cores usable"
        f"{quota}"
    )
    if cpu["flags"] is not None:
        there = [f for f, found in cpu["flags"].items() if found]
        yield f"instructions: {', '.join(there) or 'none of those that matter'}"
    swap = f", swap {size(memory['swap'])} ({size(memory['swap_used'])} used)" if memory["swap"] else ", no swap"
    yield f"memory {size(memory['total'])}, {size(memory['available'])} available{swap}"
    if memory["limit"]:
        yield f"of it this container may use {size(memory['limit'])}, and uses {size(memory['limit_used'])}"
    yield f"huge pages: {HUGE_PAGES.get(memory['huge_pages'], memory['huge_pages'])}"
    if cpu["load"] is not None:
        yield f"load over the last minute: {cpu['load']:.1f} tasks, for {allowed_cores(cpu)} cores"
    yield f"{size(disk['free'])} free at {disk['path']}"
    held = {name: "no limit" if value is None else f"{value:,}" for name, value in report["limits"].items()}
    yield f"open files: {held['open_files']}; bytes that may be held in memory: {held['locked_bytes']}"


def _gpus(report: Report) -> Iterator[str]:
    told, build = report["drivers"]["nvidia"], report["drivers"]["torch"]
    if told["version"]:
        yield f"NVIDIA driver {told['version']}"
    links = {link["bus"]: link for link in report["drivers"]["links"]}
    for gpu in told["gpus"]:
        memory = f"{size(gpu['memory'])}, {size(gpu['memory_free'])} free" if gpu["memory"] else "memory of the machine"
        yield f"{gpu['name']}, capability {gpu['capability']}, {memory}{_link(links.pop(gpu['bus'], None))}"
    for bus, link in links.items():
        yield f"{link['vendor']} at {bus}{_link(link)}"
    for gpu in report["gpus"]:
        yield f"torch can use: {gpu['name']}, capability {gpu['capability']}, {size(gpu['memory'])}; {gpu['tuned']}"
    if not report["gpus"]:
        yield "no GPU that torch can use"
    made = f"CUDA {build['cuda']}" if build["cuda"] else f"HIP {build['hip']}" if build["hip"] else "no GPU"
    yield f"torch is built for {made}; {'triton is there' if report['versions'].get('triton') else 'no triton'}"


def _link(link: dict[str, Any] | None) -> str:
    if link is None:
        return ""
    now, most = link["generation"], link["max_generation"]
    generations = f", generation {now or '?'} of {most or '?'}"
    return f", PCIe {link['lanes']} of {link['max_lanes']} lanes{generations}"


def _speeds(report: Report) -> Iterator[str]:
    found = report["speeds"]
    if memory := found.get("memory"):
        cores = memory["cores"]
        yield (
            f"memory was not measured: {memory['why_not']}"
            if memory["why_not"]
            else f"memory is read at {_rate(memory['one_core'])} by one core"
            + (f", {_rate(memory['all_cores'])} by {cores} cores" if cores > 1 else "")
        )
    if state := found.get("state"):
        if state["write"]:
            yield f"the drive of {state['path']} is written at {_rate(state['write'])}"
        yield (
            f"and is read at {_rate(state['read'])}"
            if state["read"]
            else f"{state['path']} was not read: {state['why_not']}"
        )
    if model := found.get("model"):
        yield (
            f"the model is read at {_rate(model['read'])} ({size(model['num_bytes'])} of {model['path']})"
            if model["read"]
            else f"the model's drive was not measured: {model['why_not']} ({model['path']})"
        )


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s" if bytes_s >= 1e9 else f"{bytes_s / 1e6:.0f} MB/s"


def _versions(report: Report) -> Iterator[str]:
    yield ", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items())
    for extra, lacking in report["extras"].items():
        if lacking:
            yield f"{extra} lacks {', '.join(lacking)}: pip install 'pyrosome[{extra}]'"


def _environment(report: Report) -> Iterator[str]:
    for name, value in report["environment"]["set"].items():
        yield f"{name}={value}"
    for name in report["environment"]["unknown"]:
        yield f"{name} is set, and nothing here reads it: is it misspelt?"
    if not any(report["environment"].values()):
        yield "no variable is set that matters here"


def _folders(report: Report) -> Iterator[str]:
    for name, folder in report["folders"].items():
        state = folder["why_not"] or f"{size(folder['free'])} free{'' if folder['is_there'] else ', not made yet'}"
        yield f"{name}: {folder['path'] or '-'}: {state}"


def _native(report: Report) -> Iterator[str]:
    native = report["native"]
    yield native["level"] or f"none: {native['error']}"
    for above in native["above"]:
        yield f"not {above['level']}: {above['why_not'] or 'nothing speaks against it'}"


def _ops(report: Report, out: Console) -> None:
    heading(out, "ops")
    rows = [
        (o["op"], f"{o['device']} {o['capability']}".strip(), o["format"] or "-", o["chosen"] or "none", _why(o))
        for o in report["ops"]
    ]
    table(out, ("op", "device", "format", "version", "why"), rows, left=5)
    for package in report["accelerators"]:
        of = f"kernels of {package['package']} ({package['entry']})"
        out.print(printable(f"{of}: {package['error'] or 'for ' + ', '.join(package['ops'])}"))


def _why(op: dict[str, Any]) -> str:
    if op["error"] or op["passed_over"]:
        return printable(op["error"] or "; ".join(op["passed_over"]))
    if len(op["versions"]) == 1:
        return "the definition is the only version"
    return f"asked for by {env.OPS.name}" if op["chosen"] == "torch" else "the first that applies"


def _tested(report: Report) -> Iterator[str]:
    for f in report["self_test"]:
        yield f"{'ok  ' if f['ok'] else 'FAIL'}  {f['check']}: {f['prompt']!r}: {f['detail']}"
    if report["not_tested"]:
        yield f"left out, since memory does not hold the model: {report['not_tested']}"


def _warnings(report: Report) -> Iterator[str]:
    for w in report["warnings"]:
        yield f"{w['about']}: {w['text']}"


def _advice(report: Report) -> Iterator[str]:
    advice = report["advice"]
    if advice["why_not"]:
        yield f"nothing can be said: {advice['why_not']}"
    for plan in advice["plans"]:
        title, *parts = plan["parts"]
        yield title
        yield from (f"- {part}" for part in parts)
    if advice["calibration"]["text"]:
        yield f"this machine is {advice['calibration']['text']}"
