"""Sessions: sequences that stay, to be extended, forked, cut back, saved and found again."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyrosome.cache.store import open_session, save_session
from pyrosome.engine.request import Request
from pyrosome.engine.runner import Sequence, check_ids
from pyrosome.engine.track import Track
from pyrosome.errors import ContextTooLong, RequestError, SessionBusy, UnknownSession

if TYPE_CHECKING:
    from pyrosome.engine.engine import Engine


@dataclasses.dataclass(eq=False)
class Session:
    """A track that outlives its requests."""

    track: Track
    before: int | None = None  # ids there were when the request that runs now began; None: none runs
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # the caller's plain data, from its file

    @property
    def is_busy(self) -> bool:
        """Whether a request is generating in it."""
        return self.before is not None

    def begin(self, request: Request) -> Track:
        """Append a request's ids and generate from there."""
        self.before = len(self.track.ids)
        self.track.append(request.ids)
        return self.track

    def finish(self, engine: Engine, *, failed: bool) -> None:
        """The request has ended: what it said stays, unless it failed, when all is as it was before."""
        assert self.before is not None
        if failed:
            engine.home.drop(self.track)
            engine.home.rewind(self.track, self.before)
        self.before = None


def find(engine: Engine, session_id: str) -> Session:
    """The session of that id, if nothing is generating in it.

    Raises:
        RequestError: there is none, or it is busy.
    """
    session = _known(engine, session_id)
    if session.is_busy:
        raise SessionBusy(f"session {session_id} is generating; wait for its end, or fork it before")
    return session


def _known(engine: Engine, session_id: str) -> Session:
    session = engine.sessions.get(session_id)
    if session is None:
        raise UnknownSession(f"there is no session {session_id!r}; open one, or restore it from its file")
    return session


def call(engine: Engine, name: str, arguments: dict[str, Any]) -> Any:
    """Run an operation by name."""
    operation = _OPERATIONS.get(name)
    if operation is None:
        raise RequestError(f"there is no operation {name!r}; there are {', '.join(sorted(_OPERATIONS))}")
    return operation(engine, **arguments)


def _register(engine: Engine, track: Track) -> str:
    session_id = uuid.uuid4().hex
    engine.sessions[session_id] = Session(track)
    return session_id


def _open(engine: Engine, ids: list[int] | tuple[int, ...] = (), salt: str = "") -> str:
    session_id = _register(engine, engine.home.new_track([], salt))
    _extend(engine, session_id, ids)
    return session_id


def _extend(engine: Engine, session: str, ids: list[int] | tuple[int, ...]) -> int:
    track = find(engine, session).track
    if ids:
        check_ids(list(ids), engine.config.vocab_size)
        if len(track.ids) + len(ids) > engine.max_context:
            raise ContextTooLong(len(track.ids) + len(ids), engine.max_context, "rewind the session, or open another")
        track.append(ids)
    return len(track.ids)


def _ids(engine: Engine, session: str) -> list[int]:
    return list(find(engine, session).track.ids)


def _length(engine: Engine, session: str) -> int:
    """Ids there are, those of a request that runs included."""
    return len(_known(engine, session).track.ids)


def _list(engine: Engine) -> dict[str, dict[str, Any]]:
    """Every session: its tokens, whether a request is generating in it, and whether it is in the cache now."""
    return {
        name: {"tokens": len(s.track.ids), "is_busy": s.is_busy, "is_present": s.track.sequence is not None}
        for name, s in engine.sessions.items()
    }


def _fork(engine: Engine, session: str) -> str:
    return _register(engine, engine.home.fork(find(engine, session).track))


def _rewind(engine: Engine, session: str, num_tokens: int) -> int:
    """Take the last `num_tokens` back; returns how many tokens the next turn computes again to go on from there."""
    track = find(engine, session).track
    if not 0 <= num_tokens <= len(track.ids):
        raise RequestError(f"{num_tokens} tokens were to be taken back and the session has {len(track.ids)}")
    return engine.home.rewind(track, len(track.ids) - num_tokens)


def _save(engine: Engine, session: str, path: str, notes: dict[str, Any] | None = None) -> int:
    track = find(engine, session).track
    sequence = _present(engine, track)
    return save_session(
        path, engine.runner.pool, sequence.holding.pages, track.ids, engine.runner.snapshot(sequence),
        fingerprint=engine.fingerprint, extra=notes,
    )  # fmt: skip


def _restore(engine: Engine, path: str, salt: str = "") -> str:
    saved = open_session(path, fingerprint=engine.fingerprint, max_context=engine.max_context)
    if saved.ids:
        check_ids(saved.ids, engine.config.vocab_size)
    track = engine.home.new_track(list(saved.ids), salt)
    track.sequence = Sequence(engine.runner.pool.open())
    try:
        if not engine.home.make_room(track, saved.length, engine.park_idle):
            raise RequestError(f"{saved.length} tokens of {path} find no room beside what is running; try again later")
        engine.runner.restore(track.sequence, saved.load(engine.runner.pool, track.sequence.holding))
    except BaseException:
        engine.home.drop(track)
        raise
    engine.home.settle(track, track.length)
    session_id = _register(engine, track)
    engine.sessions[session_id].notes = saved.about.extra
    return session_id


def _notes(engine: Engine, session: str) -> dict[str, Any]:
    return find(engine, session).notes


def _present(engine: Engine, track: Track) -> Sequence:
    """The track's place in the cache, brought in if need be."""
    set_aside = functools.partial(engine.park_idle, but=track)
    if track.sequence is None and engine.home.bring_in(track, set_aside) is None:
        raise RequestError("the session finds no room beside what is running; try again later")
    assert track.sequence is not None
    return track.sequence


def _close(engine: Engine, session: str) -> None:
    engine.home.drop(find(engine, session).track)
    del engine.sessions[session]


def _about(engine: Engine) -> dict[str, Any]:
    """What a client may know of the engine before it asks anything."""
    return {
        "fingerprint": engine.fingerprint,
        "max_context": engine.max_context,
        "max_sequences": engine.options.max_sequences,
        "drafter": type(engine.drafter).__name__,
        "max_drafts": engine.drafter.max_drafts,
        "cache_bytes": engine.options.cache_bytes,
        "kv_format": engine.runner.pool.kv_format,
        "numerics": engine.runner.model.numerics.name,
        "vocab_size": engine.config.vocab_size,
    }


def _known_tokens(engine: Engine, ids: list[int] | tuple[int, ...], salt: str = "") -> int:
    """How many tokens of a prompt would not have to be computed now."""
    return engine.tree.match(ids, salt, len(ids) - 1).length


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "session_open": _open,
    "session_extend": _extend,
    "session_ids": _ids,
    "session_length": _length,
    "session_list": _list,
    "session_fork": _fork,
    "session_rewind": _rewind,
    "session_save": _save,
    "session_restore": _restore,
    "session_notes": _notes,
    "session_close": _close,
    "stats": lambda engine: engine.current_stats(),
    "about": _about,
    "known_tokens": _known_tokens,
}
