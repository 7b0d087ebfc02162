"""Lines typed at a prompt: read with editing, remembered from one session to the next.

The file is `pyrosome/history` under XDG_STATE_HOME, or under ~/.local/state.  A place that cannot be read or written
costs the memory and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pyrosome.cli.terminal import Screen

MAX_LINES = 1000
PROMPT, MORE = "> ", ". "


def history_file() -> Path:
    """Where typed lines are kept."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~")) / ".local" / "state"
    return root / "pyrosome" / "history"


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Editing with the lines of earlier sessions; those of this one are added at the end."""
    try:
        import readline
    except ImportError:  # a Python without it: lines can be typed, not edited
        yield
        return
    readline.set_history_length(MAX_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history_file())
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _append(readline, readline.get_current_history_length() - before)


def _append(readline: ModuleType, num_lines: int) -> None:
    path = history_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    if num_lines > 0:
        readline.append_history_file(num_lines, path)


def typed(screen: Screen) -> Iterator[str]:
    """What is typed, a message at a time; a line that ends in a backslash goes on in the next.

    Ctrl-D ends it.  Ctrl-C clears the line, and pressed twice in a row raises KeyboardInterrupt.
    """
    lines: list[str] = []
    pressed = False
    while True:
        try:
            line = _line(screen, MORE if lines else PROMPT)
        except EOFError:
            screen.notice("")
            return
        except KeyboardInterrupt:
            screen.notice("")
            if pressed:
                raise
            screen.notice("Ctrl-C again leaves, and so does Ctrl-D")
            pressed, lines = True, []
            continue
        pressed = False
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        message = "\n".join([*lines, line])
        lines = []
        if message.strip():
            yield message


def _line(screen: Screen, prompt: str) -> str:
    if screen.out_is_terminal:
        return input(prompt)
    screen.err.write(prompt)  # input() would put it among the answers
    screen.err.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
