"""The door of a server with keys: whose key that is, what it may use, and the line that is written of it."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Mapping

from sqlalchemy.exc import DBAPIError

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.caller import GENERATE, METRICS, SESSIONS, Caller, Door, Entry, OpenDoor, Ticket
from pyrosome.server.keys import book
from pyrosome.server.keys.book import Known
from pyrosome.server.keys.keys import KEY, NOBODYS, is_same, read_secret
from pyrosome.server.keys.ledger import Ledger, Line
from pyrosome.server.keys.limits import Hold, Level, Meters
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import day_of, iso
from pyrosome.server.keys.store import Store, open_store
from pyrosome.server.keys.usage import spent
from pyrosome.server.problems import Refused

log = logging.getLogger(__name__)

KNOWN_S = 2.0  # a change that another process made is seen within
MAX_KNOWN = 10_000
USE_NOTED_S = 60  # when a key was last used is known this well
# Whoever comes without a key where none is needed.  Keys and accounts are not theirs: what they could make there would
# open the door from elsewhere too.
UNKNOWN = Caller("", "", "anybody", frozenset({GENERATE, SESSIONS, METRICS}), "")


def door_for(options: ServerOptions) -> Door:
    """The door that a server's options ask for.

    On a loopback address keys are known and not needed; on any other they are needed.

    Raises:
        RequestError: keys are needed and there are none yet, or the store cannot be opened.
    """
    if options.keys == "off":
        return OpenDoor()
    is_needed = options.keys == "required" or not is_loopback(options.host)
    store = open_store(options)
    if is_needed and not store.read(lambda connection: book.has_active_key(connection, time.time())):
        store.close()
        where = (
            f"{options.host or 'every address'} is open to others" if options.keys == "auto" else "keys are required"
        )
        raise RequestError(
            f"{where}, and there is no key yet: make one with `pyrosome keys create --admin`, for the same "
            "--state or --database; or listen at 127.0.0.1; or let everybody in with --keys off"
        )
    return KeyDoor(store, is_needed=is_needed, price=Price(*options.prices), keep_days=options.usage_days)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.  Names but `localhost` may mean anything."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class KeyDoor:
    """Lets keys in, under their limits.

    Attributes:
        store, ledger, meters, price: where accounts, usage and limits are, and the price of those who have none.

    Args:
        is_needed: nobody comes in without a key; else strangers do, and only keys and accounts are closed to them.
        clock: seconds that never go back.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        *,
        is_needed: bool,
        price: Price | None = None,
        keep_days: int = 0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.is_needed, self.price = store, is_needed, price or Price()
        self.ledger, self.meters = Ledger(store, keep_days, wall=wall), Meters(clock)
        self.clock, self.wall = clock, wall
        self._known: dict[str, tuple[float, Known]] = {}
        self._version = 0
        self._used: dict[str, float] = {}  # when each key's use was last written down

    async def caller(self, presented: str | None) -> Caller:
        """Whose key that is.

        Raises:
            Refused: 401, or 503 where the store does not answer.
        """
        secret = read_secret(KEY, presented) if presented else None
        known = await self.known(secret.id) if secret else None
        digest = secret.digest if secret else NOBODYS
        now = self.wall()
        # The same comparisons whether or not there is such a key.
        is_now = is_same(digest, known.digest if known else NOBODYS)
        is_old = is_same(digest, (known.old_digest if known else None) or NOBODYS)
        until = (known.key.old_until if known else None) or 0
        is_right = known is not None and (is_now or (is_old and now < until))
        state = known.state(now) if known else ""
        if known is None or not is_right or state != "active":
            if not self.is_needed:
                return UNKNOWN
            raise _refusal(presented, known if is_right else None, state)
        self._note_use(known, now)
        key = known.key
        return Caller(key.id, key.account, key.name, key.scopes, known.salt)

    async def enter(self, caller: Caller, request: str, prompt_tokens: int, max_tokens: int) -> Ticket:
        """Admit a request under the limits of its key, of the keys that one was made with, and of its account.

        Raises:
            Refused: 400 (a prompt that never fits), 401 (revoked meanwhile), 402, 429, 503.
        """
        levels: list[Level] = []
        price, month = self.price, day_of(self.wall())[:7]
        if caller.key:
            known = await self.known(caller.key)
            if known is None or known.state(self.wall()) != "active":
                raise _refusal(caller.key, None, "")
            levels, price = levels_of(known), known.price or price
        settled = self.meters.stale(levels, month)
        if settled is not None:
            was_spent = await self.store.reading(lambda connection: spent(connection, caller.account, month))
            self.meters.read(levels, month, was_spent, settled)
        hold = self.meters.enter(levels, prompt_tokens, price.at_most(prompt_tokens, max_tokens), month)
        return KeyTicket(self.ledger, caller, price, hold)

    async def known(self, key_id: str) -> Known | None:
        """A key, as it was within the last seconds; after a change in this process, as it is."""
        now = self.clock()
        found = self._known.get(key_id)
        if found and now < found[0]:
            return found[1]
        version = self._version
        known = await self.store.reading(lambda connection: book.known(connection, key_id))
        if known and version == self._version:  # else it may have been read before that change
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key_id] = (now + KNOWN_S, known)
        return known

    def forget(self) -> None:
        """Something was changed: look everything up again."""
        self._version += 1
        self._known.clear()

    def close(self) -> None:
        """Write what is to be written."""
        self.store.close()

    def _note_use(self, known: Known, now: float) -> None:
        key_id = known.key.id
        if now - max(self._used.get(key_id, 0), known.key.last_used or 0) < USE_NOTED_S:
            return
        if len(self._used) >= MAX_KNOWN:
            self._used.clear()
        self._used[key_id] = now
        self.store.submit(lambda: self._write_use(key_id, now))

    def _write_use(self, key_id: str, now: float) -> None:
        try:
            self.store.write(lambda connection: book.note_use(connection, key_id, now))
        except (Refused, DBAPIError) as error:
            log.warning("when a key was last used was not written: %s", error)


