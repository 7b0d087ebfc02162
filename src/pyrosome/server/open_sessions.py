"""Sessions as the server knows them: whose they are, what was said in them, where the engine has them, what is saved.

The engine's sessions are ids and what was computed of them.  What counts is kept here (a conversation's messages, how
many of the ids are really part of it): a turn that was broken off is cut away before anything else is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pyrosome.errors import CheckpointError, DoesNotFit, PyrosomeError, RequestError, SessionBusy, UnknownSession
from pyrosome.server.caller import Caller
from pyrosome.server.problems import Refused
from pyrosome.server.service import Service
from pyrosome.server.session_state import BUSY, ID_BYTES, Hold, Session, as_saved, full, json_bytes, of_notes, unusable
from pyrosome.server.session_store import ID, TEXT, Conversation, Record, SessionStore

LOOK_S = 0.002  # between two looks at whether the engine has ended a turn
PATIENCE_S = 60.0  # it does so between two of its steps


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What sessions may take.  An account is one person, or one application."""

    open_each: int = 64  # an account's sessions that are open in the engine
    open_all: int = 256
    open_bytes_each: int = 512 << 20  # of memory beside the cache, for messages and ids
    open_bytes_all: int = 2 << 30
    saved_each: int = 1024
    disk_bytes_each: int = 64 << 30  # of an account's files
    transfers_each: int = 4  # files on their way, in or out
    conversation_bytes: int = 8 << 20  # of its messages as JSON, which its file must hold too


