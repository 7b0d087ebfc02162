"""The store: its versions, its files, and several processes at once."""

import stat
import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy import inspect, select, text

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.keys import book, schema
from pyrosome.server.keys.store import FILE_NAME, Store, open_store
from pyrosome.server.problems import Refused

NOW = time.time()


def test_the_tables_made_are_the_tables_asked(store):
    def look(connection):
        found = inspect(connection)
        return {t: {c["name"]: c["nullable"] for c in found.get_columns(t)} for t in found.get_table_names()}

    made = store.read(look)
    asked = {t.name: {c.name: c.nullable for c in t.columns} for t in schema.metadata.sorted_tables}
    assert made.keys() == asked.keys()
    for name, columns in asked.items():
        assert made[name].keys() == columns.keys()
        keys = {c.name for c in schema.metadata.tables[name].primary_key}
        assert {c: n for c, n in made[name].items() if c not in keys} == {
            c: n for c, n in columns.items() if c not in keys
        }


def test_a_store_of_an_earlier_version_becomes_one_of_today(database_url, monkeypatch):
    first = Store(database_url)
    first.write(lambda c: book.create_account(c, NOW, "kept"))
    first.close()
    later = (*schema.MIGRATIONS, ("ALTER TABLE accounts ADD COLUMN remark TEXT", "UPDATE accounts SET remark = 'new'"))
    monkeypatch.setattr(schema, "MIGRATIONS", later)
    second = Store(database_url)
    row = second.read(lambda c: c.execute(text("SELECT name, remark FROM accounts")).one())
    assert tuple(row) == ("kept", "new")
    assert second.read(lambda c: c.execute(select(schema.version.c.version)).scalar_one()) == len(later)
    second.close()


def test_a_migration_that_fails_halfway_leaves_the_store_as_it_was(database_url, monkeypatch):
    Store(database_url).close()
    with monkeypatch.context() as patched:
        broken = (
            *schema.MIGRATIONS,
            ("ALTER TABLE accounts ADD COLUMN remark TEXT", "ALTER TABLE nowhere ADD COLUMN x TEXT"),
        )
        patched.setattr(schema, "MIGRATIONS", broken)
        with pytest.raises(RequestError, match="cannot be opened"):
            Store(database_url)
    again = Store(database_url)
    assert "remark" not in again.read(lambda c: {x["name"] for x in inspect(c).get_columns("accounts")})
    again.close()


def test_a_store_of_a_later_version_is_not_touched(database_url, monkeypatch):
    opened = Store(database_url)
    opened.write(lambda c: c.execute(schema.version.update().values(version=99)))
    opened.close()
    with pytest.raises(RequestError, match="version 99 and this pyrosome knows 1"):
        Store(database_url)


def test_several_who_open_a_new_store_at_once_all_have_it(database_url):
    stores, problems = [], []

    def open_one():
        try:
            stores.append(Store(database_url))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert stores[0].read(lambda c: c.execute(select(schema.version.c.version)).scalars().all()) == [1]
    for one in stores:
        one.close()


