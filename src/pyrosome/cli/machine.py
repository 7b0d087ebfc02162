"""What this machine and this installation are, as plain data.  Memory and disk are in bytes.

What a system does not tell is 0, "" or None.  `root` is where its files are looked for: another one in tests.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from pyrosome import __version__, env
from pyrosome.cgroups import NO_LIMIT, ROOT, cpu_quota, memory_limit, text
from pyrosome.cli.first_contact import machine_memory

# What fast kernels look for: x86 names as /proc/cpuinfo spells them, then the ARM ones.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm")
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "deepseek-recipe", "triton")
# Not ours, and decide speed or device all the same.
FOREIGN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "WORLD_SIZE")
EXTRAS = ("serve", "train", "bench")  # those that commands need


def cpu(root: Path = ROOT) -> dict[str, Any]:
    """Model, cores this process may use, sockets, memory nodes, load, and which of the flags that matter are there.

    Flags are None where the system does not list them; `quota` is the share of cores that a container may use.
    """
    info = text(root / "proc/cpuinfo")
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    found = set(flags[1].split()) if flags else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = re.match(r"\d+\.\d+", text(root / "proc/loadavg"))
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "flags": None if found is None else {f: f in found for f in FLAGS},
        "sockets": len(set(re.findall(r"^physical id\s*:\s*(\d+)", info, re.MULTILINE))) or None,
        "nodes": len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or None,
        "quota": cpu_quota(root),
        "load": float(load[0]) if load else None,
    }


def allowed_cores(cpu: dict[str, Any]) -> int:
    """Whole cores that threads of this process can run on at once."""
    usable, quota = cpu["usable_cores"], cpu["quota"]
    return max(1, min(usable, math.ceil(quota) if quota else usable))


def lacking_flags(level: str, root: Path = ROOT) -> list[str]:
    """Instructions that native kernels of a level need and this processor has not got."""
    from pyrosome.ops.toolchain import NEEDS

    found = re.search(r"^flags\s*:\s*(.+)$", text(root / "proc/cpuinfo"), re.MULTILINE)
    return sorted(NEEDS[level] - set(found[1].split() if found else ()))


def memory(root: Path = ROOT) -> dict[str, Any]:
    """Total and available bytes, those of swap, what a container may use and uses, and how huge pages are given."""
    told = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s*(\d+) kB", text(root / "proc/meminfo"), re.MULTILINE)}
    mode = re.search(r"\[(\w+)\]", text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    limit, used = memory_limit(root)
    total = told.get("MemTotal", 0) or machine_memory()
    return {
        "total": total,
        "available": told.get("MemAvailable", 0),
        "limit": limit if limit < (total or NO_LIMIT) else 0,
        "limit_used": used if limit < (total or NO_LIMIT) else 0,
        "swap": told.get("SwapTotal", 0),
        "swap_used": told.get("SwapTotal", 0) - told.get("SwapFree", 0),
        "huge_pages": mode[1] if mode else "",
    }


def memory_here(memory: dict[str, Any]) -> int:
    """Bytes there are for this process: of the machine, or of its container."""
    return int(min(memory["total"], memory["limit"] or NO_LIMIT))


def memory_free(memory: dict[str, Any]) -> int:
    """Bytes that it may still take; 0: not known."""
    left = max(1, memory["limit"] - memory["limit_used"]) if memory["limit"] else NO_LIMIT
    return int(min(memory["available"], left))


def disk(path: Path) -> dict[str, Any]:
    """Free bytes where `path` is."""
    path = nearest(path)
    return {"path": str(path), "free": shutil.disk_usage(path).free}


def nearest(path: Path) -> Path:
    """The path, or what it would be in: the first folder above it that is there."""
    while path != path.parent:
        try:
            path.stat()
        except OSError:
            path = path.parent
        else:
            break
    return path


def limits() -> dict[str, int | None]:
    """What this process may have: open files, and bytes held in memory; None: no limit, or none that is told."""
    try:
        import resource  # not on every system
    except ImportError:
        return {"open_files": None, "locked_bytes": None}
    soft = {"open_files": resource.RLIMIT_NOFILE, "locked_bytes": resource.RLIMIT_MEMLOCK}
    found = {name: resource.getrlimit(which)[0] for name, which in soft.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        capability = f"{p.major}.{p.minor}"
        found.append({"name": p.name, "capability": capability, "memory": p.total_memory, "tuned": tuned(p.name)})
    return found


def tuned(device: str) -> str:
    """Whether variants of kernels were measured on devices of this name, in words."""
    from pyrosome.errors import KernelUnavailable
    from pyrosome.ops import tuned

    try:
        return "variants of kernels as measured on it" if tuned.choices(device) else "variants of kernels by default"
    except KernelUnavailable as error:
        return str(error)


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"pyrosome": __version__, "python": platform.python_version()}
    return found | {package: _version(package) for package in PACKAGES}


def extras() -> dict[str, list[str]]:
    """Packages that each extra names and that are not installed; nothing where this one was not installed itself."""
    try:
        needed = importlib.metadata.requires("pyrosome") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {name: [] for name in EXTRAS}
    for line in needed:
        named = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        if named and extra and extra[1] in found and _version(named[0]) is None:
            found[extra[1]].append(named[0])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def variables() -> dict[str, dict[str, str]]:
    """Environment variables that are set and matter: this package's own, others', and misspelt ones."""
    own = {v.name for v in env.ALL}
    return {
        "set": {name: os.environ[name] for name in sorted(own) + list(FOREIGN) if name in os.environ},
        "unknown": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYROSOME_") and k not in own},
    }
