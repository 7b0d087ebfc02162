"""`/account/...` and `/admin/...` over HTTP."""

import csv
import io

import pytest

from pyrosome.server.caller import ACCOUNT, ADMIN, GENERATE, SCOPES, SESSIONS
from pyrosome.server.keys import book
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from tests.server.keys.serving import BODY, TALK, guarded
from tests.server.scripted import saying, scripted

TALKS = [GENERATE, SESSIONS, ACCOUNT]


@pytest.fixture
def server(sqlite_store):
    with guarded(sqlite_store, price=Price(1_000_000, 0, 1_000_000), sign_up=True) as running:
        yield running


def error(reply, status):
    assert reply.status_code == status, reply.text
    return reply.json()["error"]["message"]


def test_an_account_manages_its_keys_from_the_first_to_the_last(server):
    client = server.client(server.key(scopes=TALKS, name="first")[1])
    made = client.post("/account/keys", json={"name": "app", "scopes": ["generate"], "limits": {"requests_per_min": 5}})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key, secret = made.json()["id"], made.json()["secret"]
    assert secret.startswith(made.json()["prefix"])
    assert made.json()["limits"]["requests_per_min"] == 5
    assert server.client(secret).post(TALK, json=BODY).status_code == 200

    listed = client.get("/account/keys").json()["data"]
    assert sorted(k["name"] for k in listed) == ["app", "first"]  # both may be of the same second
    assert not any("secret" in k for k in listed)
    changed = client.patch(
        f"/account/keys/{key}", json={"name": "app 2", "expires": "1d", "limits": {"max_concurrent": 2}}
    )
    assert (changed.json()["name"], changed.json()["limits"]["requests_per_min"]) == ("app 2", 5)
    assert client.get(f"/account/keys/{key}").json() == changed.json()

    rotated = client.post(f"/account/keys/{key}/rotate", json={"grace": "1h"}).json()
    for one in (secret, rotated["secret"]):
        assert server.client(one).get("/v1/models").status_code == 200
    assert rotated["old_secret_until"]
    gone = client.post(f"/account/keys/{key}/revoke").json()["data"]
    assert [(k["id"], k["state"]) for k in gone] == [(key, "revoked")]
    for one in (secret, rotated["secret"]):
        assert server.client(one).get("/v1/models").status_code == 401
    assert "revoked" in error(client.post(f"/account/keys/{key}/rotate", json={}), 409)


def test_an_account_sees_its_own_usage_by_day_key_and_model_and_as_csv(server):
    account = server.account("mine")
    key, text = server.key(account, TALKS, name="first")
    _, theirs = server.key(server.account("theirs"))
    server.client(text).post(TALK, json={**BODY, "model": "m1"})
    server.client(text).post(TALK, json={**BODY, "model": "m2"})
    server.client(theirs).post(TALK, json=BODY)
    client = server.client(text)
    by_model = client.get("/account/usage", params={"by": "model"}).json()
    assert [r["model"] for r in by_model["data"]] == ["m1", "m2"]
    assert by_model["total"]["requests"] == 2
    assert by_model["total"]["cost_micro"] == sum(r["cost_micro"] for r in by_model["data"]) > 0
    assert [r["key"] for r in client.get("/account/usage?by=key").json()["data"]] == [key]
    assert len(client.get("/account/usage").json()["data"]) == 1
    assert client.get("/account/usage?from=2001-01-01&to=2001-12-31").json()["data"] == []
    reply = client.get("/account/usage.csv")
    assert reply.headers["content-type"].startswith("text/csv")
    assert "attachment" in reply.headers["content-disposition"]
    assert [r["model"] for r in csv.DictReader(io.StringIO(reply.text))] == ["m1", "m2"]
    me = client.get("/account/me").json()
    assert me["account"]["name"] == "mine"
    assert me["spent_micro"] == me["spent_by_key_micro"] == by_model["total"]["cost_micro"]
    assert me["price"] == {"prompt_micro": 1_000_000, "cached_micro": 0, "output_micro": 1_000_000}


