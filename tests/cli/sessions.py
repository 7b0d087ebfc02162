"""Commands run as a user runs them: in a process of their own, at a terminal or in a pipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect

ROOT = Path(__file__).parent.parent.parent
FAKE = ("-m", "tests.cli.fake_llm")
REAL = ("-m", "pyrosome")
TIMEOUT = 60  # seconds: for machines that do five things at once

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


def environment(home: Path, **changes: str | None) -> dict[str, str]:
    """This process's environment without what would colour a result, and with a home of its own."""
    values = {k: v for k, v in os.environ.items() if not k.startswith(("PYROSOME_", "XDG_"))}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):  # the last two where tests run in workers
        values.pop(name, None)
    values |= {"TERM": "xterm", "LC_ALL": "C.UTF-8", "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    values |= {"PYTHONPATH": os.pathsep.join([p for p in (os.environ.get("PYTHONPATH"), str(ROOT)) if p])}
    # What was built for this machine is not built again in every home.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    values |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}
    for name, value in changes.items():
        values.pop(name, None)
        if value is not None:
            values[name] = value
    return values


def piped(home: Path, *args: str, stdin: bytes = b"", program=FAKE, **changes) -> subprocess.CompletedProcess:
    """Run with all three streams piped."""
    command = [sys.executable, *program, *args]
    return subprocess.run(
        command, input=stdin, capture_output=True, cwd=ROOT, env=environment(home, **changes), timeout=TIMEOUT
    )


def at_terminal(
    home: Path, *args: str, columns: int = 80, program=FAKE, shell: bool = False, **changes
) -> pexpect.spawn:
    """Run the command at a terminal, or (shell) a line of its shell; what it writes is found by `seen`."""
    command, arguments = ("bash", list(args)) if shell else (sys.executable, [*program, *args])
    child = pexpect.spawn(
        command, arguments, cwd=str(ROOT), env=environment(home, **changes), timeout=TIMEOUT, encoding="utf-8",
        dimensions=(40, columns),
    )  # fmt: skip
    child.delaybeforesend = 0
    child.ptyproc.delayafterclose = child.ptyproc.delayafterterminate = 0.01
    child.logfile_read = Seen()
    return child


class Seen:
    """Everything a terminal was sent."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    @property
    def styled(self) -> bool:
        return bool(_STYLE.search(self.text))

    @property
    def plain(self) -> str:
        return _ESCAPE.sub("", self.text).replace("\r\n", "\n")


def seen(child: pexpect.spawn) -> Seen:
    return child.logfile_read


def ended(child: pexpect.spawn) -> int:
    """Wait for the end; returns the exit status."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus is None, f"ended by signal {child.signalstatus}"
    return child.exitstatus