class KeyTicket:
    """An admitted request."""

    def __init__(self, ledger: Ledger, caller: Caller, price: Price, hold: Hold) -> None:
        self._ledger, self._caller, self._price, self._hold = ledger, caller, price, hold
        self.headers: Mapping[str, str] = hold.headers

    async def settle(self, entry: Entry) -> None:
        """Write its line, and give back what it held.

        What failed, and what ended before its first token, costs nothing.

        Raises:
            EngineError: the line could not be written.
        """
        is_billed = entry.status != "error" and entry.first_token_ms is not None
        cost = self._price.of(entry.usage) if is_billed else 0
        try:
            await self._ledger.write(Line(entry, self._caller.account, self._caller.key, self._price, cost))
        finally:
            self._hold.leave(entry.usage.completion_tokens, cost, day_of(entry.started)[:7])


def levels_of(known: Known) -> list[Level]:
    """Where a key's requests are counted."""
    keys = [Level(k.id, f"the key {k.name!r}", k.limits) for k in (known.key, *known.ancestors)]
    return [*keys, Level(known.account.id, f"the account {known.account.name!r}", known.account.limits)]


def _refusal(presented: str | None, proven: Known | None, state: str) -> Refused:
    """Why it is not let in.  More than "not valid" is only told to whoever has the key's secret."""
    if not presented:
        message = "a key is needed, as Authorization: Bearer KEY or x-api-key: KEY"
    elif proven is None:
        message = "this key is not valid here; check that it was copied whole, or ask for a new one"
    elif state == "expired":
        ends = [k.expires for k in (proven.key, *proven.ancestors) if k.expires is not None]
        message = f"this key expired at {iso(min(ends))}; ask for a new one"
    elif state == "closed":
        message = "the account of this key is closed; ask whoever runs the server to open it"
    else:
        message = "this key is revoked; ask for a new one"
    return Refused(401, message, headers={"WWW-Authenticate": "Bearer"})
