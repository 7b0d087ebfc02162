"""Where a server keeps what outlives it: keys, usage and saved sessions."""

from __future__ import annotations

import os
from pathlib import Path

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions


def state_folder(options: ServerOptions) -> Path:
    """The folder, made where it is not there, for its owner alone.

    `ServerOptions.state_path`, else `$XDG_STATE_HOME/pyrosome`, else `~/.local/state/pyrosome`.

    Raises:
        RequestError: it cannot be made, or is another user's.
    """
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    folder = Path(options.state_path).expanduser() if options.state_path else base / "pyrosome"
    return private_folder(folder.absolute())


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
