"""Where keys, accounts and usage are kept: SQLite in the state folder, or PostgreSQL by URL.

Reads run in a few threads.  Writes run in one thread, one transaction after another, so nobody but the next writer
waits for the disk.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError, SQLAlchemyError

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.keys.schema import migrate
from pyrosome.server.problems import Refused
from pyrosome.server.state import private_folder, state_folder

T = TypeVar("T")

FILE_NAME = "server.db"
NUM_READERS = 4
BUSY_S = 10  # another process may hold a SQLite file so long
OPENING_S = 10
_LOG_NAME = "pyrosome.keys"


class Store:
    """An open store.

    Args:
        url: of SQLAlchemy's form; `sqlite:///FILE` or `postgresql://...`.

    Raises:
        RequestError: it cannot be opened; the message has no password.
    """

    def __init__(self, url: str | URL) -> None:
        self.url = _url(url)
        self.shown = self.url.render_as_string(hide_password=True)
        # What it is asked and answers is never in its log, whoever turns that up.
        logging.getLogger(f"sqlalchemy.engine.Engine.{_LOG_NAME}").setLevel(logging.WARNING)
        options = _engine_options(self.url)
        self._engine = create_engine(self.url, hide_parameters=True, logging_name=_LOG_NAME, **options)
        if self.url.get_backend_name() == "sqlite":
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(writes=True)
        self._open()
        self._readers = concurrent.futures.ThreadPoolExecutor(NUM_READERS, "store-read")
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "store-write")

    def read(self, ask: Callable[[Connection], T]) -> T:
        """Ask, and wait for it.

        Raises:
            Refused: 503, the store does not answer; 400, a text it was asked for is none.
        """
        try:
            with self._engine.connect() as connection:
                return ask(connection)
        except (DBAPIError, UnicodeEncodeError) as error:
            raise _refusal(error) from None

    def write(self, change: Callable[[Connection], T]) -> T:
        """Change something in a transaction of its own; once this returns, it survives a crash.

        Raises:
            Refused: 503, the store does not answer.
        """
        try:
            with self._writing.begin() as connection:
                return change(connection)
        except (DBAPIError, UnicodeEncodeError) as error:
            raise _refusal(error) from None

    async def reading(self, ask: Callable[[Connection], T]) -> T:
        """`read`, in a thread."""
        return await asyncio.wrap_future(self._readers.submit(self.read, ask))

    async def writing(self, change: Callable[[Connection], T]) -> T:
        """`write`, in the writer's thread, after what is written already."""
        return await asyncio.wrap_future(self.submit(lambda: self.write(change)))

    def submit(self, work: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Have the writer's thread do something."""
        return self._writer.submit(work)

    def close(self) -> None:
        """Write what is to be written, and let go."""
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._engine.dispose()

    def _open(self) -> None:
        """Make or migrate the tables; another process may be doing the same."""
        until = time.monotonic() + OPENING_S
        while True:
            try:
                with self._writing.begin() as connection:
                    migrate(connection)
                return
            except SQLAlchemyError as error:
                # Two processes that turn a new file to its journal mode at once: one is told that it is locked.
                if "locked" in str(error) and time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                raise RequestError(
                    f"the store of keys at {self.shown} cannot be opened: {_reason(error)}; check the address, that it "
                    "runs and that it may be written to"
                ) from None


def open_store(options: ServerOptions) -> Store:
    """The store that a server's options name.

    Raises:
        RequestError: it cannot be opened.
    """
    if options.database_url:
        return Store(options.database_url)
    return Store(URL.create("sqlite", database=str(state_folder(options) / FILE_NAME)))


def _url(given: str | URL) -> URL:
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise RequestError(
            "the database's address is no URL; postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE was expected"
        ) from None
    backend = url.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or not url.database or url.database == ":memory:":
        raise RequestError(
            f"keys cannot be kept in {url.drivername}; postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE was "
            "expected"
        )
    return URL.create("sqlite", database=_private_file(Path(url.database)))


def _private_file(path: Path) -> str:
    """A SQLite file that only its owner can read; so are the files SQLite puts beside it."""
    path = path.expanduser().absolute()
    if not path.parent.exists():
        private_folder(path.parent)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise RequestError(f"the store of keys at {path} cannot be opened: {error.strerror or error}") from None
    return str(path)


def _engine_options(url: URL) -> dict[str, Any]:
    pool = {"pool_size": NUM_READERS + 1, "max_overflow": 4}
    if url.get_backend_name() == "sqlite":
        return {**pool, "connect_args": {"timeout": BUSY_S}}
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise RequestError("PostgreSQL needs psycopg; install pyrosome[postgres]") from None
    arguments: dict[str, Any] = {"connect_timeout": 5}
    if "options" not in url.query:
        arguments["options"] = "-c statement_timeout=15000 -c lock_timeout=10000"
    return {**pool, "pool_pre_ping": True, "connect_args": arguments}


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later could find the file locked with no way to wait.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _refusal(error: DBAPIError | UnicodeEncodeError) -> BaseException:
    if isinstance(error, DataError | UnicodeEncodeError):
        return Refused(400, "a text in the request has characters that cannot be looked up: NUL, or half of a pair")
    if not isinstance(error, OperationalError) and not error.connection_invalidated:
        return error
    message = f"keys and usage cannot be read or written now: {_reason(error)}; try again in a moment"
    return Refused(503, message, headers={"Retry-After": "5"})


def _reason(error: SQLAlchemyError) -> str:
    found = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
    return found.rstrip(".")
