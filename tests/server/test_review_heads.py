"""A head that comes byte by byte costs what its bytes cost, and is judged as one that comes at once."""

from __future__ import annotations

import pytest

from pyrosome.server import connection
from tests.server.scripted import saying
from tests.server.wires import Wire, head, post, wired


class Looks:
    """Counts how many bytes were looked through."""

    def __init__(self, pattern) -> None:
        self._pattern, self.num_bytes = pattern, 0

    def search(self, data, first, end):
        self.num_bytes += end - first
        return self._pattern.search(data, first, end)


@pytest.fixture(scope="module")
def server():
    with wired(saying("</think>hi")) as found:
        yield found


def test_a_head_that_comes_byte_by_byte_is_looked_through_once(server, monkeypatch):
    looks = Looks(connection._BARE)
    monkeypatch.setattr(connection, "_BARE", looks)
    long = head("GET /ping HTTP/1.1", "X-Long: " + "x" * 3000)
    wire = Wire(server.port)
    for n in range(len(long)):
        wire.send(long[n : n + 1])
    assert wire.answer()[0] == 200
    assert len(long) <= looks.num_bytes <= 8 * len(long)  # all of it each time would be 1,500 times as much


@pytest.mark.parametrize("bad", [b"X: 1\nY: 2\r\n", b"X: 1\rY: 2\r\n", b"X: 1\r\r\n", b"\nX: 1\r\n", b"X: 1\r\n\n"])
@pytest.mark.parametrize("cut", ["at once", "byte by byte", "around"])
def test_a_bare_line_end_is_seen_wherever_the_parts_part(server, bad, cut):
    data = b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\n" + bad + b"\r\n"
    at = data.index(bad)
    cuts = {"at once": [], "byte by byte": range(1, len(data)), "around": [at + 4, at + 5, at + 6]}[cut]
    wire = Wire(server.port)
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        try:
            wire.send(data[a:b])
        except OSError:  # it was refused before its end
            break
    assert wire.answer()[0] == 400


def test_a_good_head_in_any_two_parts_is_answered(server):
    data = head("GET /ping HTTP/1.1", "X-Y: z")
    wire = Wire(server.port)
    for at in range(1, len(data)):
        wire.send(data[:at]).send(data[at:])
        assert wire.answer()[0] == 200
    assert wire.send(post()).answer()[0] == 200
