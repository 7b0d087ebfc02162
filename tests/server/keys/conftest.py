"""Both stores for every test of one: SQLite, and a real PostgreSQL."""

from __future__ import annotations

import itertools
import os

import pytest
from sqlalchemy import create_engine, text

from pyrosome.server.keys.store import Store
from tests.server.keys.postgres import WITHOUT, cluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server's URL, with `{name}` where the database's goes."""
    if os.environ.get(WITHOUT) == "1":
        pytest.skip(f"{WITHOUT}=1")
    with cluster() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'keys.db'}"
        return
    url = request.getfixturevalue("postgres")
    name = f"test_{next(_numbers)}"
    _administer(url, f"CREATE DATABASE {name}")
    yield url.format(name=name)
    _administer(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(database_url):
    """An open store of each kind."""
    opened = Store(database_url)
    yield opened
    opened.close()


def _administer(url: str, command: str) -> None:
    address = url.format(name="postgres").replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(command))
    engine.dispose()
