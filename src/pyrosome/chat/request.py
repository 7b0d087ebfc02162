"""What clients send, put into the words of the official API.

`official` takes a body in any protocol and returns it with every spelling in use replaced by the one the official
API knows, and beside it what that API cannot be told: sampling it would ignore, a tool choice it would refuse while
thinking, a turn to be continued.  The official manner (`compat="deepseek"`) skips all of this.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from pyrosome.chat.carried import carried
from pyrosome.chat.structured import structured
from pyrosome.chat.tool_bodies import allowed, equally_strict, without_custom, without_free_text
from pyrosome.errors import RequestError

Body = dict[str, Any]
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip

# What needs a server that keeps responses, and what to do instead.
_KEPT = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "prompt": "send instructions and input",
    "background": "send background: false, and wait for the answer",
}


class InvalidRequest(RequestError):
    """A body the official API refuses; `status` and `body` are its answer."""

    def __init__(self, message: str, status: int = 400, body: str | None = None) -> None:
        self.status = status
        self.body = body or json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None,
                                                  "code": "invalid_request_error"}})  # fmt: skip
        super().__init__(message)


@dataclasses.dataclass
class Wishes:
    """What the client asked for beyond the official API."""

    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    forced_tools: str | bool = False  # True: any tool, a name: that one
    parallel: bool = True
    continue_final: bool = False
    generation_cue: bool = True
    keep_reasoning: bool = False
    json_object: bool = False
    json_schema: Any = None
    bound: tuple[str, str] | None = None  # the kind and schema of a constraint the prompt says nothing of
    lower_max_tokens: bool = False  # to what the context has room for, instead of refusing


def official(body: Body, protocol: str, *, thinks_by_default: bool) -> tuple[Body, Wishes]:
    """The body as the official API would have it, and the rest; `body` itself is not changed.

    Raises:
        InvalidRequest: it asks for two things that exclude each other.
    """
    wishes = Wishes()
    body = {k: v for k, v in body.items() if v is not None}
    wishes.sampling = {k: body[k] for k in _SAMPLING if k in body}
    # What the official API does not know, or refuses; the range checks of all the others are its own.
    for name in ("top_k", "min_p", "repetition_penalty", "n"):
        body.pop(name, None)
    if isinstance(body.get("seed"), int) and body["seed"] < 0:
        wishes.sampling["seed"] = body.pop("seed")
    _PROTOCOLS[protocol](body, wishes)
    if isinstance(body.get("tools"), list):
        body["tools"] = equally_strict(body["tools"])
    _modes(body, protocol, thinks_by_default)
    return body, wishes


def _chat(body: Body, wishes: Wishes) -> None:
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    if not body.get("stream"):
        body.pop("stream_options", None)
    kwargs = body.pop("chat_template_kwargs", None)
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    wishes.keep_reasoning = kwargs.get("drop_thinking") is False
    for name in ("thinking", "enable_thinking"):
        value = body.get(name, kwargs.get(name))
        if isinstance(value, bool):
            body["thinking"] = {"type": "enabled" if value else "disabled"}
    effort = kwargs.get("reasoning_effort")
    if isinstance(body.get("reasoning"), dict):
        effort = body.pop("reasoning").get("effort", effort)
    if effort is not None:
        body.setdefault("reasoning_effort", effort)
    wishes.parallel = body.get("parallel_tool_calls") is not False
    choice = body.get("tool_choice")
    if choice == "required":
        wishes.forced_tools = True
    elif isinstance(choice, dict):
        function = choice.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            wishes.forced_tools = function["name"]
    wishes.bound = structured(body)
    if wishes.bound and body.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise InvalidRequest("response_format was sent beside another schema or grammar; an answer is bound to one")
    if body.get("response_format") == {"type": "json_object"}:
        wishes.json_object = True
        del body["response_format"]
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return  # the official error says what is wrong
    messages = _with_ids([_chat_message(m) for m in messages])
    body["messages"] = _paired(
        messages,
        lambda m: [c.get("id") for c in _list(m.get("tool_calls")) if isinstance(c, dict)],
        lambda m: m.get("tool_call_id") if m.get("role") == "tool" else None,
        one_turn_each=True,
    )
    final = messages[-1] if messages else {}
    wishes.generation_cue = body.get("add_generation_prompt") is not False
    wishes.continue_final = body.get("continue_final_message") is True
    if wishes.continue_final and body.get("add_generation_prompt") is True:
        raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other; send one of them")
    if wishes.continue_final and final.get("role") != "assistant":
        raise InvalidRequest("continue_final_message needs a final assistant message; the last one is of another role")
    if final.get("role") == "assistant" and final.get("prefix") is True:
        wishes.continue_final = True
        final.pop("prefix")


def _chat_message(message: Body) -> Body:
    message = {k: v for k, v in message.items() if k != "name"}
    if message.get("role") == "developer":
        message["role"] = "system"
    if message.get("role") != "assistant":
        return message
    if isinstance(message.get("reasoning"), str) and message.get("reasoning_content") is None:
        message["reasoning_content"] = message["reasoning"]
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif isinstance(message["tool_calls"], list):
        message["tool_calls"] = [_chat_call(c) for c in message["tool_calls"]]
    return message


def _with_ids(messages: list[Body]) -> list[Body]:
    """Calls and results that name no id, as in DeepSeek's own examples, paired in the order they come."""
    unnamed: list[str] = []
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            for n, call in enumerate(calls):
                if isinstance(call, dict) and "id" not in call:
                    call["id"] = f"call_{number}_{n}"
                    unnamed.append(call["id"])
        elif message.get("role") == "tool" and message.get("tool_call_id") is None and unnamed:
            message["tool_call_id"] = unnamed.pop(0)
    return messages