def test_a_made_key_sees_its_own_usage_and_not_its_accounts(server):
    _, text = server.key(scopes=TALKS)
    child = server.client(text).post("/account/keys", json={"name": "child", "scopes": TALKS}).json()
    server.client(text).post(TALK, json=BODY)
    client = server.client(child["secret"])
    assert client.get("/account/usage").json()["total"]["requests"] == 0
    assert len(client.get("/account/usage.csv").text.splitlines()) == 1
    assert "spent_micro" not in client.get("/account/me").json()
    client.post(TALK, json=BODY)
    assert client.get("/account/usage?by=key").json()["data"][0]["key"] == child["id"]
    assert server.client(text).get("/account/usage").json()["total"]["requests"] == 2


def test_another_accounts_keys_are_not_there(server):
    _, mine = server.key(scopes=TALKS)
    theirs, _ = server.key(scopes=TALKS)
    client = server.client(mine)
    unknown = client.get("/account/keys/nosuchkey000")
    for reply in (
        client.get(f"/account/keys/{theirs}"),
        client.patch(f"/account/keys/{theirs}", json={"name": "x"}),
        client.post(f"/account/keys/{theirs}/revoke"),
        client.post(f"/account/keys/{theirs}/rotate", json={}),
    ):
        assert reply.status_code == 404
        assert reply.json() == {
            **unknown.json(),
            "error": {**unknown.json()["error"], "message": f"there is no key '{theirs}'"},
        }
    assert server.store.read(lambda c: book.key(c, theirs)).revoked is None


@pytest.mark.parametrize("scope", sorted(set(SCOPES) - {GENERATE, ACCOUNT}))
def test_a_key_cannot_climb(server, scope):
    key, text = server.key(scopes=[GENERATE, ACCOUNT], limits=Limits(60))
    client = server.client(text)
    assert scope in error(client.post("/account/keys", json={"name": "x", "scopes": [scope]}), 403)
    assert scope in error(client.patch(f"/account/keys/{key}", json={"scopes": [GENERATE, scope]}), 403)
    assert "requests_per_min" in error(
        client.post("/account/keys", json={"name": "x", "limits": {"requests_per_min": 61}}), 403
    )
    error(client.patch(f"/account/keys/{key}", json={"limits": {"requests_per_min": None}}), 403)
    free = {"prompt_micro": 0, "cached_micro": 0, "output_micro": 0}
    assert "unknown" in error(client.post("/account/keys", json={"name": "x", "price": free}), 400)
    assert "unknown" in error(client.patch(f"/account/keys/{key}", json={"account": "acct-other"}), 400)


