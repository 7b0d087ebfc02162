"""What every generating route does: who asks, what, is it admitted, and then the reply."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from pyrosome.answer import ChatReader, chat_request
from pyrosome.chat.prompt import Prompt
from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams
from pyrosome.server.bodies import read_json
from pyrosome.server.caller import GENERATE, Caller
from pyrosome.server.exchange import Asked, Exchange
from pyrosome.server.group import Group
from pyrosome.server.problems import Refused
from pyrosome.server.reply import Reply
from pyrosome.server.service import Service
from pyrosome.server.shape import Shape

SEED_BITS = 53  # a seed of ours is echoed as a JSON number, and JavaScript has no larger integers
LONGEST_SALT = 128  # characters that a client's part of a salt has as it is
LONGEST_STOP = 4096  # characters of a stop string: so many are looked through with each token


def service_of(request: Request) -> Service:
    """The service behind an app."""
    found: Service = request.app.state.service
    return found


async def caller_of(request: Request, scope: str) -> Caller:
    """Who asks; their key may be in `Authorization: Bearer`, `x-api-key` or `api-key`.

    Raises:
        Refused: 400, 401, 403.
    """
    caller = await service_of(request).door.caller(presented_key(request.headers))
    if scope not in caller.scopes:
        if not caller.key:
            message = f"this needs a key with the scope {scope!r}, as Authorization: Bearer KEY; none is known of you"
            raise Refused(401, message, headers={"WWW-Authenticate": "Bearer"})
        raise Refused(403, f"this key may not do that; it needs the scope {scope!r}")
    return caller


def presented_key(headers: Headers) -> str | None:
    """The key in a request's headers.  Whatever could be read in two ways is refused: a proxy may read the other one.

    Raises:
        Refused: 400, a header is there twice, or two headers hold different keys.
    """
    found: set[str] = set()
    for name in ("authorization", "x-api-key", "api-key"):
        values = headers.getlist(name)
        if len(values) > 1:
            raise Refused(400, f"the header {name} is there {len(values)} times; send it once")
        for value in values:
            if name == "authorization":
                kind, _, value = value.partition(" ")
                value = value if kind.lower() == "bearer" else ""
            if value.strip():
                found.add(value.strip())
    if len(found) > 1:
        raise Refused(400, "two different keys were sent, in Authorization, x-api-key or api-key; send one")
    return next(iter(found), None)


async def body_of(request: Request) -> dict[str, Any]:
    """The request's JSON object."""
    options = service_of(request).options
    return await read_json(request, options.max_body_bytes, options.body_s)


def paths(suffix: str) -> list[str]:
    """A route's path and its aliases: the first is the one in the OpenAPI document."""
    return [prefix + suffix for prefix in ("/v1", "", "/beta", "/beta/v1")]


def add(
    routes: APIRouter, aliases: Sequence[str], route: Callable[..., Any], method: str = "POST", **about: Any
) -> None:
    """One route at several paths; the first is the one in the OpenAPI document, as `about` describes it."""
    for n, path in enumerate(aliases):
        routes.add_api_route(path, route, methods=[method], include_in_schema=n == 0, **about)


def params_of(service: Service, prompt: Prompt, body: dict[str, Any]) -> SamplingParams:
    """How a chat request chooses its tokens: the template's reading of it, and what only this server takes.

    A request without a seed gets one, so that it can be told and repeated.
    """
    check_stops(prompt.stop)
    limit = min(prompt.max_tokens, max(1, service.card.context_tokens - len(prompt.ids)))
    changes: dict[str, Any] = {"max_tokens": limit}
    if prompt.sampling.seed is None:
        changes["seed"] = random.getrandbits(SEED_BITS)
    if not service.chat.compat:
        for name in ("stop_token_ids", "ignore_eos", "max_repeats", "n", "prompt_logprobs", "min_tokens"):
            if body.get(name) is not None:
                changes[name] = body[name]
        budget = thinking_budget(body)
        if budget is not None:
            changes["max_thinking_tokens"] = budget
    return prompt.sampling_params(**changes)


def check_stops(stops: Sequence[str]) -> None:
    """Refuse a stop string that is too long to be looked for.

    Raises:
        Refused: 400.
    """
    if (longest := max(map(len, stops), default=0)) > LONGEST_STOP:
        raise Refused(400, f"stop holds a string of {longest:,} characters; up to {LONGEST_STOP:,} are looked for")


def of_one_answer(body: dict[str, Any]) -> dict[str, Any]:
    """The body without several answers and a prompt's log probabilities, which not every protocol has words for."""
    return {k: v for k, v in body.items() if k not in ("n", "prompt_logprobs")}


