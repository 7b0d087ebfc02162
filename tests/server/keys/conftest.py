"""Both stores for every test of one: SQLite, and a real PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import NullPool, create_engine, text

from pyrosome.server.keys.store import Store
from tests.server.keys.postgres import cluster


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server's database for tests, as an engine that empties it, and its URL."""
    with cluster() as url:
        address = url.replace("postgresql:", "postgresql+psycopg:")
        engine = create_engine(address, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        yield engine, url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'keys.db'}"
        return
    engine, url = request.getfixturevalue("postgres")
    yield url
    with engine.connect() as connection:
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = user AND pid <> pg_backend_pid()"
        )
        for command in (others, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
            connection.execute(text(command))


@pytest.fixture
def store(database_url):
    """An open store of each kind."""
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(tmp_path):
    """An open store on SQLite alone, for what does not depend on it."""
    opened = Store(f"sqlite:///{tmp_path / 'keys.db'}")
    yield opened
    opened.close()
