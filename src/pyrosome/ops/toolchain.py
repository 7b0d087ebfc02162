"""How the C++ beside the ops becomes a library: sources, flags for each level, compiler, files.

Nothing but the standard library is needed here, so that a wheel can be built by it without the package's dependencies.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).parent
SHIPPED = HOME / "built"  # libraries that came with a wheel
LEVELS = ("portable", "avx2", "avx512")
# A product and a sum are fused where the source says so and nowhere else, or levels would differ: no contraction, and
# no vectors made of neighbouring statements either, as GCC 12 fuses complex products there without being allowed to.
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-tree-slp-vectorize", "-fPIC", "-pthread", "-fvisibility=hidden", "-w")
LEVEL_FLAGS = {
    "portable": ("-O2", "-DPYROSOME_LEVEL=0"),
    "avx2": ("-O2", "-mavx2", "-mfma", "-mf16c", "-DPYROSOME_LEVEL=1"),
    "avx512": (
        "-O3", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vbmi", "vnni", "bf16")), "-mavx2", "-mfma", "-mf16c",
        "-DPYROSOME_LEVEL=2",
    ),
}  # fmt: skip
# What a processor must have for each level, as Linux spells it.
NEEDS = {
    "portable": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset(
        {
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512dq",
            "avx512vbmi",
            "avx512_vnni",
            "avx512_bf16",
            "avx2",
            "fma",
            "f16c",
        }
    ),
}


def sources() -> list[Path]:
    """Every C++ file of the ops, headers included."""
    return sorted([*HOME.glob("*.h"), *HOME.glob("*.cpp"), *HOME.glob("*/*.cpp"), *HOME.glob("*/*.h")])


def supported() -> tuple[str, ...]:
    """Levels that this processor has, the least first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return LEVELS[:1]
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return LEVELS[:1]
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return tuple(level for level in LEVELS if NEEDS[level] <= flags)


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of g++, clang++ and c++ there is.

    Raises:
        OSError: there is none, or this system is not built for.
    """
    if sys.platform == "win32":
        raise OSError("native kernels are not built on Windows; the torch definitions run instead")
    asked = os.environ.get("CXX")
    if asked and shutil.which(asked) is None:
        raise OSError(f"$CXX names the C++ compiler {asked!r}, and there is none: name another, or unset it")
    found = asked or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if found is None:
        raise OSError("no C++ compiler was found (g++, clang++ or $CXX): install one for native kernels")
    return found


def key(level: str, compiler: str = "") -> str:
    """Names one build: its sources and flags, and the compiler where that may differ."""
    digest = hashlib.sha256()
    for part in (*(p.read_bytes() for p in sources()), *map(str.encode, (*FLAGS, *LEVEL_FLAGS[level]))):
        digest.update(len(part).to_bytes(8, "little") + part)
    if compiler:
        digest.update(compiler.encode())
        digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout)
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pyrosome" / "native"


def library(level: str) -> Path:
    """The library of a level: the one that was shipped if it is of these sources, else built once and kept.

    Raises:
        OSError: there is no compiler, or it failed; the message says what to do.
    """
    shipped = SHIPPED / f"libpyrosome-{level}-{key(level)}.so"
    if shipped.exists():
        return shipped
    by = compiler()
    target = cache_folder() / key(level, by) / f"libpyrosome-{level}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        build(level, by, target)
    return target


def build(level: str, compiler: str, target: Path) -> None:
    """Compile the sources, several at once, and link them to `target`, which appears whole or not at all.

    Raises:
        OSError: the compiler failed.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        files = [p for p in sources() if p.suffix == ".cpp"]
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(files))]
        flags = [*FLAGS, *LEVEL_FLAGS[level], f"-I{HOME}"]
        jobs = [[compiler, *flags, "-c", str(f), "-o", o] for f, o in zip(files, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, sorted(jobs, key=lambda job: -os.path.getsize(job[-3]))))  # the longest first
        part = str(Path(folder) / "library.so")
        _run([compiler, "-shared", "-pthread", "-o", part, *objects])
        os.replace(part, target)  # whoever built at the same time made the same


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(
            f"{command[0]} could not build the native kernels; name another C++ compiler in $CXX, or do without them: "
            f"{done.stderr.strip()[-500:]}"
        )


def ship(folder: Path) -> list[Path]:
    """Build every level of this kind of processor into `folder`, under the names `library` looks for.

    Raises:
        OSError: there is no compiler, or it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    made = [folder / f"libpyrosome-{level}-{key(level)}.so" for level in (LEVELS if x86 else LEVELS[:1])]
    for path in made:
        build(path.name.split("-")[1], compiler(), path)
    return made
