"""One account's prompts cannot be found out by another: nothing is shared, so nothing is faster."""

import contextlib

import httpx2 as httpx
import pytest
from sqlalchemy import text as sql

from pyrosome.engine.loaded import open_engine
from pyrosome.engine.worker import EngineThread
from pyrosome.options import EngineOptions, ServerOptions
from pyrosome.server.caller import SCOPES
from pyrosome.server.keys import book
from pyrosome.server.keys.door import KeyDoor
from pyrosome.server.keys.store import Store
from pyrosome.server.service import Service
from tests.server.scripted import MODEL, running

SECRET = "the launch is on the ninth of May at the old harbour " * 30
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


class Tenants:
    """A server on the built-in model, and clients of accounts of their own."""

    def __init__(self, url, service, store):
        self.url, self.service, self.store = url, service, store
        self.open = contextlib.ExitStack()

    def account(self):
        account = self.store.write(lambda c: book.create_account(c, 0.0, "a")).id
        return account, self.client(account)

    def client(self, account):
        text = self.store.write(lambda c: book.create_key(c, 0.0, account, "k", frozenset(SCOPES)))[1].text
        headers = {"Authorization": f"Bearer {text}", "X-Cache-Explain": "1"}
        return self.open.enter_context(httpx.Client(base_url=self.url, headers=headers, timeout=120))

    def computed(self):
        """Tokens that went through the network so far."""
        return self.service.driver.call("stats").computed_tokens


@pytest.fixture(scope="module")
def tenants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    store = Store(f"sqlite:///{folder / 'keys.db'}")
    options, engine = ServerOptions(state_path=str(folder)), EngineOptions(cache_bytes=64 << 20, drafter="off")
    make = lambda: EngineThread(lambda: open_engine(MODEL, cache_bytes=64 << 20, drafter="off"))  # noqa: E731
    service = Service(MODEL, options, engine, make_driver=make, door=KeyDoor(store, is_needed=True))
    with running(service) as url:
        made = Tenants(url, service, store)
        with made.open:
            yield made


def asked(client, path, text, **extra):
    """Cached tokens of a question that holds the text."""
    message = [{"role": "user", "content": text}]
    body = {
        "/v1/chat/completions": {"messages": message, "max_tokens": 1},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/messages": {"messages": message, "max_tokens": 1},
        "/v1/responses": {"input": text, "max_output_tokens": 1},
    }[path]
    answer = client.post(path, json={**body, **extra})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    if path == "/v1/messages":
        return usage["cache_read_input_tokens"]
    return usage.get("prompt_tokens_details", usage.get("input_tokens_details"))["cached_tokens"]


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_of_another_account_is_as_new_as_any(tenants, path):
    text = f"{path} {SECRET}"
    _, mine = tenants.account()
    _, other = tenants.account()
    assert asked(mine, path, text) == 0
    assert asked(mine, path, text) >= 128, "its own prompt is found again"
    before = tenants.computed()
    assert asked(other, path, text) == 0
    guessed = tenants.computed() - before
    before = tenants.computed()
    assert asked(other, path, text.replace("ninth", "tenth").replace(path, "never")) == 0
    assert tenants.computed() - before == pytest.approx(guessed, abs=40), "a right guess costs what a wrong one does"


def test_keys_of_one_account_share_and_its_users_do_not(tenants):
    path, text = PATHS[0], f"users {SECRET}"
    account, mine = tenants.account()
    assert asked(mine, path, text) == 0
    assert asked(tenants.client(account), path, text) >= 128
    assert asked(mine, path, text, user_id="u1") == 0
    assert asked(mine, path, text, user_id="u1") >= 128
    assert asked(mine, path, text, cache_salt="u2") == 0


def test_no_salt_that_a_client_can_name_is_another_account_s(tenants):
    path, text = PATHS[0], f"named {SECRET}"
    account, mine = tenants.account()
    _, other = tenants.account()
    assert asked(mine, path, text, user_id="u1") == 0
    salt = tenants.store.read(lambda c: c.scalar(sql("SELECT salt FROM accounts WHERE id = :of"), {"of": account}))
    assert len(salt) > 20
    for guess in (salt, f"{salt}/u1", f"/{salt}/u1", f"../{salt}/u1", "u1", f"#{salt}"):
        assert asked(other, path, text, user_id=guess) == 0


def test_sessions_and_what_is_told_of_the_cache_keep_to_the_account(tenants):
    text = f"sessions {SECRET}"
    _, mine = tenants.account()
    _, other = tenants.account()
    made = mine.post("/v1/sessions", json={"text": text}).json()
    mine.post(f"/v1/sessions/{made['id']}/generate", json={"max_tokens": 1})
    assert asked(mine, "/v1/completions", text) >= 128
    answer = other.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    assert "no common prefix" in answer.headers["x-cache-explain"]
    there, nowhere = (other.get(f"/v1/sessions/{i}") for i in (made["id"], "0" * len(made["id"])))
    assert (there.status_code, nowhere.status_code) == (404, 404)
    assert there.text.replace(made["id"], "") == nowhere.text.replace("0" * len(made["id"]), "")
