"""One log format for the package; libraries that use it configure logging themselves."""

from __future__ import annotations

import logging

from pyrosome import env
from pyrosome.errors import RequestError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMAT = "%(asctime)s %(levelname).1s %(rank)s%(name)s: %(message)s"


class _Rank(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        rank = env.RANK.get()
        record.rank = f"[{rank}] " if rank else ""
        return True


def configure() -> None:
    """Send this package's log lines to standard error; called by commands, never on import.

    Raises:
        RequestError: the environment asks for a level there is not.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    handler.addFilter(_Rank())
    root = logging.getLogger("pyrosome")
    root.handlers[:] = [handler]
    level = env.LOG.get().upper()
    if level not in LEVELS:
        raise RequestError(f"{env.LOG.name} is {env.LOG.get()!r}; it is one of {', '.join(LEVELS)}")
    root.setLevel(level)
