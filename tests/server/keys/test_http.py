"""Keys at the door of a running server."""

import csv
import io
import socket
import threading

import pytest

from pyrosome.server.caller import ACCOUNT, ADMIN, GENERATE
from pyrosome.server.keys import book
from pyrosome.server.keys.keys import KEY, new_secret
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from pyrosome.server.keys.usage import Slice, csv_text, sums
from tests.server.keys.serving import BODY, TALK, guarded
from tests.server.scripted import until, written


def total(store):
    (found,) = store.read(lambda c: sums(c, Slice()))
    return found


def test_a_request_with_a_key_is_answered_and_its_line_is_there_before_the_answer_ends(store):
    with guarded(store, price=Price(1_000_000, 0, 1_000_000)) as server:
        key, text = server.key(name="laptop")
        reply = server.client(text).post(TALK, json=BODY)
        assert reply.status_code == 200
        used = reply.json()["usage"]
        (row,) = store.read(lambda c: sums(c, Slice(), ["key", "model"]))
        assert (row["key"], row["model"], row["requests"]) == (key, "builtin:nano", 1)
        assert (row["prompt_tokens"], row["output_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
        uncached = used["prompt_tokens"] - used["prompt_cache_hit_tokens"]
        assert row["cost_micro"] == uncached + used["completion_tokens"]


def test_a_streams_line_is_there_before_its_last_chunk(store):
    with guarded(store) as server:
        _, text = server.key()
        with server.client(text).stream("POST", TALK, json={**BODY, "stream": True}) as reply:
            for line in reply.iter_lines():
                if '"finish_reason":"stop"' in line.replace(" ", ""):
                    assert total(store)["requests"] == 1
                    break
            else:
                pytest.fail("no last chunk came")


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_a_key_may_come_in_any_of_its_headers(sqlite_store, header):
    with guarded(sqlite_store) as server:
        _, text = server.key()
        value = f"bearer  {text}" if header == "authorization" else text
        assert server.client().post(TALK, json=BODY, headers={header: value}).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind"), [(TALK, "openai"), ("/v1/models", "openai"), ("/anthropic/v1/messages", "anthropic")]
)
def test_without_a_key_nothing_is_answered_in_each_protocols_words(sqlite_store, path, kind):
    with guarded(sqlite_store) as server:
        client = server.client()
        reply = client.get(path) if path.endswith("models") else client.post(path, json=BODY)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert error["type"] == "authentication_error"
        assert "a key is needed" in error["message"]
        assert (reply.json().get("type") == "error") == (kind == "anthropic")
        assert server.engine.requests == []


def test_keys_that_could_be_read_in_two_ways_are_refused(sqlite_store):
    with guarded(sqlite_store) as server:
        _, one = server.key()
        _, other = server.key()

        def status(*headers):
            with server.client() as client:
                return client.post(TALK, json=BODY, headers=list(headers)).status_code

        bearer = ("authorization", f"Bearer {one}")
        assert status(bearer, ("x-api-key", other)) == 400
        assert status(bearer, ("api-key", other)) == 400
        assert status(bearer, ("authorization", f"Bearer {other}")) == 400
        assert status(bearer, bearer) == 400
        assert status(("x-api-key", one), ("x-api-key", one)) == 400
        assert status(bearer, ("x-api-key", one)) == 200
        assert status(("authorization", "Basic eDp5"), ("x-api-key", one)) == 200
        assert status(("authorization", f"Bearer {one}, Bearer {other}")) == 401
        assert status(("authorization", f"Bearer {one}\t{other}")) == 401
        assert status(("x-api-key", new_secret(KEY).text)) == 401
        assert status(("authorization", f"Bearer {one[:-1]}")) == 401


def test_header_bytes_that_are_no_text_are_no_key(sqlite_store):
    with guarded(sqlite_store) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for value in (b"Bearer \xff\xfe", b"Bearer pyr-" + b"\xe9" * 46, b"Bearer " + b"a" * 8000):
            with socket.create_connection((host, int(port)), 10) as raw:
                raw.sendall(
                    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: " + value + b"\r\nConnection: close\r\n\r\n"
                )
                answer = b""
                while part := raw.recv(65536):
                    answer += part
            assert answer.split(b"\r\n")[0].split()[1] == b"401", answer[:200]


def test_a_key_without_the_scope_is_told_which_it_lacks(sqlite_store):
    with guarded(sqlite_store) as server:
        _, text = server.key(scopes=[ACCOUNT])
        reply = server.client(text).post(TALK, json=BODY)
        assert reply.status_code == 403
        assert "'generate'" in reply.json()["error"]["message"]
        assert server.engine.requests == []
        _, talks = server.key(scopes=[GENERATE])
        for path in ("/account/keys", "/admin/keys", "/admin/usage.csv"):
            assert server.client(talks).get(path).status_code == 403


def test_the_limits_are_told_in_the_head_of_every_answer_and_a_429_says_when_to_come_again(sqlite_store):
    with guarded(sqlite_store) as server:
        _, text = server.key(limits=Limits(requests_per_min=2, tokens_per_min=1000))
        client = server.client(text)
        first = client.post(TALK, json=BODY)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) == 1000 - first.json()["usage"]["prompt_tokens"]
        client.post(TALK, json={**BODY, "stream": True})
        third = client.post(TALK, json=BODY)
        assert third.status_code == 429
        assert 1 <= int(third.headers["retry-after"]) <= 60
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert total(sqlite_store)["requests"] == 2
        assert client.get("/v1/models").status_code == 200, "what generates nothing is not counted"


