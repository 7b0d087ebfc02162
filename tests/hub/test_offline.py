"""Under --offline the interpreter refuses every connection that leaves this machine, whoever asks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyrosome.errors import RequestError
from pyrosome.hub.offline import is_here, is_offline

PROBE = """
import socket, sys
from pyrosome.errors import RequestError
from pyrosome.hub.offline import go_offline
go_offline()
def outcome(connect):
    try:
        connect()
    except RequestError as refused:
        return str(refused)
    except OSError as tried:
        return "tried"
    return "done"
listening = socket.create_server(("127.0.0.1", 0))
print(outcome(lambda: socket.create_connection(listening.getsockname())))
print(outcome(lambda: socket.create_connection(("192.0.2.1", 443), timeout=0.01)))
print(outcome(lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 443))))
print(outcome(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53))))
print(outcome(lambda: socket.create_connection(("example.org", 443), timeout=0.01)))
print(outcome(lambda: socket.gethostbyname("example.org")))
for host in ("localhost", None, "127.0.0.1", socket.gethostname()):
    assert "forbids" not in outcome(lambda: socket.getaddrinfo(host, 80)), host
import urllib.request
print(outcome(lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=0.01)))
from huggingface_hub.utils import get_session
print(outcome(lambda: get_session().get("http://192.0.2.1/", timeout=0.01)))
"""


def test_connections_are_refused_whichever_library_asks():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    first, *others, hub = done.stdout.splitlines()
    assert first == "done"
    assert len(others) == 6 and all("--offline forbids it" in o for o in others), done
    assert hub == "tried"  # its library was told by its own variable


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "", "localhost", "::ffff:127.0.0.1"]
)
def test_this_machine_is_here(host):
    assert is_here(host)


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "fe80::1%eth0", "example.org", "::ffff:10.0.0.1"]
)
def test_another_machine_is_not(host):
    assert not is_here(host)


@pytest.mark.parametrize(
    ("own", "hubs", "offline"),
    [(None, None, False), ("0", None, False), ("", "", False), ("no", "0", False), ("1", None, True),
     ("TRUE", None, True), (None, "1", True), ("0", "ON", True)],
)  # fmt: skip
def test_variables_forbid_connections(monkeypatch, own, hubs, offline):
    for name, value in (("PYROSOME_OFFLINE", own), ("HF_HUB_OFFLINE", hubs)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert is_offline() is offline


def test_a_value_that_is_neither_is_named(monkeypatch):
    monkeypatch.setenv("PYROSOME_OFFLINE", "maybe")
    with pytest.raises(RequestError, match=r"PYROSOME_OFFLINE is 'maybe'"):
        is_offline()
