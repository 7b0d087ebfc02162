"""Where this package keeps what outlives a process: keys and sessions, calibrations, how good plans were, models."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pyrosome.errors import RequestError


def state_home() -> Path:
    """`$XDG_STATE_HOME/pyrosome`, else `~/.local/state/pyrosome`; it need not be there."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "pyrosome"


def models_home() -> Path:
    """`$XDG_DATA_HOME/pyrosome/models`, else `~/.local/share/pyrosome/models`; it need not be there."""
    home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "share"
    return base / "pyrosome" / "models"


def private_folder(folder: Path) -> Path:
    """The folder, made where it is not there; nobody but its owner may look into it.

    Raises:
        RequestError: it cannot be made, or is another user's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise RequestError(
            f"the state folder {folder} cannot be used: {error.strerror or error}; name another with state_path"
        ) from None
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """A small file that is there whole or not at all; what others have open of it stays as it was.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
