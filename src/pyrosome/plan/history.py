"""How good plans have been: what was predicted beside what was measured, kept as lines of JSON.

The file is bounded: once it is longer than MOST_BYTES, its older half is dropped.  Several processes may write at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypedDict

from pyrosome.errors import RequestError
from pyrosome.folders import private_folder, state_home, write_whole

log = logging.getLogger(__name__)

MOST_BYTES = 4 << 20
_FIELDS = ("what", "predicted", "measured", "machine", "versions", "when")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One figure: what it is of, in words that group alike ones ("decode tok/s"), predicted and measured."""

    what: str
    predicted: float
    measured: float
    machine: str
    versions: Mapping[str, str]
    when: str  # ISO 8601, UTC

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1


class Errors(TypedDict):
    """How far predictions of one kind were off, without sign."""

    what: str
    count: int
    median: float
    p90: float
    bias: float  # median of predicted / measured - 1, with its sign
    last: str  # when the last of them was measured


def path() -> Path:
    """The file; it need not be there."""
    return state_home() / "plans.jsonl"


def installed(package: str) -> str:
    """The version of a package; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def keep(what: str, predicted: float, measured: float, machine: str, versions: Mapping[str, str] | None = None) -> None:
    """Add one figure to the file.

    Raises:
        RequestError: a figure that is not a number above 0, or a file that cannot be written.
    """
    for name, value in (("predicted", predicted), ("measured", measured)):
        if not (math.isfinite(value) and value > 0):
            raise RequestError(f"{what}: {name} is {value}; the history keeps numbers above 0")
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = Entry(
        what, float(predicted), float(measured), machine, dict(versions or {"pyrosome": installed("pyrosome")}), when
    )
    line = json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n"
    place = private_folder(path().parent)
    try:
        with _alone(place):
            with open(path(), "a+b") as file:
                _end_line(file)
                file.write(line.encode())
            if path().stat().st_size > MOST_BYTES:
                _halve()
    except OSError as error:
        raise RequestError(f"{path()}: predictions cannot be kept there: {error.strerror or error}") from None


def entries() -> tuple[list[Entry], int]:
    """All that was kept, the oldest first, and how many lines could not be read."""
    found, broken = [], 0
    try:
        lines = path().read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise RequestError(f"{path()}: cannot be read: {error.strerror or error}") from None
    for line in lines:
        entry = _read(line)
        if entry:
            found.append(entry)
        elif line.strip():
            broken += 1
    if broken:
        log.warning("%s: lines skipped, since they are not of a prediction: %d", path(), broken)
    return found, broken


def summary() -> list[Errors]:
    """How far predictions of each kind were off."""
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries()[0]:
        by_kind.setdefault(entry.what, []).append(entry)
    return [_summed(what, found) for what, found in sorted(by_kind.items())]


def _summed(what: str, found: list[Entry]) -> Errors:
    sizes = sorted(abs(e.error) for e in found)
    return Errors(
        what=what, count=len(found), median=statistics.median(sizes), p90=sizes[math.ceil(0.9 * len(sizes)) - 1],
        bias=statistics.median(e.error for e in found), last=max(e.when for e in found),
    )  # fmt: skip


def _read(line: bytes) -> Entry | None:
    try:
        found: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or set(found) != set(_FIELDS) or not isinstance(found["versions"], dict):
        return None
    if not all(isinstance(found[name], str) for name in ("what", "machine", "when")):
        return None
    for name in ("predicted", "measured"):
        value = found[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            return None
    return Entry(**found)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other process writes meanwhile, where the system has locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(place / "plans.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_line(file: IO[bytes]) -> None:
    """A line that a writer could not finish does not spoil the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _halve() -> None:
    lines = path().read_bytes().splitlines(keepends=True)
    write_whole(path(), b"".join(lines[len(lines) // 2 :]))
