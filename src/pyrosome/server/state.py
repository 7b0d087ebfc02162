"""Where a server keeps what outlives it: keys, usage and saved sessions."""

from __future__ import annotations

from pathlib import Path

from pyrosome.folders import private_folder as private_folder
from pyrosome.folders import state_home
from pyrosome.options import ServerOptions


def state_folder(options: ServerOptions) -> Path:
    """The folder, made where it is not there, for its owner alone.

    `ServerOptions.state_path`, else `$XDG_STATE_HOME/pyrosome`, else `~/.local/state/pyrosome`.

    Raises:
        RequestError: it cannot be made, or is another user's.
    """
    folder = Path(options.state_path).expanduser() if options.state_path else state_home()
    return private_folder(folder.absolute())