@pytest.mark.parametrize(
    "path", ["/admin/keys", "/admin/accounts", "/admin/invites", "/admin/usage", "/admin/usage.csv"]
)
def test_the_administration_is_closed_to_all_other_scopes(server, path):
    _, text = server.key(scopes=sorted(set(SCOPES) - {ADMIN}))
    for client, status in ((server.client(text), 403), (server.client(), 401)):
        assert client.get(path).status_code == status
        assert client.post(path.removesuffix(".csv"), json={"name": "x"}).status_code in (status, 405)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "name is None"), ({"name": ""}, "name is"), ({"name": "a\nb"}, "name is"), ({"name": 5}, "name is"),
        ({"name": "x", "scopes": ["root"]}, "'root' is unknown"), ({"name": "x", "scopes": "generate"}, "scopes is"),
        ({"name": "x", "expires": "yesterday"}, "expires is"), ({"name": "x", "limits": {"rpm": 5}}, "'rpm'"),
        ({"name": "x", "limits": {"max_concurrent": 0}}, "max_concurrent is 0"), ({"name": "x", "id": "y"}, "'id'"),
        ({"name": "x", "limits": [1]}, "limits is"), ({"name": "x", "scopes": [["a"]]}, "unknown"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_a_400_that_names_the_field(server, body, words):
    _, text = server.key(scopes=TALKS)
    assert words in error(server.client(text).post("/account/keys", json=body), 400)


def test_an_admin_manages_accounts_keys_and_prices(server):
    admin = server.client(server.key(scopes=SCOPES, name="root")[1])
    limits = {"requests_per_min": 7}
    account = admin.post("/admin/accounts", json={"name": "ACME", "limits": limits}).json()
    price = {"prompt_micro": 0, "cached_micro": 0, "output_micro": 5_000_000}
    made = admin.post("/admin/keys", json={"account": account["id"], "name": "k", "price": price})
    assert made.status_code == 201
    key, client = made.json()["id"], server.client(made.json()["secret"])
    assert made.json()["scopes"] == ["generate", "sessions"]
    reply = client.post(TALK, json=BODY)
    assert reply.headers["x-ratelimit-limit-requests"] == "7"
    rows = admin.get("/admin/usage", params={"by": "account,key", "account": account["id"]}).json()["data"]
    tokens = reply.json()["usage"]["completion_tokens"]
    assert [(r["account"], r["key"], r["cost_micro"]) for r in rows] == [(account["id"], key, 5 * tokens)]
    listed = {a["name"]: a for a in admin.get("/admin/accounts").json()["data"]}
    assert listed["ACME"]["spent_micro"] == 5 * tokens
    assert [k["id"] for k in admin.get("/admin/keys", params={"account": account["id"]}).json()["data"]] == [key]
    assert len(admin.get("/admin/keys").json()["data"]) == 2
    admin.patch(f"/admin/keys/{key}", json={"scopes": ["metrics"], "price": None})
    assert client.post(TALK, json=BODY).status_code == 403
    admin.patch(f"/admin/accounts/{account['id']}", json={"closed": True, "name": "ACME Ltd"})
    assert "closed" in error(client.get("/v1/models"), 401)
    admin.patch(f"/admin/accounts/{account['id']}", json={"closed": False})
    second = admin.post(f"/admin/keys/{key}/rotate", json={}).json()["secret"]
    assert client.get("/metrics").status_code == 401
    assert server.client(second).get("/v1/models").status_code == 403
    admin.post(f"/admin/keys/{key}/revoke")
    assert "revoked" in error(server.client(second).get("/v1/models"), 401)
    text = admin.get("/admin/usage.csv", params={"key": key}).text
    assert [r["account_name"] for r in csv.DictReader(io.StringIO(text))] == ["ACME Ltd"]


def test_what_an_admin_names_wrongly_is_a_404_or_a_400(server):
    admin = server.client(server.key(scopes=SCOPES)[1])
    assert "no account" in error(admin.post("/admin/keys", json={"account": "nobody", "name": "x"}), 404)
    assert "account is missing" in error(admin.post("/admin/keys", json={"name": "x"}), 400)
    assert "no account" in error(admin.patch("/admin/accounts/nobody", json={"name": "x"}), 404)
    assert "no key" in error(admin.patch("/admin/keys/nobody", json={"name": "x"}), 404)
    assert "no invite" in error(admin.post("/admin/invites/nobody/revoke"), 404)
    assert "closed is 1" in error(admin.patch("/admin/accounts/nobody", json={"closed": 1}), 400)
    assert "uses is 0" in error(admin.post("/admin/invites", json={"name": "x", "uses": 0}), 400)
    assert "price needs" in error(admin.post("/admin/accounts", json={"name": "x", "price": {"prompt_micro": 1}}), 400)
    assert "summed by 'x'" in error(admin.get("/admin/usage?by=x"), 400)
    assert "from is" in error(admin.get("/admin/usage?from=x"), 400)


@pytest.mark.parametrize("name", ["%00", "%ff", "%ed%a0%80", "..%2f..%2fetc", "'%20OR%201=1--", "%F0%9F%98%80" * 300])
def test_no_name_in_an_address_breaks_anything(store, name):
    with guarded(store) as server:
        admin = server.client(server.key(scopes=SCOPES)[1])
        for path in (f"/account/keys/{name}", f"/admin/usage?account={name}", f"/admin/keys?account={name}",
                     f"/admin/usage.csv?key={name}", f"/account/usage?from={name}&by={name}"):  # fmt: skip
            assert admin.get(path).status_code in (200, 400, 404)
        reply = admin.post("/admin/keys", content=b'{"name": "x", "account": "\\ud800\\u0000"}',
                           headers={"content-type": "application/json"})  # fmt: skip
        assert reply.status_code in (400, 404)


def test_whoever_has_an_invite_code_signs_up_and_talks(server):
    admin = server.client(server.key(scopes=SCOPES)[1])
    invite = admin.post("/admin/invites", json={"name": "friends", "uses": 1, "limits": {"requests_per_min": 3}}).json()
    anybody = server.client()
    assert anybody.get("/account/about").json() == {"keys": "needed", "sign_up": True}
    made = anybody.post("/account/sign-up", json={"code": f" {invite['code']} ", "name": "newcomer"})
    assert made.status_code == 201
    client = server.client(made.json()["secret"])
    assert client.post(TALK, json=BODY).headers["x-ratelimit-limit-requests"] == "3"
    assert client.get("/account/me").json()["account"]["name"] == "newcomer"
    assert "not valid" in error(anybody.post("/account/sign-up", json={"code": invite["code"], "name": "x"}), 403)
    listed = admin.get("/admin/invites").json()["data"]
    assert [(i["uses_left"], i["state"]) for i in listed] == [(0, "over")]
    assert "code" not in listed[0]
    for body in (
        {"name": "x"},
        {"code": 5, "name": "x"},
        {"code": invite["code"]},
        {"code": "x", "name": "x", "scopes": ["admin"]},
    ):
        assert anybody.post("/account/sign-up", json=body).status_code == 400
    second = admin.post("/admin/invites", json={"name": "more"}).json()
    admin.post(f"/admin/invites/{second['id']}/revoke")
    assert "not valid" in error(anybody.post("/account/sign-up", json={"code": second["code"], "name": "x"}), 403)


def test_nobody_signs_up_where_that_is_off(sqlite_store):
    with guarded(sqlite_store) as server:
        admin = server.client(server.key(scopes=SCOPES)[1])
        code = admin.post("/admin/invites", json={"name": "x"}).json()["code"]
        assert "--sign-up" in error(server.client().post("/account/sign-up", json={"code": code, "name": "x"}), 403)
        assert server.client().get("/account/about").json()["sign_up"] is False


def test_a_server_without_keys_has_no_accounts():
    with scripted(saying("x")) as (client, _, _):
        for path in ("/account/keys", "/admin/keys", "/account/about", "/admin/usage.csv"):
            assert "--keys off" in error(client.get(path), 404)


def test_the_page_is_there_for_everybody_and_knows_nothing(server):
    client = server.client()
    for path in ("/admin", "/account"):
        reply = client.get(path)
        assert reply.status_code == 200
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert "<script>" not in reply.text
        assert " on" not in reply.text.replace(" on ", "").split("<body")[1].split(">")[0]
    assert client.get("/ui/admin.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/ui/admin.css").headers["content-type"].startswith("text/css")
    assert client.get("/ui/admin.html").status_code == 404
    assert client.get("/ui/../admin.js").status_code in (400, 404)


def test_the_openapi_document_has_every_route(server):
    document = server.client().get("/openapi.json").json()["paths"]
    for path in (
        "/account/about", "/account/sign-up", "/account/me", "/account/keys", "/account/keys/{key_id}",
        "/account/keys/{key_id}/revoke", "/account/keys/{key_id}/rotate", "/account/usage", "/account/usage.csv",
        "/admin/accounts", "/admin/accounts/{account_id}", "/admin/keys", "/admin/keys/{key_id}",
        "/admin/keys/{key_id}/revoke", "/admin/keys/{key_id}/rotate", "/admin/invites",
        "/admin/invites/{invite_id}/revoke", "/admin/usage", "/admin/usage.csv",
    ):  # fmt: skip
        for operation in document[path].values():
            assert {"401", "404"} <= operation["responses"].keys()
            named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert all("{" + n + "}" in path for n in named)
            assert path.count("{") == len(named)
