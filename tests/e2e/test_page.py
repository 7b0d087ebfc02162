"""docs/clients.md: its snippets run, and name the versions that they were run with."""

from __future__ import annotations

import json
import re

import pytest

from pyrosome.cli.pointers import NO_KEY, pointers
from tests.e2e import clients
from tests.e2e.clients import NODE, PYTHON, ROOT, environment, ran
from tests.e2e.page import URL, blocks, versions

PYTHON_TITLES = ("openai, Python", "anthropic, Python", "litellm", "langchain-openai")


@pytest.mark.clients
@pytest.mark.parametrize("title", PYTHON_TITLES)
def test_the_python_shown_runs_and_prints_something(model_server, outside, tmp_path, title):
    environ = environment(tmp_path, outside, LITELLM_LOCAL_MODEL_COST_MAP="True")
    for code in blocks(title, "py"):
        done = ran([PYTHON, "-c", code.replace(URL, model_server.url)], environ, tmp_path)
        assert done.returncode == 0 and done.stdout.strip(), (code, done.stdout, done.stderr)


@pytest.mark.clients
def test_the_node_shown_runs_and_prints_something(model_server, outside, tmp_path):
    for code in blocks("openai, Node", "js"):
        command = [clients.node(), "--input-type=module", "-e", code.replace(URL, model_server.url)]
        done = ran(command, environment(tmp_path, outside), NODE)
        assert done.returncode == 0 and done.stdout.strip(), (done.stdout, done.stderr)


@pytest.mark.clients
def test_the_official_client_for_node_streams_calls_tools_and_tells_errors(
    model_server, agent_server, outside, tmp_path
):
    command = [clients.node(), NODE / "openai_smoke.mjs", model_server.url, agent_server.url]
    done = ran(command, environment(tmp_path, outside), NODE)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_versions_named_are_those_that_are_installed():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements/clients.txt").read_text(), re.MULTILINE))
    node = json.loads((NODE / "package.json").read_text())["dependencies"]
    installed = pinned | {f"{name}-node" if name in pinned else name: version for name, version in node.items()}
    named = versions()
    assert len(named) == 9
    assert named == {name: installed[name] for name in named}


def test_what_the_command_prints_is_what_the_page_shows():
    printed = pointers(URL, "builtin:nano", key=NO_KEY)
    for title, language in (("Claude Code", "sh"), ("opencode", "json"), ("Codex", "toml")):
        for block in blocks(title, language):
            assert "\n".join(f"    {line}" if line else "" for line in block.rstrip("\n").split("\n")) in printed, title


def test_the_lock_of_the_packages_names_no_host():
    lock = (NODE / "package-lock.json").read_text()
    assert "resolved" not in lock and "://" not in re.sub(r'"url": "[^"]*"', "", lock)
