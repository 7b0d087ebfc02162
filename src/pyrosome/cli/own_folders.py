"""The folders this package keeps things in: whether they can be used, and who else can look into them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrosome.cli.machine import nearest


def own_folders() -> dict[str, dict[str, Any]]:
    """State, fetched models and built kernels, each as `state_of` tells it.  Nothing is made."""
    from pyrosome.folders import models_home, state_home
    from pyrosome.ops.toolchain import cache_folder

    named = {"state": state_home, "models": models_home, "kernels": cache_folder}
    return {name: _found(where, is_private=name == "state") for name, where in named.items()}


def _found(where: Callable[[], Path], *, is_private: bool) -> dict[str, Any]:
    try:
        return state_of(where(), is_private=is_private)
    except (RuntimeError, KeyError):  # a user without a name or home, as some containers have
        why = "this user has no home folder; set HOME"
        return {"path": "", "is_there": False, "free": 0, "why_not": why, "open_to": ""}


def state_of(folder: Path, *, is_private: bool) -> dict[str, Any]:
    """Path, whether it is there, free bytes, why it cannot be used, and to whom else it is open; "" for nobody.

    Args:
        is_private: keys are kept there, so that others should not look into it.
    """
    place = nearest(folder)
    found: dict[str, Any] = {"path": str(folder), "is_there": place == folder, "free": 0, "why_not": "", "open_to": ""}
    try:
        found["free"] = shutil.disk_usage(place).free
        mode = place.stat().st_mode
    except OSError as error:
        return found | {"why_not": f"it cannot be looked at: {error.strerror or error}"}
    if not stat.S_ISDIR(mode):
        found["why_not"] = f"{place} is a file, where a folder is needed; move it away"
    elif not os.access(place, os.W_OK | os.X_OK):
        found["why_not"] = f"{place} cannot be written by this user; change its owner, or name another by XDG_*_HOME"
    elif is_private and found["is_there"] and mode & 0o077:
        found["open_to"] = "everybody" if mode & 0o007 else "its group"
    return found
