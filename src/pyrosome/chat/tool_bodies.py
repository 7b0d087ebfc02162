"""Tools as clients declare them, put into the words of the official API.  What is no tool is left for it to refuse."""

from __future__ import annotations

from typing import Any

Body = dict[str, Any]


def allowed(tools: Any, chosen: Any) -> list[Any]:
    """Of OpenAI's tools those that a `tool_choice` of the type `allowed_tools` names."""
    names = [t.get("name") for t in _list(chosen) if isinstance(t, dict)]
    return [t for t in _list(tools) if isinstance(t, dict) and t.get("name") in names]


def without_custom(tool: Any) -> Any:
    """One of Anthropic's tools; "custom" is the type of a client's own, as of one that has no type."""
    if not isinstance(tool, dict) or tool.get("type") != "custom":
        return tool
    return {k: v for k, v in tool.items() if k != "type"}


def without_free_text(tool: Any) -> Any:
    """A tool of free text as a function of one text; the official API knows `apply_patch` alone."""
    if not isinstance(tool, dict) or tool.get("type") != "custom" or tool.get("name") == "apply_patch":
        return tool
    parts = [tool["description"]] if isinstance(tool.get("description"), str) else []
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        parts.append(f"The input follows this {form.get('syntax', '')} grammar:\n{form['definition']}")
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
              "additionalProperties": False}  # fmt: skip
    return {
        "type": "function", "name": tool.get("name"), "description": "\n\n".join(parts), "parameters": schema,
    }  # fmt: skip


def equally_strict(tools: list[Any]) -> list[Any]:
    """Tools of which only some are strict, which the official API refuses, as if none were: each keeps its schema."""

    def functions(tool: Any) -> list[Body]:
        if not isinstance(tool, dict):
            return []
        if tool.get("type") == "namespace":
            return [f for inner in _list(tool.get("tools")) for f in functions(inner)]
        found = tool.get("function", tool)
        is_function = tool.get("type") == "function" or "input_schema" in tool
        return [found] if is_function and isinstance(found, dict) else []

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {k: v for k, v in value.items() if k != "strict"}
        inner = {k: without(value[k]) for k in ("function",) if k in value}
        return value | inner | ({"tools": [without(t) for t in value["tools"]]} if _list(value.get("tools")) else {})

    strict = {f.get("strict") is True for tool in tools for f in functions(tool)}
    return tools if len(strict) < 2 else [without(t) for t in tools]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
