"""What the engine did when, in Chrome's trace format: for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyrosome.errors import RequestError

MAX_EVENTS = 400_000  # about 200 bytes each
_STEPS, _FIRST_REQUEST = 0, 1  # tracks: one of steps, one for each completion


class Trace:
    """Collects events, and writes them when it is closed.

    Steps are on one track, with their phases inside; each completion has a track of its own.  Events beyond
    `max_events` are counted and not kept.

    Raises:
        RequestError: there can be no such file.
    """

    def __init__(
        self, path: str | Path, max_events: int = MAX_EVENTS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.num_dropped = checked_path(path), 0
        self._max, self._clock, self._began = max_events, clock, clock()
        self._events: list[str] = []  # as text, which takes a fraction of the memory
        self._tracks: dict[str, int] = {}
        self._is_closed = False
        self._meta = [_name("process_name", _STEPS, "pyrosome engine"), _name("thread_name", _STEPS, "steps")]

    @contextmanager
    def phase(self, name: str, **about: Any) -> Iterator[None]:
        """A part of a step, with numbers to show."""
        began = self._clock()
        try:
            yield
        finally:
            self.span(name, began, self._clock(), **about)

    def span(self, name: str, began: float, ended: float, track: str = "", **about: Any) -> None:
        """Something that took from `began` to `ended` (of `time.monotonic`); on a completion's track, or the steps'."""
        at, end = self._us(began), self._us(ended)
        # Between two rounded times: what follows at once must not begin before this ends, or it is drawn inside.
        self._add(track, {"ph": "X", "name": name, "ts": at, "dur": round(max(0.0, end - at), 3), "args": about})

    def instant(self, name: str, track: str = "", **about: Any) -> None:
        """Something that happened now."""
        self._add(track, {"ph": "i", "s": "t", "name": name, "ts": self._us(self._clock()), "args": about})

    def close(self) -> None:
        """Write the file, complete or not at all; once."""
        if self._is_closed:
            return
        self._is_closed = True
        lines = [*self._meta, *self._events]
        if self.num_dropped:
            name = f"{self.num_dropped} further events were not kept"
            event = {"ph": "i", "s": "g", "name": name, "ts": self._us(self._clock())}
            lines.append(_text(event, _STEPS))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                for number, line in enumerate(lines):
                    f.write((",\n" if number else "[\n") + line)
                f.write("\n]\n")
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            self._events, self._meta, self._tracks = [], [], {}

    def _us(self, at: float) -> float:
        return _rounded(at - self._began)

    def _add(self, track: str, event: dict[str, Any]) -> None:
        if self._is_closed or len(self._events) >= self._max:
            self.num_dropped += 1
            return
        number = _STEPS
        if track:
            if track not in self._tracks:
                self._tracks[track] = _FIRST_REQUEST + len(self._tracks)
                self._meta.append(_name("thread_name", self._tracks[track], f"request {track}"))
            number = self._tracks[track]
        self._events.append(_text(event, number))


def checked_path(path: str | Path) -> Path:
    """Where a trace is to be written, its folder made: so that a run does not find out at its end.

    Raises:
        RequestError: there can be no such file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"it is a folder; name a file in it, {path / 'trace.json'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{path.parent} may not be written to")
    except (OSError, ValueError) as error:
        raise RequestError(f"a trace was to be written to {path} and cannot be: {error}") from None
    return path


def _name(kind: str, track: int, name: str) -> str:
    return _text({"ph": "M", "name": kind, "ts": 0, "args": {"name": name}}, track)


def _text(event: dict[str, Any], track: int) -> str:
    args = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in event.get("args", {}).items()}
    whole = {**event, "args": args, "pid": os.getpid(), "tid": track}
    return json.dumps(whole, default=str, separators=(",", ":"))


def _rounded(seconds: float) -> float:
    """Microseconds, to a nanosecond, never below nothing."""
    return round(max(0.0, seconds) * 1e6, 3)
