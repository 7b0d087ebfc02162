"""What Anthropic's messages take and answer, as JSON Schema for the OpenAPI document.

It says what is read; what else a client sends is ignored.
"""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_BLOCK = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {
            "enum": ["text", "image", "document", "thinking", "redacted_thinking", "tool_use", "tool_result",
                     "server_tool_use", "web_search_tool_result"],
        },
        "text": _TEXT, "thinking": _TEXT, "signature": _TEXT, "id": _TEXT, "name": _TEXT, "input": {"type": "object"},
        "tool_use_id": _TEXT, "content": {"type": ["string", "array"]}, "source": {"type": "object"},
    },
}  # fmt: skip
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _BLOCK}]}
_TOOL = {
    "type": "object",
    "required": ["name", "input_schema"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"}, "description": _TEXT,
        "input_schema": {"type": "object"}, "strict": {"type": "boolean"}, "type": {"enum": ["custom"]},
    },
}  # fmt: skip
_ASKED: dict[str, Any] = {
    "messages": {
        "type": "array",
        "minItems": 1,
        "description": "A last message of the assistant is continued.",
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
        },
    },
    "model": _TEXT,
    "system": {"anyOf": [_TEXT, {"type": "array", "items": {
        "type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}}]},
    "tools": {"type": "array", "items": _TOOL},
    "tool_choice": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["auto", "any", "tool", "none"]}, "name": _TEXT,
            "disable_parallel_tool_use": {"type": "boolean"},
        },
    },
    "thinking": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["enabled", "disabled", "adaptive"]},
            "budget_tokens": {"type": "integer", "minimum": 0, "description": "Thoughts are closed after so many."},
            "display": {"enum": ["summarized", "omitted"], "description": "omitted: they come in the signature."},
        },
    },
    "output_config": {
        "type": "object",
        "properties": {
            "effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]},
            "format": {
                "type": "object",
                "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
            },
        },
    },
}  # fmt: skip

COUNT: dict[str, Any] = {"type": "object", "required": ["messages"], "properties": _ASKED}
COUNTED: dict[str, Any] = {
    "type": "object", "required": ["input_tokens"], "properties": {"input_tokens": {"type": "integer"}},
}  # fmt: skip
MESSAGES: dict[str, Any] = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        **_ASKED,
        "max_tokens": {
            "type": "integer", "minimum": 1, "description": "Lowered to what the context has room for.",
        },
        "stream": {"type": "boolean"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0},
        "stop_sequences": {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1}},
        "metadata": {
            "type": "object",
            "properties": {"user_id": {"type": ["string", "null"], "description": "Prefixes are shared within it."}},
        },
    },
}  # fmt: skip
MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"],
    "properties": {
        "id": _TEXT, "type": {"const": "message"}, "role": {"const": "assistant"}, "model": _TEXT,
        "content": {"type": "array", "items": _BLOCK},
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "stop_sequence": {"type": ["string", "null"]},
        "usage": {"type": "object"},
    },
}  # fmt: skip
