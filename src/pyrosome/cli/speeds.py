"""How fast memory and drives are read and written here, in about a second each.  Bytes per second; 0: not measured."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from pyrosome.cgroups import ROOT, text
from pyrosome.cli.machine import nearest

SECONDS = 1.0  # of reading or writing a drive
PART = 4 << 20
READ_BYTES, WRITTEN_BYTES = 1 << 30, 128 << 20  # at most
LEAST_BYTES = 32 << 20  # less is over before a drive is at its speed
NEEDED_BYTES = 2 << 30  # of memory that is available, to measure it
IN_MEMORY = ("tmpfs", "ramfs")
SAMPLES = 16  # places at which a file is looked at, whether memory holds it


def memory_speed(cores: int, available_bytes: int) -> dict[str, Any]:
    """What summing a buffer that no cache holds reads: with one core, and with all that may be used.

    Args:
        available_bytes: of memory; 0: not known.
    """
    found: dict[str, Any] = {"cores": cores, "one_core": 0.0, "all_cores": 0.0, "why_not": ""}
    if 0 < available_bytes < NEEDED_BYTES:
        found["why_not"] = f"{available_bytes / 2**30:.2f} GiB are available, and measuring takes 0.5 GiB of 2 GiB"
        return found
    from pyrosome.measure.ceilings import read_rate

    one = read_rate(1)
    return found | {"one_core": one, "all_cores": read_rate(cores) if cores > 1 else one}


def drive_read(path: Path, seconds: float = SECONDS, most: int = READ_BYTES) -> dict[str, Any]:
    """How fast a file's beginning is read from its drive, one part after the other, for so many seconds at most."""
    found: dict[str, Any] = {"path": str(path), "num_bytes": 0, "read": 0.0, "why_not": ""}
    if not hasattr(os, "posix_fadvise"):
        return found | {"why_not": "this system cannot be told to forget what it has read, so memory would be measured"}
    if file_system(path) in IN_MEMORY:
        return found | {"why_not": "it lies in memory, not on a drive"}
    try:
        with open(path, "rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, most)
            if size < LEAST_BYTES:
                return found | {"why_not": f"{size:,} bytes are too few to tell; {LEAST_BYTES:,} are needed"}
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
            if _held(file.fileno(), size):
                return found | {"why_not": "memory holds the file, and does not give it up"}
            done, spent = _timed_reads(file.fileno(), size, seconds)
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)  # nobody has asked for it
    except OSError as error:
        return found | {"why_not": f"it cannot be read: {error.strerror or error}"}
    return found | {"num_bytes": done, "read": done / spent}


def file_system(path: Path, root: Path = ROOT) -> str:
    """The sort of file system that a path is on, as "ext4"; "" where the system does not say."""
    best, found = -1, ""
    for line in text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        point = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), part) for part in before.split()[4:5]]
        if point and after and len(point[0]) >= best and path.absolute().is_relative_to(point[0]):
            best, found = len(point[0]), after.split()[0]
    return found


def _timed_reads(file: int, size: int, seconds: float) -> tuple[int, float]:
    buffer, done, began = memoryview(bytearray(PART)), 0, time.perf_counter()
    while done < size and time.perf_counter() - began < seconds:
        count = os.preadv(file, [buffer], done)
        if not count:
            break
        done += count
    return done, max(time.perf_counter() - began, 1e-9)


def _held(file: int, size: int) -> bool:
    """Whether memory still has most of a file's beginning: then its drive would not be asked."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return False
    one, there = memoryview(bytearray(1)), 0
    for i in range(SAMPLES):
        with contextlib.suppress(OSError):  # EAGAIN: it would have to be fetched
            there += os.preadv(file, [one], size * i // SAMPLES, nowait)
    os.posix_fadvise(file, 0, size, os.POSIX_FADV_DONTNEED)
    return 2 * there > SAMPLES


def folder_speed(folder: Path, seconds: float = SECONDS, most: int = WRITTEN_BYTES) -> dict[str, Any]:
    """How fast a folder's drive is written, to the drive itself, and what was written is read again.

    The folder, or the first one above it that is there; nothing stays in it.
    """
    place = nearest(folder)
    found: dict[str, Any] = {"path": str(place), "num_bytes": 0, "write": 0.0, "read": 0.0, "why_not": ""}
    try:
        free = free_bytes(place)
        if free < 8 * most:
            return found | {"why_not": f"{free / 2**30:.2f} GiB are free there, too few to try"}
        with tempfile.NamedTemporaryFile(dir=place, prefix=".pyrosome-speed-") as file:
            done, spent = _timed_writes(file.fileno(), most, seconds)
            again = drive_read(Path(file.name), seconds, most)
    except OSError as error:
        return found | {"why_not": f"it cannot be written: {error.strerror or error}"}
    return found | {"num_bytes": done, "write": done / spent, "read": again["read"], "why_not": again["why_not"]}


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(folder).free


def _timed_writes(file: int, most: int, seconds: float) -> tuple[int, float]:
    part, done, began = os.urandom(PART), 0, time.perf_counter()  # nothing that could be compressed
    while done < most and time.perf_counter() - began < seconds:
        done += os.write(file, part)
        os.fsync(file)  # a slow drive is stopped in time, and not after all is buffered
    return done, max(time.perf_counter() - began, 1e-9)
