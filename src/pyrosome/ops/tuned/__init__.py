"""Which variant of a kernel is fastest on a device, as it was measured there: one JSON file for each device.

    {"device": "NVIDIA H200", "capability": 90, "versions": {...}, "command": "...", "date": "...",
     "choices": {"linear_fp8": {"N=4096,K=1024,M<=16": "narrow"}}}

`python -m bench.tune` writes such a file.  Nothing is tuned while requests are served: a device without one takes each
kernel's default.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from pyrosome.errors import KernelUnavailable

FOLDER = Path(__file__).parent
AGAIN = "measure it again with `python -m bench.tune --device cuda`, or delete the file"


def slug(device: str) -> str:
    """The name of a device as a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def path_of(device: str) -> Path:
    """The file of a device's choices, whether it is there or not."""
    return FOLDER / f"{slug(device)}.json"


def devices(capability: int) -> list[str]:
    """The devices of this capability that there are choices for."""
    found = [_record(path) for path in sorted(FOLDER.glob("*.json"))]
    return [record["device"] for record in found if record["capability"] == capability]


@functools.cache
def choices(device: str) -> dict[str, dict[str, str]]:
    """Variants by kernel and class of shapes; none where the device was not measured, or has no name.

    Raises:
        KernelUnavailable: the file is there and is not what `bench.tune` writes.
    """
    path = path_of(device)
    found: dict[str, dict[str, str]] = _record(path)["choices"] if device and path.exists() else {}
    return found


def _record(path: Path) -> dict[str, Any]:
    """What a file holds.  Its device and capability are looked at too: another's file would do harm unseen."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KernelUnavailable(f"{path} is no JSON ({error}); {AGAIN}") from None
    record = found if isinstance(found, dict) else {}
    wrong = [
        name for name, kind in {"device": str, "capability": int}.items() if not isinstance(record.get(name), kind)
    ]
    held = record.get("choices")
    if not (isinstance(held, dict) and all(_is_table(table) for table in held.values())):
        wrong.append("choices")
    if wrong:
        raise KernelUnavailable(f"{path} has no proper {', '.join(wrong)}; {AGAIN}")
    if slug(record["device"]) != path.stem:
        raise KernelUnavailable(f"{path} has the choices of {record['device']!r}; {AGAIN}")
    return record


def _is_table(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(variant, str) for variant in table.values())
