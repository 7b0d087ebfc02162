"""Where to point clients: what `pyrosome serve` prints when it is ready, to be copied and pasted."""

from __future__ import annotations

import json
import shlex

NO_KEY = "none"


def pointers(url: str, model: str, *, key: str) -> str:
    """Snippets for a server at `url`, which answers as `model`.

    Args:
        key: what clients send as their key.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    parts = {
        "curl": (
            f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"     -H 'Authorization: Bearer {key}' -d {shlex.quote(body)}"
        ),
        "OpenAI, Python": (
            "from openai import OpenAI\n"
            f"client = OpenAI(base_url={_text(url + '/v1')}, api_key={_text(key)})\n"
            f"client.chat.completions.create(model={_text(model)}, messages=[{{'role': 'user', 'content': 'Hello'}}])"
        ),
        "Anthropic, Python": (
            "from anthropic import Anthropic\n"
            f"client = Anthropic(base_url={_text(url)}, api_key={_text(key)})\n"
            f"client.messages.create(model={_text(model)}, max_tokens=1024,\n"
            "                       messages=[{'role': 'user', 'content': 'Hello'}])"
        ),
        "Claude Code": (
            f"ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={shlex.quote(key)} \\\n"
            f"ANTHROPIC_MODEL={shlex.quote(model)} ANTHROPIC_DEFAULT_HAIKU_MODEL={shlex.quote(model)} claude"
        ),
        "opencode, in opencode.json": _opencode(url, model, key),
        "Codex, in ~/.codex/config.toml": _codex(url, model, key),
    }
    return "\n\n".join(f"{title}:\n\n{_indented(text)}" for title, text in parts.items())


def _opencode(url: str, model: str, key: str) -> str:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "pyrosome",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": {model: {"name": model}},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"pyrosome/{model}",
        "provider": {"pyrosome": provider},
    }
    return json.dumps(config, indent=2, ensure_ascii=False)


def _codex(url: str, model: str, key: str) -> str:
    lines = [
        f"model = {_text(model)}",
        'model_provider = "pyrosome"',
        "",
        "[model_providers.pyrosome]",
        'name = "pyrosome"',
        f"base_url = {_text(url + '/v1')}",
        'wire_api = "responses"',
    ]
    if key != NO_KEY:
        lines.append('env_key = "PYROSOME_KEY"  # the variable that holds the key')
    return "\n".join(lines)


def _text(value: str) -> str:
    """A text as Python and TOML both write it."""
    return json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
