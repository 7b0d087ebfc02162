"""What a completions request asks for: its prompts as ids, how tokens are chosen, and what is given of them."""

from __future__ import annotations

import dataclasses
import random
from reprlib import repr as shown  # of what a client sent: short, however long or deep it is
from typing import Any

from pyrosome.chat.structured import structured
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.options import Constraint, SamplingParams, require_integer
from pyrosome.server.routes import SEED_BITS, check_stops, must_be_bool
from pyrosome.server.service import Service
from pyrosome.server.unsupported import refuse_unsupported

DEFAULT_TOKENS = 16  # as OpenAI's
MAX_STOPS = 16
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop_token_ids", "stop", "ignore_eos", "max_repeats", "n", "logprobs", "prompt_logprobs", "min_tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt as the engine takes it; `echoed` is the client's own part of it: text before the hole, and no token
    that the server put there."""

    ids: tuple[int, ...]
    echoed: slice


@dataclasses.dataclass(frozen=True, slots=True)
class TextRequest:
    """A completions request, checked."""

    prompts: tuple[TextPrompt, ...]
    params: SamplingParams  # with at least one token, also where none is wanted
    max_tokens: int
    constraint: Constraint | None
    stream: bool
    echo: bool
    usage: bool  # of a stream, in a chunk of its own
    token_ids: bool
    prompt_logprobs: bool  # vLLM's list, beside the one that comes with `echo`


def text_request(service: Service, body: dict[str, Any]) -> TextRequest:
    """A body read.

    Raises:
        RequestError: a field that is missing, of a wrong type or outside its range; the message names it.
        ContextTooLong: a prompt with the tokens asked for is longer than the context.
    """
    refuse_unsupported(body)
    flags = {name: must_be_bool(body, name) for name in ("stream", "echo", "return_token_ids")}
    max_tokens = DEFAULT_TOKENS if body.get("max_tokens") is None else body["max_tokens"]
    require_integer("max_tokens", max_tokens, 0)
    params = _params(body, max_tokens, echoes=flags["echo"])
    if body.get("best_of") not in (None, params.n):
        raise RequestError(
            f"best_of is {body['best_of']!r} and n {params.n}; all that is generated is given: leave it out"
        )
    prompts = _prompts(service, body)
    context = service.card.context_tokens
    for prompt in prompts:
        if len(prompt.ids) + max(1, max_tokens) > context:
            raise ContextTooLong(
                len(prompt.ids) + max(1, max_tokens), context,
                f"the prompt has {len(prompt.ids)}; shorten it, or ask for less",
            )  # fmt: skip
    return TextRequest(
        prompts, params, max_tokens, _constraint(body), flags["stream"], flags["echo"],
        flags["stream"] and _includes_usage(body), flags["return_token_ids"], body.get("prompt_logprobs") is not None,
    )  # fmt: skip


def _params(body: dict[str, Any], max_tokens: int, *, echoes: bool) -> SamplingParams:
    values = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    values.setdefault("seed", random.getrandbits(SEED_BITS))
    params = SamplingParams(max_tokens=max(1, max_tokens), **values)
    if len(params.stop) > MAX_STOPS:
        raise RequestError(f"stop has {len(params.stop)} strings; {MAX_STOPS} at most are looked for")
    check_stops(params.stop)
    if echoes and params.logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))
    return params


def _includes_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RequestError(f"stream_options is {options!r}; an object was expected")
    return must_be_bool(options or {}, "include_usage")


# Prompts


def _prompts(service: Service, body: dict[str, Any]) -> tuple[TextPrompt, ...]:
    given, suffix = body.get("prompt"), body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise RequestError(f"suffix is {shown(suffix)}; text was expected")
    begins = body.get("add_special_tokens") is None or must_be_bool(body, "add_special_tokens")
    prompts = _each(given)
    most = service.gate.num_places + service.gate.max_queue
    if len(prompts) > most:
        raise RequestError(
            f"{len(prompts)} prompts were sent and {most} are taken at once; send them in several requests"
        )
    if suffix is not None:
        if not all(isinstance(p, str) for p in prompts):
            raise RequestError(
                "suffix was sent with a prompt of ids; it goes with text, or write the ids of both yourself"
            )
        return tuple(_with_hole(service, p, suffix, begins=begins) for p in prompts)
    return tuple(_plain(service, p, begins=begins) for p in prompts)


def _each(given: Any) -> list[Any]:
    """The prompts one by one: texts, or lists of ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(map(_is_id, given)):
            return [given]
        is_ids = [isinstance(p, list) and bool(p) and all(map(_is_id, p)) for p in given]
        if all(is_ids) or all(isinstance(p, str) for p in given):
            return given
    raise RequestError(
        f"prompt is {shown(given)}; text, a list of texts, a list of ids or a list of such lists was expected, and "
        "none of the lists empty"
    )


def _plain(service: Service, prompt: Any, *, begins: bool) -> TextPrompt:
    if isinstance(prompt, str):
        first = [service.card.begin_token] if begins else []
        ids = [*first, *service.chat.tokenizer.encode(prompt)]
        return TextPrompt(tuple(ids), slice(len(first), len(ids)))
    size = service.card.vocab_size
    if bad := [i for i in prompt if not 0 <= i < size]:
        raise RequestError(f"prompt holds the id {shown(bad[0])}; ids from 0 to {size - 1} were expected")
    return TextPrompt(tuple(prompt), slice(0, len(prompt)))


def _with_hole(service: Service, prefix: str, suffix: str, *, begins: bool) -> TextPrompt:
    tokenizer = service.chat.tokenizer
    begin, hole, end = (tokenizer.id_of(t) for t in (FIM_BEGIN, FIM_HOLE, FIM_END))
    if begin is None or hole is None or end is None:
        raise RequestError(
            f"suffix was sent and this model's tokenizer lacks {FIM_BEGIN}, {FIM_HOLE} or {FIM_END}, which it is "
            "written with; leave it out"
        )
    first = [*([service.card.begin_token] if begins else []), begin]
    before = tokenizer.encode(prefix)
    ids = [*first, *before, hole, *tokenizer.encode(suffix), end]
    return TextPrompt(tuple(ids), slice(len(first), len(first) + len(before)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# What binds the answer


def _constraint(body: dict[str, Any]) -> Constraint | None:
    found = [c for c in (structured(body), _response_format(body.get("response_format"))) if c]
    if len(found) > 1:
        raise RequestError("response_format was sent beside another schema or grammar; an answer can be bound to one")
    return Constraint(*found[0]) if found else None


def _response_format(form: Any) -> tuple[str, str] | None:
    if form is None or form == {"type": "text"}:
        return None
    if form == {"type": "json_object"}:
        return "json", ""
    if isinstance(form, dict) and form.get("type") == "json_schema" and isinstance(form.get("json_schema"), dict):
        return structured({"guided_json": form["json_schema"].get("schema", True)})
    raise RequestError(f"response_format is {shown(form)}; text, json_object or json_schema was expected")
