"""Bodies of chat completions and completions, and their answers, as JSON Schema: what is read, and no more.

Fields that are not named here may be sent: they are left alone, or refused by name where they would change the answer.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _or_null(**schema: Any) -> Schema:
    """A field that may be sent as null, which is as if it were not sent."""
    return {"anyOf": [schema, {"type": "null"}]}


def _number(low: float, high: float, about: str = "") -> Schema:
    return {**_or_null(type="number", minimum=low, maximum=high), **({"description": about} if about else {})}


def _flag(about: str = "") -> Schema:
    return {**_or_null(type="boolean"), **({"description": about} if about else {})}


def _integer(low: int, high: int, about: str = "") -> Schema:
    return {**_or_null(type="integer", minimum=low, maximum=high), **({"description": about} if about else {})}


_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_STOP = {"description": "Up to 16 strings that end the answer; they are not part of it."} | _or_null(
    anyOf=[
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
    ]
)
_STREAM_OPTIONS = _or_null(
    type="object", properties={"include_usage": _flag("Usage comes in a last chunk without choices.")}
)
_STRUCTURED = {
    "json": {}, "json_object": _flag(), "regex": _or_null(type="string"), "grammar": _or_null(type="string"),
    "choice": _or_null(type="array", items={"type": "string", "minLength": 1}, minItems=1),
}  # fmt: skip
_RESPONSE_FORMAT = _or_null(
    type="object",
    properties={"type": {"enum": ["text", "json_object", "json_schema", "regex"]}, "json_schema": _OBJECT},
    required=["type"],
)

_COMMON: dict[str, Schema] = {
    "model": {**_or_null(type="string"), "description": "Any name, or as the server says one of its own."},
    "temperature": _number(0, 2, "0: always the most probable token."),
    "top_p": _number(0, 1),
    "top_k": _integer(0, 2**31 - 1, "0: all tokens."),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "seed": _integer(0, 2**63 - 1, "Drawn, and told, where none is sent."),
    "n": _integer(1, 128, "Answers to one prompt, which is computed once."),
    "stop": _STOP,
    "stop_token_ids": _or_null(type="array", items={"type": "integer", "minimum": 0}),
    "ignore_eos": _flag(),
    "min_tokens": _integer(0, 393216, "It does not end by itself before."),
    "max_repeats": _integer(2, 1000, "End where the last tokens are one passage so many times over."),
    "stream": _flag(),
    "stream_options": _STREAM_OPTIONS,
    "response_format": _RESPONSE_FORMAT,
    "structured_outputs": _or_null(type="object", properties=_STRUCTURED),
    **{f"guided_{kind}": schema for kind, schema in _STRUCTURED.items() if kind != "json_object"},
    "prompt_logprobs": _integer(0, 100, "So many top tokens beside each of the prompt's; it is then computed anew."),
    "return_token_ids": _flag("The ids of prompt and answer, as the model wrote them."),
    "priority": {**_or_null(type="integer"), "description": "Below 0: later than others."},
    "cache_salt": {
        **_or_null(type="string"),
        "description": "Computed prefixes are shared among requests of one salt.",
    },
    "user_id": {**_or_null(type="string"), "description": "The same as cache_salt."},
}

_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "latest_reminder"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}, {"type": "null"}]},
        "reasoning_content": {**_or_null(type="string"), "description": "Thoughts of an earlier turn; or `reasoning`."},
        "tool_calls": _or_null(type="array", items=_OBJECT),
        "tool_call_id": _or_null(type="string"),
        "prefix": _flag("A last assistant message is continued."),
    },
    "required": ["role"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"},
                "description": _or_null(type="string"),
                "parameters": _OBJECT,
                "strict": _flag(),
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}

CHAT: Schema = {
    "type": "object",
    "required": ["messages"],
    "additionalProperties": True,
    "properties": {
        **_COMMON,
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_tokens": _integer(1, 393216, "Thoughts count too. Left out: by mode, as the context has room."),
        "max_completion_tokens": _integer(1, 393216, "The same."),
        "thinking": {
            "description": "Whether it thinks; by default as the server does.",
            "anyOf": [
                {"type": "boolean"},
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {
                        "type": {"enum": ["enabled", "disabled", "adaptive"]},
                        "budget_tokens": _integer(0, 2**31 - 1),
                    },
                },
            ],
        },
        "reasoning_effort": _or_null(enum=["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]),
        "thinking_budget": _integer(0, 2**31 - 1, "Tokens of thought; then the answer begins."),
        "include_reasoning": _flag("false: thoughts are left out of the answer."),
        "chat_template_kwargs": _or_null(type="object"),
        "tools": _or_null(type="array", items=_TOOL),
        "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, _OBJECT, {"type": "null"}]},
        "parallel_tool_calls": _flag(),
        "logprobs": _flag(),
        "top_logprobs": _integer(0, 20, "With logprobs: true."),
        "continue_final_message": _flag(),
        "add_generation_prompt": _flag(),
    },
}  # fmt: skip

TEXT: Schema = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": True,
    "properties": {
        **_COMMON,
        "prompt": {
            "description": "Text is given the begin token, and no other by what it spells; ids are taken as they are.",
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ],
        },
        "suffix": {**_or_null(type="string"), "description": "What comes after the text that is to be filled in."},
        "max_tokens": _integer(0, 393216, "16 where it is left out; 0: none, the prompt is all that is wanted."),
        "echo": _flag("The prompt is given before its completion."),
        "logprobs": _integer(0, 100, "So many top tokens beside each; with echo of the prompt's tokens too."),
        "best_of": _integer(1, 128, "As n, or left out."),
        "add_special_tokens": _flag("false: text is not given the begin token."),
    },
}  # fmt: skip

_USAGE: Schema = {
    "type": "object",
    "required": [
        "prompt_tokens", "completion_tokens", "total_tokens", "prompt_cache_hit_tokens", "prompt_cache_miss_tokens",
    ],
}  # fmt: skip


def _answer(kind: str, choice: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"],
        "properties": {
            "id": _TEXT, "object": {"const": kind}, "created": {"type": "integer"}, "model": _TEXT,
            "system_fingerprint": _TEXT, "choices": {"type": "array", "items": choice}, "usage": _USAGE,
        },
    }  # fmt: skip


CHAT_ANSWER = _answer(
    "chat.completion",
    {
        "type": "object",
        "required": ["index", "message", "logprobs", "finish_reason"],
        "properties": {
            "index": {"type": "integer"},
            "message": {"type": "object", "required": ["role", "content"]},
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        },
    },
)
TEXT_ANSWER = _answer(
    "text_completion",
    {
        "type": "object",
        "required": ["index", "text", "logprobs", "finish_reason"],
        "properties": {"index": {"type": "integer"}, "text": _TEXT, "finish_reason": {"enum": ["stop", "length"]}},
    },
)
RENDERED: Schema = {
    "type": "object",
    "properties": {"prompt": _TEXT, "token_ids": {"type": "array", "items": {"type": "integer"}}, "sampling": _OBJECT},
}
