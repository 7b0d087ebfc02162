"""Sessions over HTTP: conversations and texts that stay computed, to be gone on with, forked, cut back and saved."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome.answer import TextReader
from pyrosome.engine.request import Request as EngineRequest
from pyrosome.errors import RequestError
from pyrosome.server import session_schema as schema
from pyrosome.server.caller import GENERATE, SESSIONS, Caller
from pyrosome.server.exchange import Asked
from pyrosome.server.open_sessions import Sessions
from pyrosome.server.openai_chat import ChatShape, chat_form
from pyrosome.server.openai_text import MODE, TextShape
from pyrosome.server.openapi import described
from pyrosome.server.problems import Refused
from pyrosome.server.routes import add, answered, body_of, caller_of, chat_asked, priority_of, service_of
from pyrosome.server.session_files import TYPE, Download, receive_file
from pyrosome.server.session_state import ID_BYTES, Hold, Session, json_bytes
from pyrosome.server.session_store import CHAT, TEXT, Conversation
from pyrosome.server.session_turn import ChatTurn, TextTurn
from pyrosome.server.shape import as_json
from pyrosome.server.state import state_folder
from pyrosome.server.text_request import TextPrompt, TextRequest, text_request

log = logging.getLogger(__name__)

GENERATED = "/v1/sessions/{id}/generate"  # the path in the ledger and the log, where each id would be another
PAGE, MAX_PAGE = 20, 100
_STATUSES = (400, 401, 403, 404, 408, 409, 410, 413, 415, 429, 500, 503)
_GENERATING = (400, 401, 402, 403, 404, 408, 409, 410, 413, 415, 429, 500, 503, 504)
_QUERY = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}},
    {"name": "after", "in": "query", "schema": {"type": "string"}, "description": "The id that the page follows."},
]
_FILE = {"required": True, "content": {TYPE: {"schema": {"type": "string", "format": "binary"}}}}


def router() -> APIRouter:
    """The routes of sessions."""
    routes = APIRouter(tags=["sessions"])
    one = "/sessions/{session_id}"
    answer = {"type": "object"}
    for path, method, route, summary, about in (
        ("/sessions", "POST", _create, "Open a session", described(schema.CREATE, ok=schema.SESSION)),
        ("/sessions", "GET", _list, "List one's sessions", _without_body(schema.LIST, {"parameters": _QUERY})),
        ("/sessions/import", "POST", _import, "Open an exported session",
         _without_body(schema.SESSION, {"requestBody": _FILE})),
        (one, "GET", _show, "Show a session", _without_body(schema.SESSION)),
        (one, "DELETE", _delete, "Delete a session", _without_body(answer)),
        (f"{one}/extend", "POST", _extend, "Append to a session", described(schema.EXTEND, ok=schema.SESSION)),
        (f"{one}/generate", "POST", _generate, "Answer in a session", described(schema.GENERATE)),
        (f"{one}/rewind", "POST", _rewind, "Take back the last of a session", described(schema.REWIND, ok=answer)),
        (f"{one}/fork", "POST", _fork, "Make a second of a session", described(schema.NAMED, ok=schema.SESSION)),
        (f"{one}/save", "POST", _save, "Save a session", described(schema.NAMED, ok=schema.SESSION)),
        (f"{one}/export", "GET", _export, "Download a session", _without_body({"type": "string", "format": "binary"})),
    ):  # fmt: skip
        statuses = _GENERATING if route is _generate else _STATUSES
        errors = described({}, statuses=statuses)["responses"]
        about = {**about, "responses": {**errors, 200: about["responses"][200]}}
        add(routes, ("/v1" + path, path), route, method, summary=summary, **about)
    return routes


def sessions_of(request: Request) -> Sessions:
    """The sessions of an app; saved ones are looked for when they are first asked for.

    Raises:
        Refused: 503, there is no place to save them in.
    """
    state, service = request.app.state, service_of(request)
    if not hasattr(state, "sessions"):
        try:
            state.sessions = Sessions(service, state_folder(service.options) / "sessions")
        except RequestError as error:
            log.error("no sessions: %s", error)
            raise Refused(503, "sessions cannot be kept here: the server's state folder cannot be used") from None
    found: Sessions = state.sessions
    return found


async def _create(request: Request) -> Response:
    """An empty conversation, one that begins with messages, or a text."""
    caller, sessions = await caller_of(request, SESSIONS), sessions_of(request)
    body = await body_of(request)
    given = schema.one_of(body, "messages", "text", "ids")
    kind = CHAT if given in ("", "messages") else TEXT
    said, ids = Conversation(), []
    if kind == CHAT:
        said = Conversation(schema.messages_of(body.get("messages") or []), schema.settings_of(body))
    else:
        ids = await _ids(request, body, given, begins=True)
    session = await sessions.create(caller, kind, schema.name_of(body.get("name")), said, ids)
    return _answer(sessions, session)


async def _list(request: Request) -> Response:
    """Those open and those saved, the newest first."""
    caller, sessions = await caller_of(request, SESSIONS), sessions_of(request)
    limit, after = request.query_params.get("limit", str(PAGE)), request.query_params.get("after")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= MAX_PAGE:
        raise Refused(400, f"limit is {limit[:40]!r}; a number from 1 to {MAX_PAGE} was expected")
    there = sessions.of(caller)
    if after is not None:
        last = sessions.find(caller, after)
        there = there[there.index(last) + 1 :]
    page, has_more = there[: int(limit)], len(there) > int(limit)
    data = [_view(sessions, s) for s in page]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": has_more})


async def _show(request: Request, session_id: str) -> Response:
    """A session, with its messages."""
    sessions, session = await _named(request, session_id)
    said = session.conversation
    if said is None and session.record:
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # its status says that it cannot be used
            said = await asyncio.to_thread(sessions.store.conversation, session.record)
    said = said or Conversation()
    return _answer(sessions, session, messages=said.messages, settings=said.settings)


async def _delete(request: Request, session_id: str) -> Response:
    """Forget it, its file included."""
    sessions, session = await _named(request, session_id)
    with Hold(session, "delete"):
        await sessions.delete(session)
    return JSONResponse({"id": session.id, "object": "session.deleted", "deleted": True})


async def _extend(request: Request, session_id: str) -> Response:
    """Messages, text or ids, to be computed with the next turn."""
    sessions, session, body = await _asked(request, session_id)
    given = schema.one_of(body, "messages", "text", "ids")
    if not given or (given == "messages") != (session.kind == CHAT):
        fit = "messages" if session.kind == CHAT else "text or ids"
        raise Refused(400, f"{given or 'nothing'} was sent, and the session is of kind {session.kind!r}; send {fit}")
    with Hold(session, "extend"):
        await sessions.present(session)
        if given == "messages":
            said = session.said
            more = Conversation([*said.messages, *schema.messages_of(body["messages"])], said.settings)
            sessions.check_size(more)
            await sessions.grow(session, json_bytes(more) - session.conversation_bytes)
            session.say(more)
        else:
            await sessions.align(session)
            ids = await _ids(request, body, given, begins=not session.length)
            await sessions.grow(session, ID_BYTES * len(ids))
            session.length = await sessions.call(session, "session_extend", ids=ids)
        session.is_changed = True
    return _answer(sessions, session)


async def _rewind(request: Request, session_id: str) -> Response:
    """Take back the last messages of a conversation, or the last tokens of a text."""
    sessions, session, body = await _asked(request, session_id)
    given = schema.one_of(body, "messages", "tokens")
    if given != ("messages" if session.kind == CHAT else "tokens"):
        fit = "messages" if session.kind == CHAT else "tokens"
        raise Refused(400, f"a session of kind {session.kind!r} is cut back by {fit}; send how many")
    num = body[given]
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise Refused(400, f"{given} is {num!r}; a number from 1 was expected")
    again: dict[str, Any] = {}
    with Hold(session, "rewind"):
        await sessions.present(session)
        if given == "messages":
            said = session.said
            if num > len(said.messages):
                raise Refused(400, f"{num} messages were to be taken back and the session has {len(said.messages)}")
            session.say(Conversation(said.messages[:-num], said.settings))
            session.is_changed = True
        else:
            again["tokens_to_compute"] = await sessions.rewind_tokens(session, num)
    return _answer(sessions, session, **again)


async def _fork(request: Request, session_id: str) -> Response:
    """A second session with the same past; nothing is copied before one of the two goes on."""
    sessions, session, body = await _asked(request, session_id)
    name = schema.name_of(body.get("name"))
    with Hold(session, "fork"):
        twin = await sessions.fork(session, name)
    return _answer(sessions, twin)


async def _save(request: Request, session_id: str) -> Response:
    """Write it to the server's disk: it outlives the server from then on."""
    sessions, session, body = await _asked(request, session_id)
    name = body.get("name")
    with Hold(session, "save"):
        await sessions.save(session, None if name is None else schema.name_of(name))
    return _answer(sessions, session)


