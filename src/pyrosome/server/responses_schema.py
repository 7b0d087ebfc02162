"""What OpenAI's responses take and answer, as JSON Schema for the OpenAPI document.

It says what is read; what else a client sends is ignored.
"""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_NULLABLE: dict[str, Any] = {"type": ["string", "null"]}
_ITEM = {
    "type": "object",
    "properties": {
        "type": {
            "enum": ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call",
                     "custom_tool_call_output"],
        },
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"type": ["string", "array", "null"]},
        "summary": {"type": "array"}, "encrypted_content": _NULLABLE,
        "call_id": _TEXT, "name": _TEXT, "namespace": _TEXT, "arguments": _TEXT, "input": _TEXT,
        "output": {"type": ["string", "array"]},
    },
}  # fmt: skip
_TOOL = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["function", "custom", "namespace", "web_search"]},
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"}, "description": _NULLABLE,
        "parameters": {"type": "object"}, "strict": {"type": ["boolean", "null"]},
        "format": {"type": "object"}, "tools": {"type": "array"},
    },
}  # fmt: skip

RESPONSES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _ITEM}]},
        "instructions": _NULLABLE,
        "model": _TEXT,
        "stream": {"type": ["boolean", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "reasoning": {
            "type": ["object", "null"],
            "properties": {
                "effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", None]},
                "summary": {
                    "enum": ["auto", "concise", "detailed", None],
                    "description": "Where it is there, thoughts are given as their summary too.",
                },
            },
        },
        "include": {
            "type": ["array", "null"],
            "items": _TEXT,
            "description": "reasoning.encrypted_content: thoughts as a string to send back; "
            "message.output_text.logprobs: log probabilities.",
        },
        "text": {
            "type": ["object", "null"],
            "properties": {
                "format": {
                    "type": "object",
                    "required": ["type"],
                    "properties": {
                        "type": {"enum": ["text", "json_object", "json_schema"]}, "name": _TEXT,
                        "schema": {"type": "object"}, "strict": {"type": ["boolean", "null"]},
                    },
                },
            },
        },
        "tools": {"type": ["array", "null"], "items": _TOOL},
        "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required", None]}, {"type": "object"}]},
        "parallel_tool_calls": {"type": ["boolean", "null"]},
        "previous_response_id": {"type": "null", "description": "Nothing is kept: send the whole conversation."},
        "metadata": {"type": ["object", "null"]},
        "store": {"type": ["boolean", "null"], "description": "Nothing is kept, whatever it says."},
    },
}  # fmt: skip
RESPONSE: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage", "error", "incomplete_details"],
    "properties": {
        "id": _TEXT, "object": {"const": "response"}, "created_at": {"type": "integer"},
        "status": {"enum": ["completed", "incomplete"]}, "model": _TEXT,
        "output": {"type": "array", "items": {"type": "object", "required": ["type", "id", "status"]}},
        "usage": {"type": "object"}, "error": {"type": ["object", "null"]},
        "incomplete_details": {"type": ["object", "null"]},
    },
}  # fmt: skip
