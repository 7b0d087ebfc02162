"""One session, what may be done in it at a time, and what may be wrong with it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec

from pyrosome.server.problems import Refused
from pyrosome.server.session_schema import messages_of, settings_of
from pyrosome.server.session_store import CHAT, TEXT, Conversation, Record

ID_BYTES = 40  # of memory, for an id in a list
UNUSABLE, FULL, BUSY = "session_unusable", "storage_full", "session_busy"


@dataclasses.dataclass(eq=False)
class Session:
    """One of them.  It is open in the engine, or saved, or both."""

    id: str
    account: str
    kind: str
    name: str
    created: int  # seconds since 1970
    salt: str = ""  # its account's
    engine_id: str = ""  # "": not open in the engine
    conversation: Conversation | None = None  # None: it is on disk; set by `say`
    conversation_bytes: int = 0  # as JSON
    length: int = 0  # tokens that are part of it; the engine may hold more, of a turn that was broken off
    record: Record | None = None  # as it was saved last
    is_imported: bool = False
    is_changed: bool = True  # since then
    fault: str = ""  # why its file cannot be used
    doing: str = ""  # what is done in it just now
    used: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def cache_salt(self) -> str:
        """Whose prefixes it shares: its account's, but what came from outside shares none."""
        return f"{self.salt}/session/{self.id}" if self.is_imported else self.salt

    @property
    def num_messages(self) -> int:
        """Messages, answers included."""
        if self.conversation is not None:
            return len(self.conversation.messages)
        return self.record.num_messages if self.record else 0

    @property
    def weight(self) -> int:
        """Bytes of memory it takes while it is open, beside the engine's cache: its messages here, its ids there."""
        return self.conversation_bytes + ID_BYTES * self.length

    def say(self, conversation: Conversation) -> None:
        """Have that be what was said in it."""
        self.conversation, self.conversation_bytes = conversation, json_bytes(conversation)

    @property
    def said(self) -> Conversation:
        """What was said in it, of one that is open."""
        assert self.conversation is not None
        return self.conversation


class Hold:
    """A session while something is done in it; nothing else is.  Raises `Refused` (409) where something is already."""

    def __init__(self, session: Session, doing: str) -> None:
        if session.doing:
            raise busy(session, session.doing)
        self._session: Session | None = session
        session.doing, session.used = doing, time.monotonic()

    def release(self) -> None:
        """Something else may be done in it; again or not."""
        if self._session:
            self._session.doing = ""
            self._session = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def json_bytes(conversation: Conversation) -> int:
    """How large a conversation is."""
    return len(msgspec.json.encode(conversation))


def as_saved(record: Record) -> Session:
    """A saved session that is not open."""
    return Session(
        record.id, record.account, record.kind, record.name, record.created, length=record.tokens, record=record,
        is_imported=record.is_imported, is_changed=False,
    )  # fmt: skip


def of_notes(notes: Any) -> tuple[str, Conversation]:
    """The kind and conversation in a file's notes, of which nothing is believed.

    Raises:
        Refused: 400.
    """
    notes = notes if isinstance(notes, dict) else {}
    said = Conversation(messages_of(notes.get("messages") or []), settings_of(notes.get("settings") or {}))
    kind = notes.get("kind")
    return kind if kind in (CHAT, TEXT) else CHAT if said.messages else TEXT, said


def busy(session: Session, doing: str) -> Refused:
    """409: it does something already."""
    return Refused(
        409,
        f"session {session.id} is busy ({doing}) and does one thing at a time; wait for its end, or fork it before",
        code=BUSY,
    )


def unusable(session: Session, fault: str) -> Refused:
    """409: what was saved of it cannot be opened here."""
    return Refused(409, f"session {session.id} cannot be used: {fault}; export it, or delete it", code=UNUSABLE)


def full(found: str) -> Refused:
    """429: its account has as much on disk as it may."""
    return Refused(429, f"{found}; delete some, or export them before", code=FULL)