def _chat_call(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = call["function"]
    return {"type": "function", **call, "function": {**function, "arguments": _as_text(function.get("arguments"))}}


def _as_text(arguments: Any) -> Any:
    """Arguments as JSON text, however often a client has replayed them."""
    if arguments is None or arguments == "":
        return "{}"
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _responses(body: Body, wishes: Wishes) -> None:
    for name, instead in _KEPT.items():
        if body.get(name) not in (None, False):
            raise InvalidRequest(f"{name} needs responses that are kept, and none is kept here; {instead}")
    include = body.get("include")
    if isinstance(include, list) and "message.output_text.logprobs" in include:
        body.setdefault("top_logprobs", 0)
    wishes.parallel = body.get("parallel_tool_calls") is not False
    reasoning = body.get("reasoning", {})
    if _is_off(body.get("thinking")) and isinstance(reasoning, dict) and reasoning.get("effort") is None:
        body["reasoning"] = {**reasoning, "effort": "none"}
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        body["tools"] = allowed(body.get("tools"), choice.get("tools"))
        body["tool_choice"] = choice = choice.get("mode", "auto")
    if isinstance(body.get("tools"), list):
        body["tools"] = [without_free_text(t) for t in body["tools"]]
    if choice == "required":
        wishes.forced_tools = True
    elif isinstance(choice, dict) and isinstance(choice.get("name"), str):
        wishes.forced_tools = choice["name"]
    text = body.get("text")
    if isinstance(text, dict) and text.get("format") == {"type": "json_object"}:
        wishes.json_object = True
        body["text"] = {k: v for k, v in text.items() if k != "format"}
    items = body.get("input")
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        return
    calls, outputs = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
    body["input"] = _paired(
        [_response_item(i) for i in items],
        lambda i: [i.get("call_id")] if i.get("type") in calls else [],
        lambda i: i.get("call_id") if i.get("type") in outputs else None,
        one_turn_each=False,
    )


def _response_item(item: Body) -> Body:
    if item.get("type") == "function_call":
        return {**item, "arguments": _as_text(item.get("arguments"))}
    if item.get("type") == "reasoning" and not item.get("content"):
        texts = [s.get("text") for s in _list(item.get("summary")) if isinstance(s, dict)]
        text = carried(item.get("encrypted_content")) or "\n\n".join(t for t in texts if isinstance(t, str))
        return {**item, "summary": [], "content": [{"type": "reasoning_text", "text": text}]} if text else item
    return item


def _messages(body: Body, wishes: Wishes) -> None:
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        wishes.parallel = choice.get("disable_parallel_tool_use") is not True
        if choice.get("type") == "any":
            wishes.forced_tools = True
        elif choice.get("type") == "tool" and isinstance(choice.get("name"), str):
            wishes.forced_tools = choice["name"]
    output = body.get("output_config")
    form = output.get("format") if isinstance(output, dict) else None
    if isinstance(form, dict) and form.get("type") == "json_schema":
        wishes.json_schema = form.get("schema")
    if isinstance(body.get("tools"), list):
        body["tools"] = [without_custom(t) for t in body["tools"]]
    wishes.lower_max_tokens = True
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return
    messages = [_message(m) for m in messages]
    body["messages"] = messages = [m for m in messages if m is not None]
    wishes.continue_final = bool(messages) and messages[-1].get("role") == "assistant"


def _message(message: Body) -> Body | None:
    """A message with blocks as the official API knows them; None where it held only what is left out."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    kept = [_block(b) for b in content if not (isinstance(b, dict) and _is_left_out(str(b.get("type"))))]
    return {**message, "content": kept} if kept or not content else None


def _is_left_out(kind: str) -> bool:
    """Thoughts that nobody here can read, and what another provider's own tools did in an earlier turn."""
    return kind in ("redacted_thinking", "server_tool_use") or (kind.endswith("_tool_result") and kind != "tool_result")


def _block(block: Any) -> Any:
    if not isinstance(block, dict):
        return block
    if block.get("type") == "thinking" and not block.get("thinking"):
        return {**block, "thinking": carried(block.get("signature"))}
    if block.get("type") == "tool_use" and block.get("input") is None:
        return {**block, "input": {}}
    return block


_PROTOCOLS: dict[str, Callable[[Body, Wishes], None]] = {
    "chat_completions": _chat, "responses": _responses, "messages": _messages,
}  # fmt: skip


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_off(thinking: Any) -> bool:
    return thinking is False or (isinstance(thinking, dict) and thinking.get("type") == "disabled")


def _modes(body: Body, protocol: str, thinks_by_default: bool) -> None:
    """Where the server does not think by default, an effort asked for turns thinking on."""
    effort = body.get("reasoning_effort")
    if protocol == "messages":
        effort = (
            (body.get("output_config") or {}).get("effort") if isinstance(body.get("output_config"), dict) else None
        )
    if protocol != "responses" and not thinks_by_default and effort not in (None, "none"):
        body.setdefault("thinking", {"type": "enabled"})


def _paired(
    items: list[Body], calls_of: Callable[[Body], list[Any]], answered: Callable[[Body], Any], *, one_turn_each: bool
) -> list[Body]:
    """Every tool result moved to behind the calls of its turn, in their order, wherever else it stood.

    Neighbouring items that call are one turn, unless `one_turn_each`.
    """
    called = {c for item in items for c in calls_of(item) if isinstance(c, str)}
    results: dict[str, Body] = {}
    for item in items:
        if isinstance(call := answered(item), str) and call in called:
            results.setdefault(call, item)
    paired = {id(item) for item in results.values()}
    out: list[Body] = []
    owed: list[Any] = []
    for item in items:
        if id(item) in paired:
            continue
        calls = calls_of(item)
        if one_turn_each or not calls:
            out += [results.pop(c) for c in owed if c in results]
            owed = []
        out.append(item)
        owed += [c for c in calls if isinstance(c, str)]
    return out + [results.pop(c) for c in owed if c in results]
