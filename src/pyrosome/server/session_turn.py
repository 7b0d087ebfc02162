"""A turn in a session: an exchange that goes on from what the engine holds, and becomes part of it when it is whole.

A turn that is broken off, because it failed or its client left, never was: the session is as before, and the same
request may be sent again.  What was computed of it is found again then.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from pyrosome.chat.events import Done
from pyrosome.engine.request import Request
from pyrosome.server.exchange import Asked, Exchange, Said, StillHere
from pyrosome.server.open_sessions import Sessions
from pyrosome.server.service import Service
from pyrosome.server.session_state import Hold, Session
from pyrosome.server.session_store import Conversation
from pyrosome.session import common_prefix


class Turn(Exchange, abc.ABC):
    """Nothing else is done in its session until it has ended.

    Args:
        hold: of the session; released at the end, whatever that is.
    """

    def __init__(self, service: Service, asked: Asked, sessions: Sessions, session: Session, hold: Hold) -> None:
        super().__init__(service, asked)
        self._sessions, self._session, self._hold = sessions, session, hold

    async def batches(self) -> AsyncIterator[list[Said] | StillHere]:
        """As any exchange's; before the last, what was said has become part of the session, which is free again.

        Raises:
            EngineError, Refused: as there; the session is as it was.
        """
        try:
            async for batch in super().batches():
                if not isinstance(batch, StillHere) and any(isinstance(s.event, Done) for s in batch):
                    self._keep()
                    self._session.is_changed = True
                    self._hold.release()
                yield batch
        except Exception:  # whoever is told of it may ask again at once
            self._hold.release()
            raise

    async def close(self) -> None:
        """As any exchange's."""
        try:
            await super().close()
        finally:
            self._hold.release()

    @abc.abstractmethod
    def _keep(self) -> None:
        """Make what was said part of the session."""


class ChatTurn(Turn):
    """Messages and their answer.

    Args:
        new: the messages that this turn adds.
    """

    def __init__(
        self, service: Service, asked: Asked, sessions: Sessions, session: Session, hold: Hold,
        new: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        super().__init__(service, asked, sessions, session, hold)
        self._new = new

    async def prepared(self) -> Request:
        """The prompt from where it parts from what the session holds, which is cut back to there."""
        request, sessions, session = self.asked.request, self._sessions, self._session
        held = await sessions.call(session, "session_ids")
        common = await asyncio.to_thread(common_prefix, held, request.ids)
        common = min(common, len(request.ids) - 1)
        await sessions.call(session, "session_rewind", num_tokens=len(held) - common)
        session.length = common
        stable = None if request.stable is None else max(0, request.stable - common)
        return dataclasses.replace(request, ids=request.ids[common:], stable=stable, session=session.engine_id)

    def _keep(self) -> None:
        (answer,), said = self.outcome.messages, self._session.said
        self._session.say(Conversation([*said.messages, *self._new, answer.to_dict()], said.settings))
        self._session.length = len(self.asked.request.ids) + len(self.asked.readers[0].ids)


class TextTurn(Turn):
    """Text, and how it goes on."""

    async def prepared(self) -> Request:
        """The new ids, behind what is really part of the session."""
        await self._sessions.align(self._session)
        return dataclasses.replace(self.asked.request, session=self._session.engine_id)

    def _keep(self) -> None:
        self._session.length += len(self.asked.request.ids) + len(self.asked.readers[0].ids)
