"""The folder of saved sessions: whatever instant a crash picks, each session is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import time

import pytest

from pyrosome.errors import RequestError
from pyrosome.server import session_store
from pyrosome.server.session_store import Conversation, Record, SessionStore

SAID = Conversation([{"role": "user", "content": "hello"}], {"reasoning_effort": "low"})


def saved(store: SessionStore, session: str, tokens: int = 3, account: str = "ann") -> Record:
    """A session whose file is written."""
    file = store.new_file(session)
    file.write_bytes(b"x" * tokens)
    record = Record(
        id=session, account=account, name="n", kind="chat", created=1, saved=2, tokens=tokens, num_messages=1,
        bytes=tokens, file=file.name, fingerprint="f",
    )  # fmt: skip
    store.put(record, SAID)
    return record


def test_what_was_put_is_found_again(tmp_path):
    store = SessionStore(tmp_path / "sessions")
    first, second = saved(store, store.new_id()), saved(store, store.new_id(), 5, "bob")
    again = SessionStore(tmp_path / "sessions")
    assert again.records == store.records == {first.id: first, second.id: second}
    assert again.conversation(first) == SAID and again.path(first).read_bytes() == b"xxx"
    assert (again.bytes_of("ann"), again.bytes_of("bob"), again.num_of("bob"), again.num_of("cat")) == (3, 5, 1, 0)
    assert not again.damage(first)
    store.delete(first)
    assert SessionStore(tmp_path / "sessions").records == {second.id: second}
    assert sorted(os.listdir(tmp_path / "sessions")) == sorted([second.file, f"{second.id}.json"])


class Killed(BaseException):
    """The process is no more."""


def dies_at(monkeypatch, call: int) -> None:
    """Let the process end before that call to the system, and at every one after it: nothing is tidied up."""
    left = iter(range(call))

    def mortal(real):
        def run(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return run

    for name in ("open", "fsync", "replace"):
        monkeypatch.setattr(session_store.os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(session_store.Path, "unlink", mortal(session_store.Path.unlink))


@pytest.mark.parametrize("what", ["put", "delete"])
def test_a_process_that_dies_at_any_call_leaves_whole_sessions(tmp_path, what):
    seen = set()
    for call in range(12):
        store = SessionStore(tmp_path / str(call))
        session, other = store.new_id(), store.new_id()
        older, kept = saved(store, session), saved(store, other)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(patch, call)
            try:
                saved(store, session, 9) if what == "put" else store.delete(older)
                seen.add("done")
            except Killed:
                pass
        again = SessionStore(tmp_path / str(call))
        assert again.records[other] == kept and not again.damage(kept)
        record = again.records.get(session)
        seen.add(record.tokens if record else None)
        assert record is None or not again.damage(record)
    assert seen == {3, "done", 9 if what == "put" else None}


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    store = SessionStore(tmp_path / "sessions")
    older = saved(store, store.new_id())

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(session_store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved(store, older.id, 9)
    monkeypatch.undo()
    assert SessionStore(tmp_path / "sessions").records == store.records == {older.id: older}
    assert not [name for name in os.listdir(store.folder) if name.startswith(".")]


def test_what_a_crash_left_behind_is_removed_once_it_is_old(tmp_path):
    store = SessionStore(tmp_path / "sessions")
    kept, unreadable = saved(store, store.new_id()), saved(store, store.new_id())
    (store.folder / f"{unreadable.id}.json").write_text("{")
    left = [store.new_upload(), store.new_file(kept.id), store.new_file(store.new_id()), store.folder / f".{kept.id}.x"]
    strange = [store.folder / "notes.txt", store.folder / "sess_x.session"]
    for path in (*left, *strange):
        path.touch()
    SessionStore(store.folder)
    assert all(p.exists() for p in left), "another server may be writing it just now"
    for path in store.folder.iterdir():
        os.utime(path, (0, time.time() - 2 * 86_400))
    again = SessionStore(store.folder)
    assert not any(p.exists() for p in left) and all(p.exists() for p in strange)
    assert again.path(kept).exists() and again.path(unreadable).exists() and again.records == {kept.id: kept}


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "sess_0.session", "", f"sess_{'0' * 32}.{'0' * 16}.session"])
def test_a_record_names_only_a_file_of_its_own(tmp_path, file):
    store = SessionStore(tmp_path / "sessions")
    record = saved(store, store.new_id())
    page = (store.folder / f"{record.id}.json").read_text().replace(record.file, file)
    (store.folder / f"{record.id}.json").write_text(page)
    assert SessionStore(store.folder).records == {}


def test_a_folder_that_is_none_is_told(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match="cannot be used"):
            SessionStore(path)