def test_another_process_writes_while_this_one_has_it_open(database_url, store):
    code = (
        "import sys\nfrom pyrosome.server.keys import book\nfrom pyrosome.server.keys.store import Store\n"
        "s = Store(sys.argv[1])\nfor i in range(20):\n    s.write(lambda c: book.create_account(c, 1.0, 'theirs'))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, database_url])
    for _ in range(20):
        store.write(lambda c: book.create_account(c, NOW, "ours"))
    assert other.wait(60) == 0
    names = [a.name for a in store.read(book.accounts)]
    assert (names.count("ours"), names.count("theirs")) == (20, 20)


def test_a_change_that_fails_changes_nothing(store):
    def change(connection):
        book.create_account(connection, NOW, "half")
        raise Refused(409, "no")

    with pytest.raises(Refused):
        store.write(change)
    assert store.read(book.accounts) == []


def test_a_name_that_looks_like_a_command_is_a_name(store):
    name = "'; DROP TABLE keys; -- \" \\ %s :x"
    account = store.write(lambda c: book.create_account(c, NOW, name))
    store.write(lambda c: book.create_key(c, NOW, account.id, name, frozenset({"generate"})))
    assert store.read(lambda c: book.account_called(c, name)) == account
    assert [k.name for k in store.read(lambda c: book.keys(c, account.id))] == [name]
    assert store.read(lambda c: book.account_called(c, "' OR '1'='1")) is None
    with pytest.raises(Refused, match="no key"):
        store.read(lambda c: book.key(c, "' OR 1=1 --"))


@pytest.mark.parametrize("text_of", ["a\x00b", "\ud800"])
def test_a_text_that_no_database_takes_is_refused_or_not_there(store, text_of):
    for ask in (book.key, book.account):
        with pytest.raises(Refused) as refused:
            store.read(lambda c, ask=ask: ask(c, text_of))
        assert refused.value.status in (400, 404)
    assert store.read(book.accounts) == [], "the connection is as good as before"


def test_a_key_of_no_account_cannot_be_written(store):
    with pytest.raises(Refused, match="no account"):
        store.write(lambda c: book.create_key(c, NOW, "acct-nobody", "x", frozenset({"generate"})))
    row = {"id": "k", "account": "acct-nobody", "name": "x", "digest": "", "scopes": "generate", "created": 1}
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.write(lambda c: c.execute(schema.keys.insert().values(**row)))


def test_the_file_and_its_folder_are_their_owners_alone(tmp_path):
    opened = open_store(ServerOptions(state_path=str(tmp_path / "state")))
    opened.write(lambda c: book.create_account(c, NOW, "x"))
    files = sorted((tmp_path / "state").iterdir())
    assert files[0].name == FILE_NAME
    assert len(files) > 1, "the journal is beside it"
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    opened.close()


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "keys.db"
    path.touch(mode=0o644)
    Store(f"sqlite:///{path}").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_folder_is_the_users_own_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    open_store(ServerOptions()).close()
    assert (tmp_path / "pyrosome" / FILE_NAME).exists()


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "sqlite://", "sqlite:///:memory:", "nonsense", "http://x"])
def test_an_address_of_another_kind_is_refused(url):
    with pytest.raises(RequestError, match="was expected") as refused:
        Store(url)
    assert "hunter2" not in str(refused.value)


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path):
    with pytest.raises(RequestError, match="cannot be opened") as refused:
        Store(f"postgresql://somebody:hunter2@/nowhere?host={tmp_path}")
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_file_that_is_no_database_is_told(tmp_path):
    path = tmp_path / "keys.db"
    path.write_bytes(b"not a database at all, but long enough to be taken for one" * 100)
    with pytest.raises(RequestError, match="not a database"):
        Store(f"sqlite:///{path}")


def test_a_store_that_does_not_answer_is_a_503_that_says_when_to_try_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrosome.server.keys.store.BUSY_S", 0.1)
    one, other = Store(f"sqlite:///{tmp_path / 'k.db'}"), Store(f"sqlite:///{tmp_path / 'k.db'}")

    def while_locked(connection):
        with pytest.raises(Refused, match="locked") as refused:
            other.write(lambda c: book.create_account(c, NOW, "x"))
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})

    one.write(while_locked)
    one.close()
    other.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_connections_that_were_cut_are_made_again(store):
    store.write(lambda c: book.create_account(c, NOW, "before"))
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = user AND pid <> pg_backend_pid()"
    )
    with pytest.raises(Refused, match="cannot be read or written now"):
        store.write(lambda c: (store.read(lambda r: r.execute(text(cut)).scalar_one()), book.accounts(c)))
    store.write(lambda c: book.create_account(c, NOW, "after"))
    assert {a.name for a in store.read(book.accounts)} == {"before", "after"}