async def _export(request: Request, session_id: str) -> Response:
    """The session as a file, to be kept elsewhere or imported into another server of the same model."""
    sessions, session = await _named(request, session_id)
    with contextlib.ExitStack() as held:
        held.enter_context(sessions.transfer(session.account))
        with Hold(session, "export"):
            file, size = await sessions.export(session)
        return Download(file, size, f"{session.id}.session", held.pop_all())


async def _import(request: Request) -> Response:
    """A file that was exported here or by another server of the same model; `?name=` names the session."""
    caller, sessions = await caller_of(request, SESSIONS), sessions_of(request)
    name = schema.name_of(request.query_params.get("name"))
    with sessions.transfer(caller.account):
        room = sessions.room_on_disk(caller.account)
        path = sessions.store.new_upload()
        try:
            await receive_file(request, path, room, service_of(request).options.body_s)
            session = await sessions.take(caller, path, name)
        finally:
            path.unlink(missing_ok=True)
    return _answer(sessions, session)


async def _generate(request: Request, session_id: str) -> Response:
    """Answer new messages, or go on with a text; what is said becomes part of the session."""
    caller = await caller_of(request, GENERATE)
    sessions, session, body = await _asked(request, session_id)
    hold = Hold(session, "generate")
    try:
        await sessions.present(session)
        turn = _chat if session.kind == CHAT else _text
        reply = await turn(request, body, caller, sessions, session, hold)
    except BaseException:
        hold.release()
        raise
    reply.headers["x-pyrosome-session"] = session.id
    return reply


