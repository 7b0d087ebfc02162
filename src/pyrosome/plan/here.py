"""What this machine is, as its own files and tools tell: no torch, nothing computed, nothing assumed.

Linux: /proc, cgroup limits and `nvidia-smi` where it is installed.  macOS: `sysctl`.  What is not told is 0, "" or ().
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from pyrosome.cgroups import NO_LIMIT, cpu_quota, memory_limit, text

TOOL_SECONDS = 20.0  # nvidia-smi wakes devices that sleep
_ROOT = Path("/")


@dataclasses.dataclass(frozen=True, slots=True)
class FoundGpu:
    """A GPU as its driver reports it."""

    name: str
    memory_bytes: int  # 0: not told, since it is the machine's
    capability: str


@dataclasses.dataclass(frozen=True, slots=True)
class Here:
    """This machine."""

    gpus: tuple[FoundGpu, ...]
    cpu: str  # model, as the system names it
    architecture: str
    cores: int  # physical ones that this process may use
    ghz: float  # as the system tells it now
    flags: frozenset[str]  # instructions, as the system spells them
    ram_bytes: int  # of the machine, or of the container this process is in
    disk_bytes: int  # free where the current folder is


def look() -> Here:
    """What there is, now."""
    info = text(_ROOT / "proc/cpuinfo")
    apple = platform.system() == "Darwin"
    return Here(
        gpus=_gpus(),
        cpu=_sysctl("machdep.cpu.brand_string") if apple else _line(info, r"model name|Model|Hardware"),
        architecture=platform.machine(),
        cores=_cores(info),
        ghz=float(_line(info, r"cpu MHz") or 0) / 1000,
        flags=frozenset(_line(info, r"flags|Features").split()),
        ram_bytes=int(_sysctl("hw.memsize") or 0) if apple else _ram(),
        disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def vectors(flags: frozenset[str], model: str) -> str:
    """The entry of `vectors` in the table of processors whose instructions these are."""
    amd = "AMD" in model
    for there, name in (
        ("amx_bf16" in flags, "amx"),
        ("avx512_bf16" in flags and amd, "zen5" if "avx_vnni" in flags else "zen4"),
        ("avx512_vnni" in flags, "avx512"),
        ("avx2" in flags and "avx_vnni" in flags, "avx_vnni"),
        ("avx2" in flags, "avx2"),
        ({"i8mm", "bf16"} <= flags, "neoverse_v2"),
        ("asimd" in flags, "neon"),
    ):
        if there:
            return name
    return "narrow"


def _cores(info: str) -> int:
    """Physical cores: two threads of one core share its units."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    siblings, per_socket = _line(info, "siblings"), _line(info, "cpu cores")
    threads = int(siblings) // int(per_socket) if siblings.isdigit() and per_socket.isdigit() else 1
    quota = cpu_quota(_ROOT)  # a container may use no more than a quota's worth of them
    usable = min(usable, max(1, int(quota))) if quota else usable
    return max(1, usable // max(1, threads))


def _ram() -> int:
    total = re.search(r"^MemTotal:\s*(\d+) kB", text(_ROOT / "proc/meminfo"), re.MULTILINE)
    limit, _ = memory_limit(_ROOT)
    least = min(int(total[1]) * 1024 if total else NO_LIMIT, limit)
    return least if least < NO_LIMIT else 0


def _gpus() -> tuple[FoundGpu, ...]:
    told = _run("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
    return tuple(
        FoundGpu(m[1].strip(), int(m[2]) << 20 if m[2].isdigit() else 0, m[3])
        for line in told.splitlines()
        if (m := re.fullmatch(r"(.+),\s*(\d+|\[N/A\]|\[Not Supported\]),\s*(\d+\.\d+)\s*", line))
    )


def _sysctl(key: str) -> str:
    return _run("sysctl", "-n", key).strip()


def _run(*command: str) -> str:
    return run_tool(*command, seconds=TOOL_SECONDS)


def run_tool(*command: str, seconds: float) -> str:
    """What a tool prints; "" where it is not there, fails or hangs for longer than that."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _line(info: str, keys: str) -> str:
    found = re.search(rf"^(?:{keys})\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else ""
