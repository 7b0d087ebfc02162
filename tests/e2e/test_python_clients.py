"""Python's client libraries: each case is a function of a script that their own interpreter runs."""

from __future__ import annotations

import pytest

from tests.e2e.clients import names_of

pytestmark = pytest.mark.clients


def cases(script: str):
    return pytest.mark.parametrize("name", names_of(script))


def held(scripts, script: str, name: str, *arguments: str) -> None:
    found = scripts(script, *arguments)
    assert name in found, f"{script} ended before {name}; it told of {sorted(found)}"
    assert not found[name], found[name]


@cases("openai_chat.py")
def test_openai_has_its_chat_completions(scripts, model_server, name):
    held(scripts, "openai_chat.py", name, model_server)


def test_nothing_beyond_this_machine_was_wanted(outside, scripts, model_server):
    for script in ("openai_chat.py",):
        scripts(script, model_server)
    assert outside.wanted == []
