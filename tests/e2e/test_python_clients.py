"""Python's client libraries: each case is a function of a script that their own interpreter runs."""

from __future__ import annotations

import pytest

from tests.e2e.clients import names_of

SCRIPTS = ("openai_chat.py", "openai_rest.py", "anthropic_messages.py", "litellm_providers.py", "langchain_chat.py")
CASES = [(script, name) for script in SCRIPTS for name in names_of(script)]
pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def told(scripts, model_server, agent_server, key_server):
    """What became of a script's cases."""
    locked, key, narrow = key_server
    return lambda script: scripts(script, model_server.url, agent_server.url, locked.url, key, narrow)


@pytest.mark.parametrize(("script", "name"), CASES, ids=[f"{s.removesuffix('.py')}-{n}" for s, n in CASES])
def test_a_client_library_gets_what_it_asks_for(told, script, name):
    found = told(script)
    assert name in found, f"{script} ended before {name}; it told of {sorted(found)}"
    assert not found[name], found[name]


def test_nothing_beyond_this_machine_was_wanted(told, outside):
    for script in SCRIPTS:
        told(script)
    assert outside.wanted == []
