"""What this process may use, of the machine or of its container: control groups of Linux, versions 1 and 2."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 62  # groups write more than any machine has where there is none


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that this process's groups may use; None: no limit."""
    found = []
    for group in _groups(root, "cpu"):
        parts = text(group / "cpu.max").split() or [
            text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(parts) == 2 and all(p.isdigit() and int(p) for p in parts):
            found.append(int(parts[0]) / int(parts[1]))
    return min(found, default=None)


def memory_limit(root: Path = ROOT) -> tuple[int, int]:
    """(bytes that this process's groups may use, bytes used of it without files that were read), the tightest one."""
    found = []
    for group in _groups(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = text(group / limit).strip(), text(group / usage).strip()
            if most.isdigit():
                kept = max(0, int(used) - _files(group)) if used.isdigit() else 0
                found.append((int(most), kept))
    return min(found, key=lambda f: f[0] - f[1], default=(NO_LIMIT, 0))


def available_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take: of the machine, or of the container it is in; 0: not known."""
    told = re.search(r"^MemAvailable:\s*(\d+) kB", text(root / "proc/meminfo"), re.MULTILINE)
    limit, used = memory_limit(root)
    left = [int(told[1]) * 1024] if told else []
    return min(left + ([max(1, limit - used)] if limit < NO_LIMIT else []), default=0)


def _files(group: Path) -> int:
    """Bytes of files that a group has read and that are given up when memory is needed."""
    told = re.findall(r"^(?:total_)?((?:in)?active_file) (\d+)", text(group / "memory.stat"), re.MULTILINE)
    return sum(map(int, dict(told).values()))  # version 1 tells its own first, then those of all below


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups this process is in, from its own up: of version 2, and of version 1."""
    top, found = root / "sys/fs/cgroup", [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]
    for line in text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number != "0" and controller not in names.split(","):
            continue
        base = top if number == "0" else top / controller
        own = base / path.lstrip("/")
        found += [own, *(p for p in own.parents if p.is_relative_to(base))]
    return list(dict.fromkeys(found))


def text(path: Path) -> str:
    """What a file of the system says; "" where it is not there or not for this user."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
