"""Where a command writes: answers to standard output, everything said about them to standard error.

So `pyrosome run ... > answer.txt` holds the answer and nothing else.  On a terminal, what a model wrote cannot move the
cursor or change colours: control characters are shown as a dot.  Into a file or a pipe the text goes unchanged.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pyrosome.errors import RequestError

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141
EXIT_CODES = {
    DONE: "done",
    CHECK_FAILED: "a check failed: tensors or machines that do not fit (`inspect`, `plan`), a wrong answer (`doctor`), "
    "what `verify` found",
    BAD_INPUT: "bad input or usage: one line on standard error says what was asked, what was found, what to do",
    INTERRUPTED: "interrupted with Ctrl-C; what was generated until then was written",
    READER_GONE: "whoever read standard output closed it, as `head` does",
}

_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_HARMLESS = frozenset("\n\t\u200c\u200d\u00a0\u3000")  # joiners are part of words and emoji


class Screen:
    """Standard output and standard error of one command, looked up when made.

    `styled` says whether escape sequences may be written: not with NO_COLOR, not where TERM is dumb, not to a file.
    """

    def __init__(self) -> None:
        self.out, self.err = sys.stdout, sys.stderr
        self.out_is_terminal, self.err_is_terminal = self.out.isatty(), self.err.isatty()
        self.styled = self.out_is_terminal and can_style()
        self._at_line_start = True

    def text(self, text: str, *, dim: bool = False) -> None:
        """Write a part of an answer as it comes."""
        if not text:
            return
        if self.out_is_terminal:
            text = printable(text)
        if text:
            self._at_line_start = text.endswith("\n")
        self.out.write(f"{_DIM}{text}{_PLAIN}" if dim and self.styled else text)
        self.out.flush()

    def status(self, text: str) -> None:
        """Say how far something is, in place of what was said before: short, and only on a terminal."""
        if self.styled:
            self.out.write(f"\r\x1b[K{_DIM}{text}{_PLAIN}")
            self.out.flush()
        elif self.out_is_terminal and self._at_line_start:
            self.out.write(text.partition(":")[0])  # a line cannot be rewritten: one word says that it goes on
            self.out.flush()
        self._at_line_start = not self.out_is_terminal

    def end_line(self) -> None:
        """Begin a new line of output, unless one has just begun."""
        if not self._at_line_start:
            self.out.write("\n")
        self.out.flush()
        self._at_line_start = True

    def notice(self, text: str, *, dim: bool = True) -> None:
        """Say something about the work, wrapped to the terminal; lines that begin with a blank are left alone."""
        self.out.flush()
        if self.err_is_terminal:
            if self.out_is_terminal:
                self.end_line()
            text = "\n".join(line if line.startswith(" ") else wrapped(line) for line in text.split("\n"))
            if dim and can_style():
                text = f"{_DIM}{text}{_PLAIN}"
        self.err.write(text + "\n")
        self.err.flush()


def can_style() -> bool:
    """Whether this environment wants escape sequences at all: https://no-color.org, and TERM."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") not in ("", "dumb")


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() or c in _HARMLESS else "" if c == "\r" else "\u00b7" for c in text)


def wrapped(line: str) -> str:
    """One line, broken at blanks to the terminal's width."""
    width = max(shutil.get_terminal_size().columns, 12)
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) if len(line) > width else line


def size(num_bytes: float) -> str:
    """Bytes for people: the largest unit that leaves at least one."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def decoded(raw: bytes, what: str) -> str:
    """Bytes of a user's as text.

    Raises:
        RequestError: they are not UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start}); convert it first"
        ) from None
    return text.replace("\r\n", "\n")


class Stop:
    """Ctrl-C as a request: `asked` turns true, and whoever loops looks at it between tokens.

    So no step is torn apart.  A second Ctrl-C raises KeyboardInterrupt, for one who does not want to wait for the step.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def loading(screen: Screen) -> Iterator[Callable[[int, int, str], None] | None]:
    """A callback for a load's progress that draws a bar on standard error, where that is a terminal."""
    if not screen.err_is_terminal:
        yield None
        return
    bar = _Bar(screen.err)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    """Drawn from the second shard on: a model of one shard is there before a bar would be."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.progress: Any = None
        self.task: Any = None

    def advance(self, done: int, total: int, shard: str) -> None:
        if self.progress is None:
            if done >= total:
                return
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("loading"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TimeRemainingColumn(),
                console=Console(file=self.stream, no_color=not can_style()),
                transient=True,
            )
            self.progress.start()
            self.task = self.progress.add_task(shard, total=total)
        self.progress.update(self.task, completed=done)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
