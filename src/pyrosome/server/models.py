"""What is served, and its tokenizer: `/v1/models`, `/tokenize`, `/detokenize`, `/tokenizer_info`, `/plan`."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pyrosome.server.caller import GENERATE
from pyrosome.server.openapi import described
from pyrosome.server.plan import planned
from pyrosome.server.problems import Refused
from pyrosome.server.routes import add, body_of, caller_of, must_be_bool, paths, salt_of, service_of
from pyrosome.server.service import Service

MODES = ("off", "low", "high", "max")

_TOKENIZE = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string", "description": "Text to encode; `text` is the same."},
        "text": {"type": "string"},
        "messages": {
            "type": "array",
            "items": {"type": "object"},
            "description": "Instead of text: a conversation, with any field of a chat completion.",
        },
        "add_special_tokens": {
            "type": "boolean",
            "description": "Whether the text gets the beginning-of-sentence token, as a completion's prompt does.",
        },
        "parse_special": {
            "type": "boolean",
            "description": "Whether control tokens spelled out in the text count as such. Nowhere else do they.",
        },
        "return_token_strs": {"type": "boolean"},
    },
}  # fmt: skip
_DETOKENIZE = {
    "type": "object",
    "properties": {"tokens": {"type": "array", "items": {"type": "integer"}}},
    "required": ["tokens"],
}
_PUBLIC = (401, 403, 404, 500, 503)


def router() -> APIRouter:
    """The routes about the model itself."""
    routes = APIRouter(tags=["model"])
    gets: dict[str, Callable[..., Any]] = {"/models": _list, "/models/{model:path}": _one}
    for suffix, route in gets.items():
        add(routes, [*paths(suffix), "/anthropic/v1" + suffix], route, "GET", **described({}, statuses=_PUBLIC))
    for suffix, post, schema in (("/tokenize", _tokenize, _TOKENIZE), ("/detokenize", _detokenize, _DETOKENIZE)):
        add(routes, (suffix, "/v1" + suffix), post, **described(schema))
    about = described({}, statuses=_PUBLIC)
    add(routes, ("/tokenizer_info", "/v1/tokenizer_info"), _tokenizer_info, "GET", **about)
    routes.add_api_route("/plan", _plan, methods=["GET"], **described({}, statuses=_PUBLIC))
    return routes


async def _list(request: Request) -> Response:
    """The model, under each of its names, in a shape that OpenAI's and Anthropic's clients both read."""
    await caller_of(request, GENERATE)
    service = service_of(request)
    data = [_model(service, name) for name in service.card.names]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": data, **ends})


async def _one(request: Request, model: str) -> Response:
    """The model by its name."""
    await caller_of(request, GENERATE)
    service = service_of(request)
    if model not in service.card.names:
        known = ", ".join(service.card.names)
        raise Refused(404, f"there is no model {model!r} here; there is {known}", code="model_not_found")
    return JSONResponse(_model(service, model))


def _model(service: Service, name: str) -> dict[str, Any]:
    card = service.card
    created = datetime.datetime.fromtimestamp(card.created, datetime.UTC)
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "pyrosome",
        "root": card.name,
        "parent": None,
        "max_model_len": card.context_tokens,
        "context_window": card.context_tokens,
        "default_mode": card.mode,
        "modes": list(MODES),
        "dialect": card.dialect,
        "fingerprint": card.fingerprint,
        "type": "model",
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
    }


async def _tokenize(request: Request) -> Response:
    """The ids of a text, or of a conversation's prompt."""
    caller = await caller_of(request, GENERATE)
    service, body = service_of(request), await body_of(request)
    tokenizer = service.chat.tokenizer
    if "messages" in body:
        ids = list((await service.render(body, "chat_completions", salt_of(caller, body))).ids)
    else:
        text = body.get("prompt", body.get("text"))
        if not isinstance(text, str):
            raise Refused(400, "a `prompt` (text) or `messages` was expected, and neither was sent")
        special = must_be_bool(body, "parse_special")
        ids = await asyncio.to_thread(tokenizer.encode, text, allow_special=special)
        if must_be_bool(body, "add_special_tokens"):
            ids = [service.card.begin_token, *ids]
    answer = {"count": len(ids), "max_model_len": service.card.context_tokens, "tokens": ids}
    if must_be_bool(body, "return_token_strs"):
        answer["token_strs"] = await asyncio.to_thread(lambda: [tokenizer.decode([i]) for i in ids])
    return JSONResponse(answer)


async def _detokenize(request: Request) -> Response:
    """The text of ids, control tokens spelled out."""
    await caller_of(request, GENERATE)
    service, body = service_of(request), await body_of(request)
    return JSONResponse({"prompt": await asyncio.to_thread(_decoded, service, body.get("tokens"))})


def _decoded(service: Service, ids: Any) -> str:
    """The text of ids, of which there may be millions."""
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise Refused(400, "`tokens` is a list of ids; none was sent")
    wrong = next((i for i in ids if not 0 <= i < service.card.vocab_size), None)
    if wrong is not None:
        raise Refused(400, f"tokens holds {wrong}; this model's ids are 0 to {service.card.vocab_size - 1}")
    return service.chat.tokenizer.decode(ids)


async def _tokenizer_info(request: Request) -> Response:
    """The tokens that begin and end a text, in vLLM's shape: lm-eval takes its tokens from here where it is found."""
    await caller_of(request, GENERATE)
    card, tokenizer = service_of(request).card, service_of(request).chat.tokenizer
    begin, end = (tokenizer.decode([i]) for i in (card.begin_token, card.end_token))
    info = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": None}
    ids = {"bos_token_id": card.begin_token, "eos_token_id": card.end_token}
    return JSONResponse({**info, **ids, "model_max_length": card.context_tokens, "vocab_size": card.vocab_size})


async def _plan(request: Request) -> Response:
    """What this server holds: weights by part, the cache by token and sequence, and the sessions there is room for."""
    await caller_of(request, GENERATE)
    service = service_of(request)
    about = await service.engine.call("about")
    return JSONResponse(await asyncio.to_thread(planned, service, about))
