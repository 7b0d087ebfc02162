"""One log format for the package; libraries that use it configure logging themselves."""

from __future__ import annotations

import logging
import os

from pyrosome import env

FORMAT = "%(asctime)s %(levelname).1s %(rank)s%(name)s: %(message)s"


class _Rank(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        rank = os.environ.get("RANK")
        record.rank = f"[{rank}] " if rank is not None else ""
        return True


def configure() -> None:
    """Send this package's log lines to standard error; called by commands, never on import."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    handler.addFilter(_Rank())
    root = logging.getLogger("pyrosome")
    root.handlers[:] = [handler]
    root.setLevel(env.LOG.get().upper())