def thinking_budget(body: dict[str, Any]) -> int | None:
    """Tokens of thought a request allows, by any of its spellings."""
    if body.get("thinking_budget") is not None:
        return body["thinking_budget"]  # type: ignore[no-any-return]  # its type is checked where it is used
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and thinking.get("budget_tokens") is not None:
        return thinking["budget_tokens"]  # type: ignore[no-any-return]
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("thinking_budget") is not None:
        return kwargs["thinking_budget"]  # type: ignore[no-any-return]
    return None


async def chat_exchange(
    request: Request, body: dict[str, Any], caller: Caller, protocol: str, id_prefix: str, **changes: Any
) -> tuple[Prompt, Exchange]:
    """An exchange for a chat request in one of the template's protocols, not opened yet."""
    prompt, asked = await chat_asked(request, body, caller, protocol, id_prefix, **changes)
    return prompt, Exchange(service_of(request), asked)


async def chat_asked(
    request: Request, body: dict[str, Any], caller: Caller, protocol: str, id_prefix: str, **changes: Any
) -> tuple[Prompt, Asked]:
    """A chat request as it is understood, in one of the template's protocols."""
    service = service_of(request)
    model = service.name_for(body.get("model"))
    salt = salt_of(caller, body)
    prompt = await service.render(body, protocol, salt)
    params = params_of(service, prompt, body)
    asked = chat_request(
        service.new_id(id_prefix), prompt, service.chat, params, context=service.card.context_tokens,
        **{"salt": salt, "progress": True, "priority": priority_of(body), **changes},
    )  # fmt: skip
    readers = tuple(ChatReader(service.chat, prompt, service.card.end_token) for _ in range(params.n))
    return prompt, Asked(asked, readers, caller, request.url.path, protocol, model, prompt.mode, body)


def salt_of(caller: Caller, body: dict[str, Any]) -> str:
    """Whose prefixes a request may share: the account's, or one part of them that the client names.

    An account's own salt has neither "/" nor "#", so no name reaches another account's.
    """
    user = body.get("user_id")
    metadata = body.get("metadata")
    if user is None and isinstance(metadata, dict):
        user = metadata.get("user_id")
    named = body.get("cache_salt") or user
    if not isinstance(named, str) or not named:
        return caller.salt
    if len(named) <= LONGEST_SALT and named.isascii():
        return f"{caller.salt}/{named}"
    # It is kept for as long as anything is that was computed under it, and half of a surrogate pair cannot travel.
    return f"{caller.salt}#{hashlib.sha256(named.encode(errors='surrogatepass')).hexdigest()}"


def priority_of(body: dict[str, Any]) -> int:
    """The priority a client asks for; only lower than usual, so that nobody passes others by asking.

    Raises:
        Refused: it is no integer.
    """
    value = body.get("priority")
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(400, f"priority is {value!r}; an integer was expected")
    return max(-100, min(0, value))


async def answered(exchange: Exchange | Group, shape: Shape, *, stream: bool, mode: str) -> Response:
    """Open the exchange and answer with it.

    Raises:
        Refused, RequestError: it was not taken.
    """
    await exchange.open()
    headers = {"x-request-id": exchange.id, "x-pyrosome-mode": mode, **exchange.limit_headers}
    if (seed := exchange.outcome.seed) is not None:
        headers["x-pyrosome-seed"] = str(seed)
    if estimate := exchange.outcome.first_token_estimate_s:
        headers["x-pyrosome-first-token-estimate-ms"] = f"{estimate * 1000:.0f}"
    headers["x-pyrosome-fingerprint"] = exchange.outcome.fingerprint[:16]
    return Reply(exchange, shape, stream=stream, headers=headers)


async def rendered(
    request: Request, protocol: str, check: Callable[[Service, dict[str, Any]], object] | None = None
) -> Response:
    """What a body would be rendered to: `{prompt, token_ids, sampling}`; nothing is generated.

    Args:
        check: raises what the generating route would find wrong with the body beside the template's reading.
    """
    caller = await caller_of(request, GENERATE)
    body = await body_of(request)
    service = service_of(request)
    if check:
        check(service, body)
    service.name_for(body.get("model"))
    prompt = await service.render(body, protocol, salt_of(caller, body))
    params = params_of(service, prompt, body)
    constraint = dataclasses.asdict(prompt.constraint) if prompt.constraint else None
    return JSONResponse(
        {
            "prompt": prompt.text,
            "token_ids": list(prompt.ids),
            "sampling": {**dataclasses.asdict(params), "stop": list(prompt.stop)},
            "mode": prompt.mode,
            "constraint": constraint,
            "starts_in": prompt.start,
            "continues": prompt.continues,
            "salt": bool(caller.salt),
        }
    )


def must_be_bool(body: dict[str, Any], name: str) -> bool:
    """A flag of a body.

    Raises:
        RequestError: it is none.
    """
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; true or false was expected")
    return value
