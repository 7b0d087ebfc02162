"""What reaches the routes, and what never does: heads, bodies, connections, names, origins, paths, TLS."""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import time

import pytest

from pyrosome.options import ServerOptions
from pyrosome.server import connection
from pyrosome.server.caller import OpenDoor
from pyrosome.server.connection import Limits
from tests.server.scripted import saying, until
from tests.server.wires import BODY, CHAT, head, post, wired

GET = "GET /v1/models HTTP/1.1"
POST = f"POST {CHAT} HTTP/1.1"
CHUNKED = "Transfer-Encoding: chunked"
HI = saying("</think>hi")


@pytest.fixture(scope="module")
def server():
    with wired(HI) as made:
        yield made


class NeedsKey(OpenDoor):
    """Lets the key in that is the word."""

    is_needed = True

    def __init__(self) -> None:
        self.presented: list[str | None] = []

    async def caller(self, presented):
        self.presented.append(presented)
        return await super().caller(presented)


# What could be understood in two ways is understood in none.
AMBIGUOUS = {
    "two lengths that differ": head(POST, "Content-Length: 3", "Content-Length: 4") + b"abcd",
    "two lengths that agree": head(POST, "Content-Length: 3", "Content-Length: 3") + b"abc",
    "a list of lengths": head(POST, "Content-Length: 3, 3") + b"abc",
    "a signed length": head(POST, "Content-Length: +3") + b"abc",
    "length and chunks": head(POST, "Content-Length: 3", CHUNKED) + b"0\r\n\r\n",
    "chunks and length": head(POST, CHUNKED, "Content-Length: 3") + b"0\r\n\r\n",
    "two codings": head(POST, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "two headers of codings": head(POST, CHUNKED, "Transfer-Encoding: identity") + b"0\r\n\r\n",
    "chunked twice": head(POST, CHUNKED, CHUNKED) + b"0\r\n\r\n",
    "a coding that is none": head(POST, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "a coding that ends otherwise": head(POST, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "chunks in HTTP/1.0": head(POST.replace("1.1", "1.0"), CHUNKED) + b"0\r\n\r\n",
    "a folded header": head(GET, "X-A: a", " b"),
    "a folded header behind an offer to upgrade": head(GET, "X-A: a", "Upgrade: h2c", " b"),
    "a bare line feed in the line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "a bare line feed between headers": head(GET, "X-A: a\nX-B: b"),
    "a bare carriage return": head(GET, "X-A: a\rX-B: b"),
    "bare line feeds alone": b"GET / HTTP/1.1\nHost: a\n\n",
    "a space before the colon": head(POST, "Content-Length : 3") + b"abc",
    "a zero byte": head(GET, "X-A: a\x00b"),
    "a header without a name": head(GET, ": a"),
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": head(GET, "Host: 127.0.0.1"),
    "another server's path": head("GET http://127.0.0.1/v1/models HTTP/1.1"),
    "a tunnel": head("CONNECT 127.0.0.1:80 HTTP/1.1"),
    "no path": head("GET v1/models HTTP/1.1"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "another version": head("GET /v1/models HTTP/1.9"),
    "a method that is none": head("FOO /v1/models HTTP/1.1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
}


@pytest.mark.parametrize("sent", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_a_head_that_can_be_read_in_two_ways_is_refused_and_its_connection_closed(server, sent):
    before = len(server.engine.requests)
    wire = server.wire().send(sent)
    status, headers, body = wire.answer()
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["error"]["message"]
    wire.close()
    assert len(server.engine.requests) == before


CHUNKS = {
    "a bare line feed": b"3\nabc\r\n0\r\n\r\n",
    "a line feed in an extension": b"3;a=b\nx\r\nabc\r\n0\r\n\r\n",
    "a size that overflows": b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a signed size": b"-3\r\nabc\r\n0\r\n\r\n",
    "more than the size": b"3\r\nabcd\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_a_chunk_that_is_not_what_it_says_ends_the_connection(server, chunks):
    wire = server.wire().send(head(POST, CHUNKED, "Content-Type: application/json") + chunks)
    assert wire.answer()[0] == 400
    assert wire.is_closed()


@pytest.mark.parametrize("whole", [True, False], ids=["ended", "endless"])
def test_a_head_that_is_too_large_is_refused_before_it_ends(whole):
    with wired(HI, options=ServerOptions(max_header_bytes=2048)) as server:
        wire = server.wire().send(head(GET, "X-A: " + "a" * 1900))
        assert wire.answer()[0] == 200
        sent = head(GET, *(f"X-{i}: a" for i in range(300)))
        wire = server.wire().send(sent if whole else sent[:-2])
        assert wire.answer()[0] == 431
        assert wire.is_closed()


def test_a_head_may_come_byte_by_byte(server):
    wire = server.wire()
    for byte in head(GET):
        wire.send(bytes([byte]))
    assert wire.answer()[0] == 200


def test_a_head_that_does_not_end_is_given_up_however_many_bytes_come():
    with wired(HI, limits=Limits(header_s=0.3, linger_s=0.3)) as server:
        wire = server.wire().send(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):  # it was closed
            for _ in range(500):
                wire.send(b"X-A: a\r\n")
                time.sleep(0.01)
            pytest.fail("it was read for 5 s")
        quiet = server.wire()
        assert quiet.is_closed()
        said = server.wire().send(b"GET / HT")
        assert said.answer()[0] == 408


def test_a_connection_without_requests_is_closed_after_a_while():
    with wired(HI, limits=Limits(idle_s=0.3)) as server:
        wire = server.wire().send(head(GET))
        assert wire.answer()[0] == 200
        assert wire.send(head(GET)).answer()[0] == 200, "it is not closed while it is used"
        assert wire.is_closed()


def test_a_body_that_does_not_come_is_given_up():
    with wired(HI, options=ServerOptions(body_s=0.2)) as server:
        wire = server.wire().send(post()[:-5])
        status, _, body = wire.answer()
        assert status == 408 and b"bytes of the body came within 0.2 s" in body


def test_a_body_is_no_larger_than_is_taken_whether_it_says_so_or_not():
    with wired(HI, options=ServerOptions(max_body_bytes=2000)) as server:
        large = json.dumps({**BODY, "user": "x" * 2000}).encode()
        assert server.ask(post(large))[0] == 413
        wire = server.wire().send(head(POST, CHUNKED, "Content-Type: application/json"))
        wire.send(b"%x\r\n%b\r\n" % (len(large), large))
        assert wire.answer()[0] == 413
        assert not server.engine.requests


def test_an_answer_before_the_end_of_the_body_is_sent_and_the_connection_ends():
    with wired(HI, limits=Limits(linger_s=0.3)) as server:
        wire = server.wire().send(head("POST /nowhere HTTP/1.1", "Content-Length: 1000000") + b"a" * 1000)
        assert wire.answer()[0] == 404
        wire.send(b"a" * 1000)
        assert wire.is_closed(), "it does not wait for the rest"


def test_a_request_that_is_refused_before_its_body_has_come_keeps_its_connection(server):
    wire = server.wire()
    for _ in range(3):
        wire.send(head("POST /nowhere HTTP/1.1", "Content-Length: 2000"))
        wire.send(b"a" * 1000).send(b"a" * 1000)
        assert wire.answer()[0] == 404
        assert wire.send(post()).answer()[0] == 200


def test_behind_an_early_answer_and_the_rest_of_its_body_the_next_request_is_read(server):
    wire = server.wire().send(head("POST /nowhere HTTP/1.1", "Content-Length: 2000"))
    assert wire.answer()[0] == 404
    wire.send(b"a" * 2000 + post())
    assert wire.answer()[0] == 200
    assert wire.send(post()).answer()[0] == 200


def test_behind_an_early_answer_a_body_of_chunks_ends_its_connection(server):
    wire = server.wire().send(head("POST /nowhere HTTP/1.1", CHUNKED))
    assert wire.answer()[0] == 404
    wire.send(b"3\r\nabc\r\n0\r\n\r\n" + post())
    assert wire.is_closed(), "where it ends cannot be told from what follows"


def test_bodies_of_all_requests_together_are_bounded():
    options = ServerOptions(max_body_bytes=1024, body_s=20)
    with wired(HI, options=options) as server:
        part = head(POST, "Content-Type: application/json", "Content-Length: 1020") + b"[" * 1000
        waiting = [server.wire().send(part) for _ in range(4)]
        until(lambda: server.ask(post({**BODY, "user": "x" * 200}))[0] == 503)
        _, headers, body = server.ask(post({**BODY, "user": "x" * 200}))
        assert headers["retry-after"] == "2" and b"4,096 bytes" in body
        for wire in waiting:
            wire.close()
        until(lambda: server.ask(post({**BODY, "user": "x" * 200}))[0] == 200)


def test_an_offer_to_speak_http_2_is_passed_over_and_the_body_read(server):
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    wire = server.wire().send(post(BODY, CHAT, *offer))
    status, _, body = wire.answer()
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "hi"
    assert wire.send(head(GET)).answer()[0] == 200, "the connection goes on"


def test_headers_behind_a_body_are_not_heeded():
    door = NeedsKey()
    with wired(HI, door=door) as server:
        body = json.dumps(BODY).encode()
        sent = head(POST, CHUNKED, "Content-Type: application/json") + b"%x\r\n%b\r\n0\r\n" % (len(body), body)
        assert server.ask(sent + b"Authorization: Bearer word\r\n\r\n")[0] == 200
        assert door.presented == [None]


def test_a_request_sent_before_the_answer_to_the_last_is_not_read():
    with wired(HI, step_s=0.02) as server:
        wire = server.wire().send(post() + post() + head(GET))
        status, headers, _ = wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert wire.is_closed() and len(server.engine.requests) == 1


def test_empty_lines_behind_a_body_do_no_harm(server):
    wire = server.wire().send(post() + b"\r\n")
    assert wire.answer()[0] == 200
    assert wire.send(b"\r\n" + head(GET)).answer()[0] == 200


def test_what_waits_for_nothing_makes_room_for_who_comes():
    with wired(HI, limits=Limits(max_connections=2), step_s=0.005, prompt_steps=10**6) as server:
        idle = server.wire().send(head(GET))
        assert idle.answer()[0] == 200
        busy = [server.wire().send(post({**BODY, "stream": True})) for _ in range(2)]
        assert idle.is_closed()
        for wire in busy:
            assert wire.until(b"\r\n").startswith(b"HTTP/1.1 200")
        status, headers, _ = server.wire().answer()
        assert (status, headers["retry-after"]) == (503, "1")
        assert len(server.service.exchanges) == 2, "nobody who is being answered was sent away"


@pytest.mark.parametrize(("request_s", "connection_s"), [(0.5, 60), (60, 0.5)])
def test_a_client_that_reads_nothing_is_given_up_and_the_engine_freed(request_s, connection_s):
    """By whoever answers it, and by its connection."""
    long = saying("</think>" + "some more of it " * 60_000)
    with wired(long, limits=Limits(write_s=connection_s), options=ServerOptions(write_s=request_s)) as server:
        wire = server.wire(receive_bytes=4096).send(post({**BODY, "stream": True, "max_tokens": 300_000}))
        until(lambda: server.engine.aborted)
        until(lambda: not server.service.exchanges and server.service.gate.num_inside == 0)
        assert not server.engine.has_work
        assert wire.is_closed()


@pytest.mark.parametrize("by_the_system", [True, False])
def test_an_answer_that_nobody_reads_does_not_keep_its_connection(by_the_system, monkeypatch):
    """Where the system can be asked to give such a client up, and where it cannot."""
    if not by_the_system:
        monkeypatch.setattr(connection, "_bound_unsent", lambda *_: None)
    with wired(HI, limits=Limits(write_s=0.5, idle_s=60)) as server:
        files = [head("GET /openapi.json HTTP/1.1"), head("GET /ui/vendor/markdown-it.mjs HTTP/1.1")]
        sent = max(files, key=lambda f: len(server.ask(f)[2]))
        wire = server.wire(receive_bytes=4096).send(sent)
        assert wire.until(b"\r\n") == b"HTTP/1.1 200 OK"
        (served,) = server.connections
        if not by_the_system:  # it holds megabytes; what does not fit there waits here
            until(lambda: served.state == "idle")
            served.transport.write(b"a" * (16 << 20))
        assert server.connections
        until(lambda: not server.connections)


def test_a_client_that_has_closed_its_side_is_gone():
    with wired(HI, prompt_steps=10**6, step_s=0.005) as other:
        wire = other.wire().send(post())
        until(lambda: other.engine.requests)
        wire.socket.shutdown(1)
        until(lambda: other.engine.aborted and not other.service.exchanges)


HOSTS = [
    ("127.0.0.1", 200), ("127.0.0.1:8000", 200), ("localhost", 200), ("localhost:1", 200), ("LOCALHOST", 200),
    ("chat.localhost", 200), ("[::1]:8000", 200), ("192.168.0.7", 200), ("localhost.", 200), ("box.example", 200),
    ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
    ("evil.example:80@127.0.0.1", 421), ("xn--localhost", 421), ("127.0.0.1, evil.example", 421),
]  # fmt: skip


@pytest.fixture(scope="module")
def named():
    options = ServerOptions(hosts=("box.example",), cors=("https://chat.example",))
    with wired(HI, options=options) as made:
        yield made


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_without_keys_only_own_names_are_answered(named, host, status):
    found, _, body = named.ask(head(GET, host=host))
    assert found == status, body


ORIGINS = [
    ((), 200),
    (("Origin: http://127.0.0.1",), 200),
    (("Origin: https://chat.example", "Sec-Fetch-Site: cross-site"), 200),
    (("Sec-Fetch-Site: same-origin",), 200),
    (("Sec-Fetch-Site: none",), 200),
    (("Origin: https://evil.example",), 403),
    (("Origin: null",), 403),
    (("Origin: http://127.0.0.1:1",), 403),
    (("Origin: https://chat.example.evil.example",), 403),
    (("Origin: http://127.0.0.1", "Origin: https://evil.example"), 403),
    (("Sec-Fetch-Site: cross-site",), 403),
    (("Sec-Fetch-Site: same-site",), 403),
]


@pytest.mark.parametrize(("headers", "status"), ORIGINS)
def test_without_keys_pages_of_other_sites_cannot_send_anything(named, headers, status):
    found, _, body = named.ask(post(BODY, CHAT, *headers))
    assert found == status, body


def test_a_form_of_another_page_is_refused_without_an_origin_too(named):
    sent = b"messages=x"
    status, _, _ = named.ask(
        head(POST, "Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(sent)}") + sent
    )
    assert status == 415


def test_where_keys_are_needed_names_and_origins_do_not_matter():
    with wired(HI, door=NeedsKey()) as server:
        sent = post(BODY, CHAT, "Origin: https://evil.example").replace(b"Host: 127.0.0.1", b"Host: api.example")
        assert server.ask(sent)[0] == 200


PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type")


def test_a_listed_page_may_call_from_a_browser_and_no_other(named, server):
    options = f"OPTIONS {CHAT} HTTP/1.1"
    status, headers, _ = named.ask(head(options, "Origin: https://chat.example", *PREFLIGHT))
    assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in headers
    status, headers, _ = named.ask(head(options, "Origin: https://evil.example", *PREFLIGHT))
    assert status == 400 and "access-control-allow-origin" not in headers
    status, headers, _ = named.ask(post({}, CHAT, "Origin: https://chat.example"))
    assert status == 400 and headers["access-control-allow-origin"] == "https://chat.example", "errors can be read too"
    status, headers, _ = server.ask(head(options, "Origin: https://chat.example", *PREFLIGHT))
    assert status == 405 and not [name for name in headers if name.startswith("access-control")], (
        "closed unless asked for"
    )


PATHS = [
    ("/v1/models", 200), ("//v1///models", 200), ("/v1/models/", 200), ("/v1/%6dodels", 200),
    ("/v1/models?a=/../b", 200),
    ("/v1/./models", 400), ("/v1/../v1/models", 400), ("/%2e%2e/v1/models", 400), ("/v1/%2E%2e%2fmodels", 400),
    ("/v1/..%2fmodels", 400), ("/v1\\models", 400), ("/v1/%5cmodels", 400), ("/v1/models%00", 400),
    ("/v1/models%0a", 400),
    ("/ui/..%2f..%2fapp.py", 400), ("/ui/%252e%252e/app.py", 404), ("/V1/models", 404),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status"), PATHS)
def test_a_path_is_plain_or_refused(server, path, status):
    found, _, body = server.ask(head(f"GET {path} HTTP/1.1"))
    assert found == status, body


ANSWERS = [
    (head(GET), 200), (head("GET /nowhere HTTP/1.1"), 404), (head(f"GET {CHAT} HTTP/1.1"), 405), (post(b"{"), 400),
    (head("GET /health HTTP/1.1"), 200), (head("GET /a/../b HTTP/1.1"), 400),
    (post(b"a", CHAT, "Content-Encoding: gzip"), 415),
    (post(BODY, CHAT, "X-Request-Deadline: soon"), 400), (post(BODY, CHAT, "X-Request-Deadline: -1"), 400),
    (post(BODY, CHAT, "X-Request-Deadline: nan"), 400), (post(), 200),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "status"), ANSWERS)
def test_every_answer_has_an_id_and_safe_headers(server, sent, status):
    found, headers, body = server.ask(sent)
    assert found == status, body
    assert headers["x-request-id"].startswith(("req-", "chatcmpl-"))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] in ("no-store", "no-cache")
    assert "server" not in headers


def test_ids_of_requests_are_never_the_same(server):
    ids = {server.ask(head(GET))[1]["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


def test_a_fault_of_the_server_is_told_with_its_id_and_nothing_of_it(server, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("the secret of the day")

    monkeypatch.setattr(server.service, "name_for", broken)
    status, headers, body = server.ask(post())
    assert status == 500
    assert headers["x-request-id"] in json.loads(body)["error"]["message"]
    assert b"secret" not in body
    assert headers["x-request-id"] in caplog.text
    monkeypatch.undo()
    assert server.ask(post())[0] == 200


BOMBS = {
    "nested lists": (b'{"messages":' + b"[" * 100_000, "nested too deep"),
    "nested objects": (b'{"a":' * 100_000, "nested too deep"),
    "an integer of a million digits": (b'{"seed":' + b"1" * 1_000_000 + b"}", "not JSON"),
    "millions of values": (b'{"messages":[' + b"[]," * 5_000_000 + b"[]]}", "and up to 4,194,304 are read"),
    "not a number": (b'{"temperature":NaN}', "NaN is no JSON"),
    "half a character": (b'{"messages":"\xc3"}', "not UTF-8"),
    "no object": (b"[]", "an object was expected"),
}


@pytest.mark.parametrize(("body", "said"), BOMBS.values(), ids=BOMBS.keys())
def test_a_body_that_would_hurt_is_refused(server, body, said):
    status, _, text = server.ask(post(body))
    assert status == 400 and said in json.loads(text)["error"]["message"]
    assert server.ask(post())[0] == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-out", made[0], "-keyout", made[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(made[0]), str(made[1])


def test_tls_by_a_certificate_and_its_key(certificate):
    options = ServerOptions(tls_certificate=certificate[0], tls_key=certificate[1], header_s=2)
    trusting = ssl.create_default_context(cafile=certificate[0])
    with wired(HI, options=options, limits=Limits(linger_s=0.3)) as server:
        wire = server.wire(tls=trusting).send(post())
        assert wire.answer()[0] == 200
        assert wire.send(head(GET)).answer()[0] == 200
        refused = server.wire(tls=trusting).send(b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert refused.answer()[0] == 400
        assert refused.is_closed()
        silent = server.wire()
        plain = server.wire().send(head(GET))
        assert plain.is_closed(), "nobody is answered without it"
        assert silent.is_closed(), "nobody is waited for either"
