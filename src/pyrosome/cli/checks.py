"""What is wrong, or slower than it need be, on a machine that a report describes.

Each check reads the report alone and yields sentences: what was found, what follows, what to do.  None of them makes
`doctor` fail; kernels and the self-test do.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pyrosome import env
from pyrosome.cli.accelerators import too_old
from pyrosome.cli.machine import allowed_cores, memory_free, memory_here
from pyrosome.cli.terminal import size

Report = dict[str, Any]
# What is looked at when a server starts: nothing of it asks torch or a GPU's driver.
AT_START = (
    "kernels", "environment", "threads", "load", "memory", "huge pages", "swap", "open files", "folders", "clock"
)  # fmt: skip
BUSY = 0.5  # share of the cores that others may keep busy
OPEN_FILES = 1024  # a connection each, the shards, the usage ledger
LEAST_STATE_BYTES = 1 << 30
SWAPPED, LEAST_FREE_BYTES = 256 << 20, 1 << 30
# Which command installs a C++ compiler, by the installer there is.
INSTALLERS = {
    "apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++", "yum": "yum install gcc-c++",
    "apk": "apk add g++", "pacman": "pacman -S gcc", "zypper": "zypper install gcc-c++",
    "xcode-select": "xcode-select --install",
}  # fmt: skip


def warnings(report: Report, about: Collection[str] = ()) -> list[dict[str, str]]:
    """Everything that is found: [{"about", "text"}], in the order of CHECKS.

    Args:
        about: names of CHECKS; (): all of them.
    """
    chosen = {name: check for name, check in CHECKS.items() if not about or name in about}
    return [{"about": name, "text": text} for name, check in chosen.items() for text in check(report)]


def _kernels(report: Report) -> Iterator[str]:
    native = report["native"]
    if not native["level"]:
        install = next((how for tool, how in INSTALLERS.items() if shutil.which(tool)), "install g++ or clang++")
        how = f" ({install})" if "no C++ compiler" in native["error"] else ""
        yield f"there are no native kernels, and definitions, many times slower, run instead: {native['error']}{how}"
    elif native["asked"] not in ("auto", "") and native["above"]:
        yield f"{env.CPU.name}={native['asked']} keeps kernels from {native['above'][-1]['level']}; unset it"


def _overrides(report: Report) -> Iterator[str]:
    asked = report["environment"]["set"].get(env.OPS.name, "auto")
    if asked not in ("auto", ""):
        slow = sorted({o["op"] for o in report["ops"] if o["chosen"] == "torch" and len(o["versions"]) > 1})
        s = "s" * (len(slow) != 1)
        yield (
            f"{env.OPS.name}={asked} decides what runs: {len(slow)} op{s} by definition that could be faster"
            f"{': ' + ', '.join(slow) if slow else ''}; unset it"
        )


def _misspelt(report: Report) -> Iterator[str]:
    known = [v.name for v in env.ALL]
    for name in report["environment"]["unknown"]:
        near = difflib.get_close_matches(name, known, 1)
        yield f"{name} is set, and nothing here reads it{f': {near[0]} is meant?' if near else ''}"


def _drivers(report: Report) -> Iterator[str]:
    told, build = report["drivers"]["nvidia"], report["drivers"]["torch"]
    version, torch = told["version"], report["versions"].get("torch")
    if not version:
        if report["drivers"]["tool"]:
            yield "nvidia-smi is there and tells of no GPU: the driver is not loaded, or this container was given none"
        return
    if not build["cuda"]:
        name = told["gpus"][0]["name"]
        yield f"driver {version} has a GPU, {name}, and torch {torch} was built without CUDA: install a build with it"
    elif least := too_old(version, build["cuda"]):
        yield (
            f"the driver is {version} and torch {torch}, built for CUDA {build['cuda']}, needs {least} or newer: "
            "update it, or install a torch for an older CUDA"
        )
    elif not report["gpus"]:
        count = len(told["gpus"])
        gpus = f"{count} GPU{'s' * (count != 1)}"
        yield f"driver {version} tells of {gpus} and torch {torch} can use none: is CUDA_VISIBLE_DEVICES empty?"
    built = {int(m[1]) for a in build["architectures"] if (m := re.fullmatch(r"sm_(\d+)a?", a))}
    for gpu in told["gpus"] if built else ():
        if gpu["capability"] and int(gpu["capability"].replace(".", "")) < min(built):
            yield (
                f"{gpu['name']} has capability {gpu['capability']} and torch {torch} has code from "
                f"{min(built) / 10:.1f} on: install an older torch"
            )


def _links(report: Report) -> Iterator[str]:
    for link in report["drivers"]["links"]:
        if link["lanes"] < link["max_lanes"]:
            yield (
                f"the GPU at {link['bus']} has {link['lanes']} of {link['max_lanes']} PCIe lanes: what comes over them "
                f"takes {link['max_lanes'] / link['lanes']:g} times as long; look at its slot"
            )


def _threads(report: Report) -> Iterator[str]:
    asked, cores = report["environment"]["set"].get("OMP_NUM_THREADS"), allowed_cores(report["cpu"])
    quota, usable = report["cpu"]["quota"], report["cpu"]["usable_cores"]
    why = f"a quota of {quota:g} of {usable}" if quota and quota < usable else f"{usable} of this machine"
    if asked is None:
        if cores < usable:
            yield (
                f"torch will use {usable} threads and this container may use {quota:g} cores' time: steps will stall; "
                f"set OMP_NUM_THREADS={cores}"
            )
        return
    threads = int(asked) if re.fullmatch(r"[1-9]\d{0,5}", asked.strip()) else 0
    if not threads:
        yield f"OMP_NUM_THREADS={asked} is no number of threads; set it to {cores}, or unset it"
    elif threads > cores:
        yield f"OMP_NUM_THREADS={asked}, and {cores} cores may be used ({why}): threads wait in turn; set it to {cores}"
    elif threads < cores:
        yield f"OMP_NUM_THREADS={asked} leaves {cores - threads} of {cores} cores idle; unset it for all speed there is"


def _busy(report: Report) -> Iterator[str]:
    load, cores = report["cpu"]["load"], allowed_cores(report["cpu"])
    if load is not None and load > BUSY * report["cpu"]["usable_cores"]:
        yield (
            f"this machine is busy: {load:.1f} tasks on average over the last minute, {cores} cores for this process; "
            "speeds that are measured now are too low"
        )


def _memory(report: Report) -> Iterator[str]:
    memory = report["memory"]
    there, left = memory_here(memory), memory_free(memory)
    if left and left < max(LEAST_FREE_BYTES, there // 10):
        whose = "this container may use" if memory["limit"] else "this machine has"
        more = "; beyond it, processes are killed: give it more (docker run --memory)" if memory["limit"] else ""
        yield f"{size(left)} of memory are free, of {size(there)} that {whose}{more or '; end what else runs'}"


def _pages(report: Report) -> Iterator[str]:
    if report["memory"]["huge_pages"] == "never":
        held = memory_here(report["memory"])
        yield (
            f"huge pages are off: {size(held)} are {held >> 12:,} pages of 4 KiB instead of {held >> 21:,} of 2 MiB, "
            "and weights are read more slowly; as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )


def _swap(report: Report) -> Iterator[str]:
    used, limit = report["memory"]["swap_used"], report["limits"]["locked_bytes"]
    if used > SWAPPED:
        held = "no limit" if limit is None else f"{size(limit)} (ulimit -l)"
        yield (
            f"{size(used)} are swapped out; weights that are swapped out stop every step: --lock-memory holds them in "
            f"memory, and may hold {held}"
        )


def _files(report: Report) -> Iterator[str]:
    most = report["limits"]["open_files"]
    if most is not None and most < OPEN_FILES:
        yield f"{most:,} files may be open at once, and a server has one a connection: ulimit -n {4 * OPEN_FILES}"


def _folders(report: Report) -> Iterator[str]:
    for name, folder in report["folders"].items():
        if folder["why_not"]:
            yield f"the folder of {name}, {folder['path'] or 'which has no name'}: {folder['why_not']}"
        elif folder["free"] < LEAST_STATE_BYTES:
            yield f"{size(folder['free'])} are free for {name} at {folder['path']}; free {size(LEAST_STATE_BYTES)}"
        if folder["open_to"]:
            yield (
                f"{folder['path']} is open to {folder['open_to']}, and keys are kept there: chmod 700 {folder['path']}"
            )


def _clock(report: Report) -> Iterator[str]:
    if report["clock_behind_s"] > 0:
        days = report["clock_behind_s"] / 86400
        yield (
            f"the clock is at least {days:,.1f} days behind, since files of this package are newer: keys would end and "
            "certificates begin at wrong times; set it"
        )


CHECKS: dict[str, Callable[[Report], Iterator[str]]] = {
    "kernels": _kernels,
    "versions of ops": _overrides,
    "environment": _misspelt,
    "drivers": _drivers,
    "PCIe": _links,
    "threads": _threads,
    "load": _busy,
    "memory": _memory,
    "huge pages": _pages,
    "swap": _swap,
    "open files": _files,
    "folders": _folders,
    "clock": _clock,
}