async def _chat(
    request: Request, body: dict[str, Any], caller: Caller, sessions: Sessions, session: Session, hold: Hold
) -> Response:
    service, said = service_of(request), session.said
    if body.get("n") not in (None, 1):
        raise Refused(400, f"a session goes on in one way and n is {body['n']!r}; fork it for more")
    new = schema.messages_of(body.get("messages") or [])
    more = Conversation([*said.messages, *new], said.settings)
    sessions.check_size(more)
    await sessions.grow(session, json_bytes(more) - session.conversation_bytes)
    if body.get("continue_final_message") or (new and new[-1].get("prefix")):
        raise Refused(400, "a session's answers are whole and cannot be begun for it; use /v1/chat/completions")
    whole = schema.with_settings({**body, "messages": more.messages}, said.settings)
    form = chat_form(service, whole)
    prompt, asked = await chat_asked(request, whole, caller, "chat_completions", "chatcmpl-", salt=session.cache_salt)
    asked = dataclasses.replace(asked, path=GENERATED, body=body)
    exchange = ChatTurn(service, asked, sessions, session, hold, new)
    shape = ChatShape(exchange, form.of(prompt), service.chat.tokenizer)
    return await answered(exchange, shape, stream=prompt.stream, mode=prompt.mode)


async def _text(
    request: Request, body: dict[str, Any], caller: Caller, sessions: Sessions, session: Session, hold: Hold
) -> Response:
    service = service_of(request)
    model = service.name_for(body.get("model"))
    wanted = await asyncio.to_thread(_text_wanted, request, body, session)
    new = wanted.prompts[0].ids
    reader = TextReader(service.chat.tokenizer, wanted.params, session.length + len(new))
    asked = EngineRequest(
        service.new_id("cmpl-"), new, wanted.params, priority=priority_of(body), salt=session.cache_salt,
        constraint=wanted.constraint, progress=True,
    )  # fmt: skip
    exchange = TextTurn(
        service, Asked(asked, (reader,), caller, GENERATED, "completions", model, MODE, body), sessions, session, hold
    )
    shape = TextShape([exchange], wanted, service.chat.tokenizer)
    return await answered(exchange, shape, stream=wanted.stream, mode=MODE)


