"""GPUs and their drivers, as the driver's own tool and the system's files tell; no torch is asked but for its build.

Memory is in bytes.  Each reader takes what it reads from as an argument, so that any machine can be told of.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrosome.cgroups import ROOT, text
from pyrosome.plan import here

TOOL_SECONDS = 10.0  # nvidia-smi wakes devices that sleep
QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap", "pci.bus_id")
# The oldest driver that runs what is built for a major version of CUDA: NVIDIA's CUDA compatibility guide, table 1.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # of PCIe, by GT/s of a lane


def run_tool(*command: str) -> str:
    """What a tool prints; "" where it is not there, fails or hangs."""
    return here.run_tool(*command, seconds=TOOL_SECONDS)


def driver(run: Callable[..., str] = run_tool) -> dict[str, Any]:
    """The NVIDIA driver's version and its GPUs; version "" where `nvidia-smi` tells nothing."""
    told = run("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines()]
    found = [dict(zip(QUERY, row, strict=True)) for row in rows if len(row) == len(QUERY)]
    gpus = [
        {
            "name": g["name"], "capability": g["compute_cap"], "bus": _bus(g["pci.bus_id"]),
            "memory": _mebibytes(g["memory.total"]), "memory_free": _mebibytes(g["memory.free"]),
        }
        for g in found
    ]  # fmt: skip
    return {"version": found[0]["driver_version"] if found else "", "gpus": gpus}


def _mebibytes(told: str) -> int:
    return int(told) << 20 if told.isdigit() else 0  # "[N/A]" where the memory is the machine's


def _bus(told: str) -> str:
    """An address as the system's files have it: four digits of domain, small letters."""
    return told.lower()[-12:]


def has_tool() -> bool:
    """Whether a driver was installed at all."""
    return shutil.which("nvidia-smi") is not None


def links(root: Path = ROOT) -> list[dict[str, Any]]:
    """The PCIe link of each display or compute device of a maker of GPUs: lanes and generation, now and at most."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = text(folder / "vendor").strip(), text(folder / "class").strip()
        if vendor not in VENDORS or not kind.startswith("0x03"):
            continue
        lanes = [text(folder / f"{which}_link_width").strip() for which in ("current", "max")]
        if all(n.isdigit() and 0 < int(n) <= 32 for n in lanes):  # 255: not known
            found.append(
                {
                    "bus": folder.name, "vendor": VENDORS[vendor], "lanes": int(lanes[0]), "max_lanes": int(lanes[1]),
                    "generation": _generation(folder / "current_link_speed"),
                    "max_generation": _generation(folder / "max_link_speed"),
                }
            )  # fmt: skip
    return found


def _generation(file: Path) -> int | None:
    speed = re.match(r"\d+(?:\.\d+)?", text(file))
    return GENERATIONS.get(float(speed[0])) if speed else None


def torch_build() -> dict[str, Any]:
    """What the installed torch was built for: CUDA's version, or HIP's, and the GPU architectures it has code for."""
    import torch

    cuda, hip = torch.version.cuda, torch.version.hip
    return {"cuda": cuda or "", "hip": hip or "", "architectures": torch.cuda.get_arch_list() if cuda else []}


def too_old(version: str, cuda: str) -> int:
    """The oldest driver that a build for this CUDA needs, where the one that is there is older; else 0."""
    there, needed = re.match(r"\d+", version), re.match(r"\d+", cuda)
    least = OLDEST_DRIVER.get(int(needed[0]), 0) if needed else 0
    return least if there and int(there[0]) < least else 0
