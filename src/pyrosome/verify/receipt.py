"""The receipt of a `verify`: every finding with its figures, as JSON for programs and as one HTML page for people.

The page needs nothing from elsewhere and runs nothing.  Names in it come from files of strangers: all text is escaped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.folders import write_whole
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.page import page

JSON_NAME, HTML_NAME = "receipt.json", "receipt.html"
SCHEMA = "pyrosome.verify/1"


class Record:
    """Findings as they come, with how long each check took."""

    def __init__(self, wanted: Wanted, checks: Iterable[str]) -> None:
        self.wanted, self.checks = wanted, list(checks)
        self.findings: list[Finding] = []
        self.interrupted = False
        self.seconds: dict[str, float] = {}
        self.began = datetime.datetime.now(datetime.UTC)
        self._start = time.perf_counter()

    def watched(self, findings: Iterable[Finding]) -> Iterator[Finding]:
        """The same findings, kept."""
        last = self._start
        for finding in findings:
            now = time.perf_counter()
            self.seconds[finding.check] = self.seconds.get(finding.check, 0.0) + now - last
            self.findings.append(finding)
            yield finding
            last = time.perf_counter()

    @property
    def counts(self) -> dict[str, int]:
        """Findings by how they ended."""
        return counts(self.findings)

    @property
    def ok(self) -> bool:
        """Everything was looked at, nothing failed, and something held."""
        return not self.interrupted and not self.counts["failed"] and self.counts["well"] > 0

    def as_dict(self, about: dict[str, Any]) -> dict[str, Any]:
        """Everything, as plain data that JSON can hold.

        Args:
            about: what is known of model, machine and versions, in parts with names.
        """
        asked = {f.name: getattr(self.wanted, f.name) for f in dataclasses.fields(Wanted) if f.name != "progress"}
        return plain(
            {
                "schema": SCHEMA,
                "ok": self.ok,
                "interrupted": self.interrupted,
                "counts": self.counts,
                "began": self.began.isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - self._start, 3),
                "asked": asked | {"checks": self.checks},
                **about,
                "checks": [
                    {
                        "check": name,
                        "seconds": round(self.seconds.get(name, 0.0), 3),
                        "counts": counts(f for f in self.findings if f.check == name),
                        "findings": [_finding(f) for f in self.findings if f.check == name],
                    }
                    for name in dict.fromkeys([*self.checks, *(f.check for f in self.findings)])
                ],
            }
        )


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many held, held but deserve a look, failed, and were left out; the second are among the first."""
    found = list(findings)
    return {
        "well": sum(f.ok is True for f in found),
        "warned": sum(f.ok is True and f.warns for f in found),
        "failed": sum(f.ok is False for f in found),
        "left_out": sum(f.ok is None for f in found),
    }


def prepare(directory: Path) -> None:
    """Make the directory of a receipt, before hours are spent on what it will hold.

    Raises:
        RequestError: it cannot be made or written to.
    """
    probe = directory / f".{JSON_NAME}.{os.getpid()}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(
            f"the receipt was to be written to {directory}: {error.strerror or error}; name another directory"
        ) from None


def write(directory: Path, receipt: dict[str, Any]) -> tuple[Path, Path]:
    """Write both files, each whole or not at all; returns where they are.

    Raises:
        RequestError: they cannot be written.
    """
    prepare(directory)
    text = json.dumps(receipt, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    paths = directory / JSON_NAME, directory / HTML_NAME
    for path, content in zip(paths, (text, page(receipt)), strict=True):
        try:
            write_whole(path, content.encode(errors="backslashreplace"))  # names may hold lone surrogates
        except OSError as error:
            raise RequestError(f"the receipt was to be written to {path}: {error.strerror or error}") from None
    return paths


def plain(value: Any) -> Any:
    """The same data for JSON: numbers that are none as text, everything unknown by its name."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _finding(finding: Finding) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(finding).items() if k != "check"}