def _text_wanted(request: Request, body: dict[str, Any], session: Session) -> TextRequest:
    """A completions body read, whose prompt is what is new, if anything is."""
    for name, usual in (("n", 1), ("echo", False), ("suffix", None), ("prompt_logprobs", None)):
        if body.get(name) not in (None, usual):
            raise Refused(400, f"{name} is {body[name]!r}, which a session does not take; use /v1/completions")
    has_new = body.get("prompt") not in (None, "", [])
    if not has_new and not session.length:
        raise Refused(400, "the session is empty; send a prompt, or extend it before")
    given = {**body, "prompt": body["prompt"] if has_new else " "}
    if session.length:
        given["add_special_tokens"] = False  # it has begun already
    wanted = text_request(service_of(request), given)
    if len(wanted.prompts) != 1 or not wanted.max_tokens:
        raise Refused(400, "a session takes one prompt, and says at least one token")
    return wanted if has_new else dataclasses.replace(wanted, prompts=(TextPrompt((), slice(0, 0)),))


async def _named(request: Request, session_id: str) -> tuple[Sessions, Session]:
    caller = await caller_of(request, SESSIONS)
    sessions = sessions_of(request)
    return sessions, sessions.find(caller, session_id)


async def _asked(request: Request, session_id: str) -> tuple[Sessions, Session, dict[str, Any]]:
    """As `_named`, with the body; there need be none."""
    caller, headers = await caller_of(request, SESSIONS), request.headers
    is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    body = {} if is_empty else await body_of(request)
    sessions = sessions_of(request)
    return sessions, sessions.find(caller, session_id), body


async def _ids(request: Request, body: dict[str, Any], given: str, *, begins: bool) -> list[int]:
    """The ids of a body's text or ids; a text that begins a session has the beginning-of-sentence id before it."""
    if given == "ids":
        return schema.ids_of(body["ids"])
    if not isinstance(body["text"], str):
        raise Refused(400, f"text is {type(body['text']).__name__}; text was expected")
    service = service_of(request)
    ids = await asyncio.to_thread(service.chat.tokenizer.encode, body["text"])
    return [service.card.begin_token, *ids] if begins else ids


def _view(sessions: Sessions, session: Session) -> dict[str, Any]:
    """A session as its owner sees it."""
    record, fault = session.record, sessions.fault(session)
    return {
        "id": session.id,
        "object": "session",
        "created": session.created,
        "name": session.name,
        "kind": session.kind,
        "status": "open" if session.engine_id else "unusable" if fault else "saved",
        "busy": bool(session.doing),
        "tokens": session.length,
        "num_messages": session.num_messages,
        "bytes": record.bytes if record else 0,
        "saved": record.saved if record else None,
        "changed": session.is_changed,
        **({"fault": fault} if fault else {}),
    }


def _answer(sessions: Sessions, session: Session, **more: Any) -> Response:
    return Response(as_json({**_view(sessions, session), **more}), media_type="application/json")


def _without_body(ok: dict[str, Any], extra: dict[str, Any] | None = None) -> dict[str, Any]:
    about = described({}, ok=ok)
    return {**about, **({"openapi_extra": extra} if extra else {})}
