"""What this machine and this installation are, as plain data.  Memory and disk are in bytes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from pyrosome import __version__, env
from pyrosome.cli.first_contact import machine_memory

# What fast kernels look for: x86 names as /proc/cpuinfo spells them, then the ARM ones.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm")
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "deepseek-recipe", "triton")
# Not ours, and decide speed or device all the same.
FOREIGN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "WORLD_SIZE")


def cpu() -> dict[str, Any]:
    """Model, cores this process may use, and which of the flags that matter are there (None: not told)."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    found = set(flags[1].split()) if flags else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "flags": None if found is None else {f: f in found for f in FLAGS},
    }


def memory() -> dict[str, int]:
    """Total and available bytes; 0 where the system does not say."""
    try:
        info = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = re.search(r"^MemAvailable:\s*(\d+) kB", info, re.MULTILINE)
    except OSError:
        available = None
    return {"total": machine_memory(), "available": int(available[1]) * 1024 if available else 0}


def disk(path: Path) -> dict[str, Any]:
    """Free bytes where `path` is."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return {"path": str(path), "free": shutil.disk_usage(path).free}


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory})
    return found


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"pyrosome": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def variables() -> dict[str, dict[str, str]]:
    """Environment variables that are set and matter: this package's own, others', and misspelt ones."""
    own = {v.name for v in env.ALL}
    return {
        "set": {name: os.environ[name] for name in sorted(own) + list(FOREIGN) if name in os.environ},
        "unknown": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYROSOME_") and k not in own},
    }
