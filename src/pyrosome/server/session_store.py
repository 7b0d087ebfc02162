"""Saved sessions on disk: of each a file of the engine's, and a record of whose it is and what was said.

    sessions/ID.json            the record: replaced whole, when its file is there already
    sessions/ID.LETTERS.session what the engine wrote; each save writes another, and then removes the older

So whatever instant a crash picks, a record names a file that is whole and belongs to it.  Names on disk are made here,
of ids alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from pyrosome.errors import RequestError
from pyrosome.server.state import private_folder

log = logging.getLogger(__name__)

CHAT, TEXT = "chat", "text"
ID = re.compile(r"sess_[0-9a-f]{32}\Z")
_FILE = re.compile(r"(?P<id>sess_[0-9a-f]{32})\.[0-9a-f]{16}\.session\Z")
_VERSION = 1
_LEFT_OVER_S = 86_400.0  # what nobody has written to for so long was left behind by a crash


class Conversation(msgspec.Struct):
    """What a session was told and answered, and how it is asked; both empty for one of plain text."""

    messages: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}  # of a chat completion's body: tools, and the mode


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A saved session."""

    id: str
    account: str
    name: str
    kind: str  # "chat" or "text"
    created: int  # seconds since 1970
    saved: int
    tokens: int
    num_messages: int
    bytes: int  # of its file
    file: str  # its name in the folder
    fingerprint: str  # of the engine that wrote it: no other reads it
    is_imported: bool = False  # what is in it was not computed here


class _Page(msgspec.Struct, forbid_unknown_fields=True):
    """What a record's file holds."""

    version: int
    record: Record
    conversation: Conversation


class SessionStore:
    """The folder.  Nothing here waits for the engine, and everything for the disk.

    `put` and `delete` may be called in threads, those of one session one after the other.

    Raises:
        RequestError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)
        self.records: dict[str, Record] = {}
        try:
            names = os.listdir(self.folder)
        except OSError as error:
            raise RequestError(f"saved sessions cannot be read from {folder}: {error}; name another folder") from None
        for name in names:
            if name.endswith(".json") and ID.match(name[:-5]):
                self._found(name)
        self._sweep(names)

    def new_id(self) -> str:
        """An id that nobody can guess."""
        return f"sess_{secrets.token_hex(16)}"

    def new_file(self, session_id: str) -> Path:
        """Where another file of a session goes."""
        return self.folder / f"{session_id}.{secrets.token_hex(8)}.session"

    def new_upload(self) -> Path:
        """Where a file is put that nobody has looked into yet."""
        return self.folder / f".import.{secrets.token_hex(16)}"

    def path(self, record: Record) -> Path:
        """A saved session's file."""
        return self.folder / record.file

    def damage(self, record: Record) -> str:
        """What is seen to be wrong with its file without reading it; "": nothing."""
        try:
            found = self.path(record).stat().st_size
        except OSError:
            return "its file is gone"
        return "" if found == record.bytes else f"its file has {found:,} bytes and {record.bytes:,} were written"

    def conversation(self, record: Record) -> Conversation:
        """What was said in it.

        Raises:
            OSError: the record cannot be read.
            msgspec.MsgspecError: it is damaged.
        """
        return _read(self.folder / f"{record.id}.json").conversation

    def put(self, record: Record, conversation: Conversation) -> None:
        """Keep a session whose file is written; once this returns, a crash does not lose it.

        Raises:
            OSError: the disk does not take it; what was kept of the session before is as it was.
        """
        page = msgspec.json.encode(_Page(_VERSION, record, conversation))
        temporary = self.folder / f".{record.id}.{secrets.token_hex(8)}"
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(page)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.folder / f"{record.id}.json")
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        self.sync()
        older = self.records.get(record.id)
        self.records[record.id] = record
        if older and older.file != record.file:
            self.path(older).unlink(missing_ok=True)

    def delete(self, record: Record) -> None:
        """Forget a session; its record goes first, so that none ever names a file that was taken away.

        Raises:
            OSError: it cannot be deleted.
        """
        (self.folder / f"{record.id}.json").unlink(missing_ok=True)
        self.records.pop(record.id, None)
        self.path(record).unlink(missing_ok=True)
        self.sync()

    def bytes_of(self, account: str) -> int:
        """Bytes of an account's files."""
        return sum(r.bytes for r in tuple(self.records.values()) if r.account == account)

    def num_of(self, account: str) -> int:
        """How many sessions an account has saved."""
        return sum(r.account == account for r in tuple(self.records.values()))

    def sync(self) -> None:
        """Have the folder's entries on the disk."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _found(self, name: str) -> None:
        try:
            page = _read(self.folder / name)
            record, file = page.record, _FILE.match(page.record.file)
            if page.version != _VERSION or record.id != name[:-5] or not file or file["id"] != record.id:
                raise ValueError("it is of another version, or of another session")
        except (OSError, ValueError) as error:  # also what msgspec raises
            log.warning("the saved session in %s cannot be used and is left as it is: %s", self.folder / name, error)
            return
        self.records[record.id] = record

    def _sweep(self, names: list[str]) -> None:
        """Remove what a crash left: temporary files, and files that no record names."""
        known = {r.file for r in self.records.values()}
        recorded = {name[:-5] for name in names if name.endswith(".json")}
        for name in names:
            file = _FILE.match(name)
            # A file beside a record that cannot be read may be all that is left of a session.
            if not name.startswith(".") and (not file or name in known or file["id"] in recorded - self.records.keys()):
                continue
            path = self.folder / name
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                    path.unlink()
                    log.info("%s was left behind by a crash and is deleted", path)


def _read(path: Path) -> _Page:
    return msgspec.json.decode(path.read_bytes(), type=_Page)