class Sessions:
    """All sessions of a service.

    Raises:
        RequestError: the folder of saved ones cannot be used.
    """

    def __init__(self, service: Service, folder: Path, limits: Limits | None = None) -> None:
        self._service, self.limits = service, limits or Limits()
        self.store = SessionStore(folder)
        self._opening = asyncio.Lock()
        self._transfers: dict[str, int] = {}
        self._all = {r.id: as_saved(r) for r in self.store.records.values()}

    # Which there are

    def of(self, caller: Caller) -> list[Session]:
        """An account's sessions, newest first."""
        return sorted((s for s in self._all.values() if s.account == caller.account), key=lambda s: (-s.created, s.id))

    def find(self, caller: Caller, session_id: str) -> Session:
        """The account's session of that id.

        Raises:
            Refused: 404; whether another account has it is not told.
        """
        session = self._all.get(session_id) if ID.match(session_id) else None
        if session is None or session.account != caller.account:
            raise Refused(404, "there is no session of that id; GET /v1/sessions lists yours", code="session_not_found")
        session.salt = caller.salt
        return session

    def fault(self, session: Session) -> str:
        """Why a session that is not open cannot be opened; "": nothing is known."""
        record = session.record
        if session.engine_id or record is None:
            return ""
        own = self._service.card.fingerprint
        if own and record.fingerprint != own:
            return (
                f"it was saved with another model, numerics or cache format (fingerprint {record.fingerprint[:16]}, "
                f"here {own[:16]})"
            )
        return session.fault or self.store.damage(record)

    # What is done with them

    async def create(self, caller: Caller, kind: str, name: str, said: Conversation, ids: list[int]) -> Session:
        """A new one.

        Raises:
            Refused: 413, 429.
            RequestError: an id outside the vocabulary.
        """
        self.check_size(said)
        session = Session(self.store.new_id(), caller.account, kind, name, int(time.time()), caller.salt)
        session.say(said)
        async with self._opening:
            await self._make_room(session, ID_BYTES * len(ids))
            session.engine_id = await self._service.engine.call("session_open", salt=session.cache_salt)
            self._all[session.id] = session
        if ids:
            try:
                session.length = await self.call(session, "session_extend", ids=ids)
            except PyrosomeError:
                await self.delete(session)
                raise
        return session

    async def call(self, session: Session, name: str, /, **arguments: Any) -> Any:
        """An operation of the engine's on a session, which is opened for it.

        Raises:
            Refused: 409, its file cannot be used; 410, the engine has lost it; 429, there is no room for it.
        """
        while True:
            await self.present(session)
            try:
                return await self._patiently(session.engine_id, name, arguments)
            except UnknownSession:
                self._lost(session)

    async def present(self, session: Session) -> None:
        """Have it open in the engine.

        Raises:
            Refused: 409, 429.
            ContextTooLong: this engine has no room for it.
        """
        if session.engine_id:
            return
        async with self._opening:
            record = session.record
            assert record is not None
            session.fault = ""  # it is tried again
            if fault := self.fault(session):
                raise unusable(session, fault)
            await self._make_room(session)
            try:
                said = await asyncio.to_thread(self.store.conversation, record)
                session.engine_id = await self._restore(session, self.store.path(record))
            except (CheckpointError, OSError, msgspec.MsgspecError) as error:
                session.fault = str(error)
                raise unusable(session, session.fault) from None
            session.say(said)
            session.length, session.is_changed = record.tokens, False

    async def align(self, session: Session) -> None:
        """Cut away what a turn that was broken off has left in the engine."""
        held = await self.call(session, "session_length")
        if held > session.length:
            await self.call(session, "session_rewind", num_tokens=held - session.length)
        session.length = min(held, session.length)

    async def fork(self, session: Session, name: str) -> Session:
        """A second one with the same past."""
        while True:
            await self.align(session)
            twin = Session(
                self.store.new_id(), session.account, session.kind, name, int(time.time()), session.salt,
                length=session.length, is_imported=session.is_imported,
            )  # fmt: skip
            twin.say(Conversation(list(session.said.messages), dict(session.said.settings)))
            async with self._opening:
                await self._make_room(twin)
                try:
                    twin.engine_id = await self._patiently(session.engine_id, "session_fork", {})
                except UnknownSession:
                    self._lost(session)
                    continue
                self._all[twin.id] = twin
            return twin

    async def rewind_tokens(self, session: Session, num_tokens: int) -> int:
        """Take the last tokens back; how many of those left are computed again."""
        await self.align(session)
        again = await self.call(session, "session_rewind", num_tokens=num_tokens)
        session.length -= num_tokens
        session.is_changed = True
        return int(again)

    async def save(self, session: Session, name: str | None) -> Record:
        """Write it to disk; once this returns, it outlives the server.

        Raises:
            Refused: 429, the account has no room left; 503, the disk has none.
        """
        if session.record is None and self.store.num_of(session.account) >= self.limits.saved_each:
            raise full(f"{self.limits.saved_each} sessions are saved, as many as an account may keep")
        self.room_on_disk(session.account, but=session.record)
        await self.align(session)
        path = self.store.new_file(session.id)
        size = await self._write(session, path)
        session.name = session.name if name is None else name
        await self._keep(session, path, size)
        assert session.record is not None
        return session.record

    async def export(self, session: Session) -> tuple[BinaryIO, int]:
        """The file of a session as it is now, opened, and its bytes; it needs no name any more.

        Raises:
            Refused: 409, 410, 503.
        """
        if session.record and not session.is_changed:
            path = self.store.path(session.record)
            try:
                return open(path, "rb"), path.stat().st_size
            except OSError:
                raise unusable(session, "its file is gone") from None
        await self.align(session)
        path = self.store.new_upload()
        try:
            size = await self._write(session, path)
            return open(path, "rb"), size
        finally:
            path.unlink(missing_ok=True)

    async def take(self, caller: Caller, path: Path, name: str) -> Session:
        """Make a session of a file that came from outside, which is then kept here.

        Raises:
            Refused: 400, what is wrong with it; 429.
            ContextTooLong: it holds more tokens than this engine's context.
        """
        session = Session(
            self.store.new_id(), caller.account, TEXT, name, int(time.time()), caller.salt, is_imported=True
        )
        async with self._opening:
            await self._make_room(session)
            try:
                session.engine_id = await self._restore(session, path)
            except CheckpointError as error:
                raise Refused(400, f"that file cannot be imported: {error}") from None
            self._all[session.id] = session
        with Hold(session, "import"):
            try:
                notes = await self.call(session, "session_notes")
                session.kind, said = of_notes(notes)
                self.check_size(said)
                session.say(said)
                session.length = await self.call(session, "session_length")
                await self.grow(session, 0)
                file, size = self.store.new_file(session.id), path.stat().st_size
                path.rename(file)
                await self._keep(session, file, size)
            except BaseException:
                await self.delete(session)
                raise
        return session

    async def delete(self, session: Session) -> None:
        """Forget it, in the engine and on disk."""
        await self._close(session)
        if session.record:
            await asyncio.shield(asyncio.to_thread(self.store.delete, session.record))
        self._all.pop(session.id, None)

    # Limits

    def check_size(self, said: Conversation) -> None:
        """Refuse a conversation that is too large to be kept.

        Raises:
            Refused: 413.
        """
        size, most = json_bytes(said), self.limits.conversation_bytes
        if size > most:
            raise Refused(413, f"the conversation has {size:,} bytes as JSON and {most:,} are kept; shorten it")

    def room_on_disk(self, account: str, more: int = 1, but: Record | None = None) -> int:
        """How many bytes an account may still write.

        Args:
            but: a file that is not counted, since another takes its place.

        Raises:
            Refused: 429, fewer than `more`.
        """
        used = self.store.bytes_of(account) - (but.bytes if but else 0)
        left = self.limits.disk_bytes_each - used
        if left < more:
            raise full(f"saved sessions take {used:,} bytes and {self.limits.disk_bytes_each:,} are an account's")
        return left

    @contextlib.contextmanager
    def transfer(self, account: str) -> Iterator[None]:
        """While a file comes or goes.

        Raises:
            Refused: 429.
        """
        if (num := self._transfers.get(account, 0)) >= self.limits.transfers_each:
            raise Refused(429, f"{num} session files are on their way, as many as an account may have; wait for one")
        self._transfers[account] = num + 1
        try:
            yield
        finally:
            self._transfers[account] -= 1
            if not self._transfers[account]:
                del self._transfers[account]

    async def grow(self, session: Session, more_bytes: int) -> None:
        """See that an open session may take more memory.

        Raises:
            Refused: 429.
        """
        async with self._opening:
            await self._make_room(session, more_bytes)

    async def _make_room(self, session: Session, more_bytes: int = 0) -> None:
        """Have a place for a session: others go that are saved as they are, the longest idle first."""
        limits = self.limits
        for most, most_bytes, owner in (
            (limits.open_each, limits.open_bytes_each, session.account), (limits.open_all, limits.open_bytes_all, None),
        ):  # fmt: skip
            while True:
                there = [s for s in self._all.values() if s.engine_id and s is not session]
                there = [s for s in there if owner is None or s.account == owner]
                num_bytes = session.weight + more_bytes + sum(s.weight for s in there)
                if len(there) < most and num_bytes <= most_bytes:
                    break
                idle = [s for s in there if not s.is_changed and not s.doing]
                if not idle:
                    raise Refused(
                        429,
                        f"{len(there)} sessions are open, of {num_bytes:,} bytes with this one, of at most {most} and "
                        f"{most_bytes:,}; none of them is saved and idle: save or delete one",
                        code="too_many_sessions",
                    )
                oldest = min(idle, key=lambda s: s.used)
                oldest.conversation = None
                await self._close(oldest)

    # The engine and the disk

    async def _patiently(self, engine_id: str, name: str, arguments: dict[str, Any]) -> Any:
        """An operation on a session that nobody else uses: if it is busy, a turn is being ended just now."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await self._service.engine.call(name, session=engine_id, **arguments)
            except SessionBusy as error:
                if time.monotonic() > until:
                    raise Refused(409, str(error), code=BUSY) from None
                await asyncio.sleep(LOOK_S)

    def _lost(self, session: Session) -> None:
        """The engine is another one since.  What is saved is opened again, unless that is not what it was.

        Raises:
            Refused: 410.
        """
        session.engine_id, record = "", session.record
        if record is None:
            self._all.pop(session.id, None)
            raise Refused(
                410,
                f"session {session.id} was open in an engine that has ended, and was never saved: it is gone; create "
                "another and send its messages again",
                code="session_lost",
            )
        if session.is_changed:
            session.conversation, session.length, session.is_changed = None, record.tokens, False
            raise Refused(
                410,
                f"session {session.id} was open in an engine that has ended: it is as it was when it was saved, with "
                f"{record.num_messages} messages and {record.tokens} tokens; send again what came after that",
                code="session_lost",
            )

    async def _close(self, session: Session) -> None:
        """Have it no more in the engine."""
        engine_id, session.engine_id = session.engine_id, ""
        if engine_id:
            with contextlib.suppress(PyrosomeError):  # an engine that is not there has no sessions either
                await self._patiently(engine_id, "session_close", {})

    async def _restore(self, session: Session, path: Path) -> str:
        full = str(path.absolute())
        try:
            return str(await self._service.engine.call("session_restore", path=full, salt=session.cache_salt))
        except CheckpointError as error:
            raise CheckpointError(_told(error, full)) from None
        except RequestError as error:
            if full not in str(error):
                raise
            raise Refused(503, _told(error, full), headers={"Retry-After": "5"}) from None  # there is no room just now

    async def _write(self, session: Session, path: Path) -> int:
        notes = {"kind": session.kind, "messages": session.said.messages, "settings": session.said.settings}
        full = str(path.absolute())
        try:
            return int(await self.call(session, "session_save", path=full, notes=notes))
        except (CheckpointError, DoesNotFit) as error:
            message = f"the session could not be saved: {_told(error, full)}"
            raise Refused(503, message, headers={"Retry-After": "60"}) from None

    async def _keep(self, session: Session, path: Path, size: int) -> None:
        """Record a file that is written."""
        record = Record(
            id=session.id, account=session.account, name=session.name, kind=session.kind, created=session.created,
            saved=int(time.time()), tokens=session.length, num_messages=session.num_messages, bytes=size,
            file=path.name, fingerprint=self._service.card.fingerprint, is_imported=session.is_imported,
        )  # fmt: skip
        try:
            self.room_on_disk(session.account, size, session.record)
            await asyncio.shield(asyncio.to_thread(self.store.put, record, session.said))
        except Refused:
            path.unlink(missing_ok=True)
            raise
        except OSError as error:
            path.unlink(missing_ok=True)
            raise Refused(503, f"the session could not be saved: {error.strerror}") from None
        session.record, session.is_changed, session.fault = record, False, ""


def _told(error: Exception, path: str) -> str:
    """A message about a file, without the place it has here."""
    return str(error).replace(path, "the session file")
