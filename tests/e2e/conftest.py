"""Clients by others, as their users run them, against servers in processes of their own.

They run where PYROSOME_CLIENTS=1 is set, and then whatever they lack is a failure: `make clients` installs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.e2e import clients
from tests.e2e.serving import NANO, serving


def pytest_collection_modifyitems(config, items):
    if os.environ.get("PYROSOME_CLIENTS") == "1":
        return
    left = [item for item in items if item.get_closest_marker("clients")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def model_server():
    """`pyrosome serve` with the built-in model; whatever it babbles ends soon."""
    with serving(*NANO, "--context", "8192", "--state") as server:
        yield server


@pytest.fixture(scope="session")
def agent_server():
    """A server whose model does what an agent asks of it."""
    with serving("tests.e2e.agent_server") as server:
        yield server


@pytest.fixture(scope="session")
def key_server(tmp_path_factory):
    """`pyrosome serve` where a key is needed: the server, a key, and one for a single request at once."""
    state = tmp_path_factory.mktemp("state")

    def key(*flags: str) -> str:
        command = [sys.executable, "-m", "pyrosome", "keys", "create", "--json", "--state", str(state), *flags]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["secret"]

    keys = key("wide"), key("narrow", "--concurrent", "1")
    with serving(*NANO, "--keys", "required", "--state", state=state) as server:
        yield server, *keys


@pytest.fixture(scope="session")
def outside():
    """What stands for the network beyond this machine: whoever goes there is noted, and gets nowhere."""
    with clients.Outside() as found:
        yield found


@pytest.fixture(scope="session")
def scripts(outside, tmp_path_factory):
    """Runs a script of `tests/e2e/scripts` once; what became of each of its cases."""
    home = tmp_path_factory.mktemp("home")
    done: dict[tuple[str, ...], dict[str, str]] = {}

    def run(name: str, *arguments: str) -> dict[str, str]:
        if (name, *arguments) not in done:
            done[name, *arguments] = clients.cases_of(name, arguments, home, outside)
        return done[name, *arguments]

    return run