def test_a_spent_budget_is_a_402(sqlite_store):
    with guarded(sqlite_store, price=Price(0, 0, 1_000_000)) as server:
        _, text = server.key(limits=Limits(budget_micro=52))
        client = server.client(text)
        assert client.post(TALK, json=BODY).status_code == 200
        reply = client.post(TALK, json=BODY)
        assert reply.status_code == 402
        assert reply.json()["error"]["code"] == "insufficient_quota"
        left = 52 - total(sqlite_store)["output_tokens"]
        assert client.post(TALK, json={**BODY, "max_tokens": left}).status_code == 200


def test_requests_that_run_hold_their_places_until_they_end_or_their_clients_leave(sqlite_store):
    with guarded(sqlite_store) as server:
        _, text = server.key(limits=Limits(max_concurrent=1))
        server.engine.hold.set()
        client = server.client(text)
        with client.stream("POST", TALK, json={**BODY, "stream": True}):
            assert client.post(TALK, json=BODY).status_code == 429
        until(lambda: total(sqlite_store)["requests"] == 1)
        server.engine.hold.clear()
        until(lambda: client.post(TALK, json=BODY).status_code == 200)


def test_two_accounts_never_share_a_prefix_and_two_keys_of_one_do(sqlite_store):
    with guarded(sqlite_store) as server:
        account = server.account()
        for of in (account, account, None):
            _, text = server.key(of)
            server.client(text).post(TALK, json=BODY)
            server.client(text).post(TALK, json={**BODY, "cache_salt": "x"})
        salts = [r.salt for r in server.engine.requests]
        assert salts[0] == salts[2] != salts[4]
        assert salts[1] == salts[3] != salts[5]
        assert len(set(salts)) == 4
        assert "" not in salts


def test_a_client_cannot_name_its_way_into_anothers_salt(sqlite_store):
    with guarded(sqlite_store) as server:
        _, one = server.key()
        _, other = server.key()
        server.client(one).post(TALK, json=BODY)
        victim = server.engine.requests[0].salt
        for salt in (victim, f"../{victim}", f"/{victim}", ""):
            server.client(other).post(TALK, json={**BODY, "cache_salt": salt})
            assert server.engine.requests[-1].salt != victim


def test_where_no_key_is_needed_a_dummy_is_welcome_and_usage_is_written(sqlite_store):
    with guarded(sqlite_store, is_needed=False) as server:
        key, text = server.key()
        for presented in ("", "sk-dummy", new_secret(KEY).text, text):
            assert server.client(presented).post(TALK, json=BODY).status_code == 200
        rows = sqlite_store.read(lambda c: sums(c, Slice(), ["key"]))
        assert {r["key"]: r["requests"] for r in rows} == {"": 3, key: 1}
        assert [r.salt for r in server.engine.requests][:3] == [""] * 3
        for path in ("/admin/keys", "/account/keys", "/admin/usage"):
            reply = server.client("sk-dummy").get(path)
            assert reply.status_code == 401, "a stranger could make a key that opens the door from elsewhere"
        assert server.client(text).get("/admin/keys").status_code == 200


def test_a_key_revoked_while_its_request_runs_lets_that_one_end_and_no_other_begin(sqlite_store):
    with guarded(sqlite_store) as server:
        _, admin = server.key(scopes=[ADMIN])
        key, text = server.key()
        server.engine.hold.set()
        with server.client(text).stream("POST", TALK, json={**BODY, "stream": True}) as reply:
            assert server.client(admin).post(f"/admin/keys/{key}/revoke").status_code == 200
            assert server.client(text).post(TALK, json=BODY).status_code == 401
            server.engine.hold.clear()
            assert reply.read().endswith(b"data: [DONE]\n\n")


def test_many_guesses_open_nothing_and_hold_nobody_up(sqlite_store):
    with guarded(sqlite_store) as server:
        key, text = server.key()
        answers = []

        def guess():
            for _ in range(25):
                with server.client(new_secret(KEY, key).text) as client:
                    reply = client.post(TALK, json=BODY)
                answers.append((reply.status_code, reply.json()["error"]["message"]))

        threads = [threading.Thread(target=guess) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert server.client(text).post(TALK, json=BODY).status_code == 200
        for thread in threads:
            thread.join()
        assert len(answers) == 100
        assert len(set(answers)) == 1
        assert answers[0][0] == 401


def test_a_model_name_that_a_client_made_up_is_harmless_in_a_spreadsheet(sqlite_store):
    with guarded(sqlite_store, written_script()) as server:
        account = server.account('=HYPERLINK("http://evil")')
        _, text = server.key(account, name="@SUM(A1)")
        server.client(text).post(TALK, json={**BODY, "model": "+cmd|' /C calc'!A0"})
        rows = list(csv.DictReader(io.StringIO("".join(csv_text(sqlite_store, Slice())))))
        (row,) = rows
        assert row["account_name"] == '\'=HYPERLINK("http://evil")'
        assert row["key_name"] == "'@SUM(A1)"
        assert row["model"] == "'+cmd|' /C calc'!A0"
        assert row["cost"] == "0.00"


def written_script():
    return lambda request: [written("yes")]


def test_a_server_that_closed_has_written_everything(store, database_url):
    with guarded(store) as server:
        key, text = server.key()
        server.client(text).post(TALK, json=BODY)
    row = store.read(lambda c: book.key(c, key))
    assert row.last_used is not None
    assert total(store)["requests"] == 1
