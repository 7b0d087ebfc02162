"""Agents, each a program of its own, configured as docs/clients.md says.

A server that plays its part shows the loop: a file is asked about, the agent's own tool reads it, the answer tells what
is in it.  With the built-in model, whose text is noise to an agent, the answer is held to a schema.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.clients import NODE, Outside, environment, ran
from tests.e2e.page import URL, blocks
from tests.server.scripted import until

pytestmark = pytest.mark.clients
BIN = NODE / "node_modules" / ".bin"
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["word"],
    "additionalProperties": False,
}
BRIEF = {"type": "enabled", "budget_tokens": 64}


@pytest.fixture
def beyond():
    with Outside() as found:
        yield found


@pytest.fixture
def work(tmp_path):
    """A user's folder to work in, with a file."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "note.txt").write_text("A note: the word is heliotrope.\n")
    return folder


def task(work) -> str:
    return f"Read {work}/note.txt and tell me its word."


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def answered(server, since: int, path: str, num: int) -> None:
    """At least so many requests came to that path since then, and whatever came was answered as it should be."""

    def told() -> list[str]:
        return [line for line in server.log[since:] if "pyrosome.server.requests" in line]

    until(lambda: sum(f" POST {path} " in line for line in told()) >= num)
    assert all(" status=200 " in line for line in told()), told()


# Claude Code


def claude(server, beyond, work, prompt: str, *flags: str, **more: str):
    settings = dict(re.findall(r"(ANTHROPIC_\w+)=(\S+)", blocks("Claude Code", "sh")[0].replace(URL, server.url)))
    environ = environment(
        work.parent, beyond, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_TELEMETRY="1", **settings, **more
    )
    command = [BIN / "claude", "-p", prompt, "--output-format", "stream-json", "--verbose", *flags]
    done = ran(command, environ, work, 120)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert beyond.wanted == []
    return lines(done.stdout)


def test_claude_code_reads_a_file_and_tells_what_is_in_it(agent_server, beyond, work):
    since = len(agent_server.log)
    said = claude(agent_server, beyond, work, task(work))
    told = [block for event in said if event["type"] == "assistant" for block in event["message"]["content"]]
    assert [b["type"] for b in told] == ["thinking", "text", "tool_use", "thinking", "text"]
    assert told[2]["name"] == "Read" and told[2]["input"] == {"file_path": f"{work}/note.txt"}
    assert said[-1]["result"] == "It says heliotrope." and said[-1]["num_turns"] == 2
    answered(agent_server, since, "/v1/messages", 2)


def test_claude_code_gets_an_answer_of_the_built_in_model(model_server, beyond, work):
    since = len(model_server.log)
    held = {"temperature": 0, "thinking": BRIEF, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    said = claude(
        model_server, beyond, work, "Hello", "--tools", "", "--system-prompt", "Answer.",
        CLAUDE_CODE_EXTRA_BODY=json.dumps(held),
    )  # fmt: skip
    assert said[-1]["is_error"] is False and json.loads(said[-1]["result"])["word"] in {"red", "blue"}
    answered(model_server, since, "/v1/messages", 1)


# opencode


def opencode(server, beyond, work, prompt: str, *flags: str, model: dict | None = None, **more):
    config = json.loads(blocks("opencode", "json")[0].replace(URL, server.url))
    config["provider"]["pyrosome"]["models"]["builtin:nano"] |= model or {}
    (work / "opencode.json").write_text(json.dumps(config | more))
    environ = environment(
        work.parent, beyond, OPENCODE_DISABLE_AUTOUPDATE="1", OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1", OPENCODE_DISABLE_DEFAULT_PLUGINS="1",
    )  # fmt: skip
    done = ran([BIN / "opencode", "run", prompt, "--format", "json", *flags], environ, work, 120)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return [event["part"] | {"type": event["type"]} for event in lines(done.stdout) if "part" in event]


def test_opencode_reads_a_file_and_tells_what_is_in_it(agent_server, beyond, work):
    since = len(agent_server.log)
    parts = opencode(agent_server, beyond, work, task(work))
    (tool,) = (part for part in parts if part["type"] == "tool_use")
    assert tool["tool"] == "read" and tool["state"]["status"] == "completed"
    assert [part["text"] for part in parts if part["type"] == "text"] == ["I read it.", "It says heliotrope."]
    answered(agent_server, since, "/v1/chat/completions", 2)


def test_opencode_gets_an_answer_of_the_built_in_model(model_server, beyond, work):
    since = len(model_server.log)
    form = {"type": "json_schema", "json_schema": {"name": "word", "schema": SCHEMA, "strict": True}}
    plain = {"plain": {"mode": "primary", "prompt": "Answer.", "tools": {"*": False}}}
    model = {
        "limit": {"context": 8192, "output": 512},
        "options": {"temperature": 0, "thinking": BRIEF, "response_format": form},
    }
    flags = ("--agent", "plain", "--title", "Hello")
    parts = opencode(model_server, beyond, work, "Hello", *flags, model=model, agent=plain)
    assert json.loads("".join(p["text"] for p in parts if p["type"] == "text"))["word"] in {"red", "blue"}
    assert parts[-1]["type"] == "step_finish" and parts[-1]["tokens"]["reasoning"] > 0
    answered(model_server, since, "/v1/chat/completions", 1)


# Codex


def test_codex_reads_a_file_and_tells_what_is_in_it(agent_server, beyond, work):
    since = len(agent_server.log)
    folder = work.parent / ".codex"
    folder.mkdir()
    quiet = "\n[features]\nplugins = false\nremote_plugin = false\napps = false\n\n[analytics]\nenabled = false\n"
    (folder / "config.toml").write_text(blocks("Codex", "toml")[0].replace(URL, agent_server.url) + quiet)
    flags = ("--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    done = ran([BIN / "codex", "exec", *flags, task(work)], environment(work.parent, beyond), work, 120)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    items = [event["item"] for event in lines(done.stdout) if event["type"] == "item.completed"]
    (command,) = (item for item in items if item["type"] == "command_execution")
    assert command["exit_code"] == 0 and "heliotrope" in command["aggregated_output"]
    assert [i["text"] for i in items if i["type"] == "agent_message"] == ["I read it.", "It says heliotrope."]
    assert [i["text"] for i in items if i["type"] == "reasoning"] == ["something is to be looked up"] * 2
    assert beyond.wanted == []
    answered(agent_server, since, "/v1/responses", 2)
