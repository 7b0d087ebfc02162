"""`pyrosome keys`, beside a server or without one."""

import csv
import io
import json
import stat
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from pyrosome.cli import app
from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.caller import SCOPES
from pyrosome.server.keys import book
from pyrosome.server.keys.door import door_for
from pyrosome.server.keys.keys import KEY, new_secret
from pyrosome.server.keys.ledger import add
from pyrosome.server.keys.store import Store, open_store
from tests.server.keys.lines import line
from tests.server.keys.serving import BODY, TALK, guarded
from tests.server.scripted import until


class Command:
    """Runs `pyrosome keys` on one store."""

    def __init__(self, *where):
        self.where = where

    def __call__(self, *arguments, **options):
        self.said = CliRunner().invoke(app, ["keys", *arguments, *self.where], **options)
        if isinstance(self.said.exception, RequestError):
            raise self.said.exception
        assert self.said.exit_code == 0, self.said.output
        return self.said.stdout

    def json(self, *arguments):
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def keys(tmp_path):
    return Command("--state", str(tmp_path))


@pytest.fixture
def keys_anywhere(database_url):
    return Command("--database", database_url)


def test_the_first_key_makes_a_server_start(keys, tmp_path):
    options = ServerOptions(host="0.0.0.0", state_path=str(tmp_path))
    with pytest.raises(RequestError, match="there is no key yet"):
        door_for(options)
    text = keys("create", "--admin").strip()
    assert text.startswith(KEY)
    assert "admin" in keys.said.stderr
    assert text not in keys.said.stderr
    assert stat.S_IMODE((tmp_path / "server.db").stat().st_mode) == 0o600
    door_for(options).close()
    (key,) = keys.json("list")
    assert (key["name"], set(key["scopes"])) == ("admin", set(SCOPES))


def test_a_keys_life(keys_anywhere):
    keys = keys_anywhere
    made = keys.json("create", "laptop", "--requests-per-min", "60", "--budget", "12.50", "--expires", "30d")
    assert made["limits"] == {
        "requests_per_min": 60,
        "tokens_per_min": None,
        "max_concurrent": None,
        "budget_micro": 12_500_000,
    }
    assert made["scopes"] == ["generate", "sessions"]
    assert keys.json("rename", "laptop", "desk")["id"] == made["id"]
    assert keys.json("scope", made["id"], "generate", "account")["scopes"] == ["generate", "account"]
    assert keys.json("expire", KEY + made["id"], "none")["expires"] is None
    assert keys.json("expire", made["secret"], "2999-01-01")["expires"] == "2999-01-01T00:00:00Z"
    limits = keys.json("limits", "desk", "--budget", "none", "--concurrent", "2", "--price", "0.28,0.028,0.42")
    assert limits["limits"] == {
        "requests_per_min": 60,
        "tokens_per_min": None,
        "max_concurrent": 2,
        "budget_micro": None,
    }
    assert limits["price"] == {"prompt_micro": 280_000, "cached_micro": 28_000, "output_micro": 420_000}
    assert keys.json("limits", "desk", "--price", "none")["price"] is None
    assert keys.json("show", "desk")["limits"] == limits["limits"]
    rotated = keys.json("rotate", "desk", "--grace", "1h")
    assert rotated["id"] == made["id"]
    assert rotated["secret"] != made["secret"]
    assert rotated["old_secret_until"]
    assert [k["state"] for k in keys.json("revoke", "desk")] == ["revoked"]
    assert keys.json("revoke", made["id"]) == []
    assert keys.json("list") == []
    assert [k["id"] for k in keys.json("list", "--all")] == [made["id"]]


def test_in_words_it_says_the_same(keys):
    keys("create", "laptop", "--concurrent", "2")
    assert "laptop" in keys("list")
    assert "concurrent 2" in keys("show", "laptop")
    assert "budget 0.50" in keys("limits", "laptop", "--budget", "0.5")
    assert "laptop is revoked" in keys("revoke", "laptop")
    keys("list")
    assert "There are no keys" in keys.said.stderr
    keys("usage")
    assert "Nothing was used" in keys.said.stderr


def test_accounts_and_invites(keys_anywhere):
    keys = keys_anywhere
    account = keys.json("accounts", "create", "ACME", "--tokens-per-min", "5000")
    keys("create", "theirs", "--account", "ACME")
    assert [k["account"] for k in keys.json("list", "--account", account["id"])] == [account["id"]]
    assert keys.json("accounts", "limits", "ACME", "--budget", "5")["limits"]["budget_micro"] == 5_000_000
    assert keys.json("accounts", "rename", "ACME", "ACME Ltd")["name"] == "ACME Ltd"
    assert keys.json("accounts", "close", "ACME Ltd")["closed"]
    with pytest.raises(RequestError, match="is closed"):
        keys("create", "more", "--account", "ACME Ltd")
    assert keys.json("accounts", "open", "ACME Ltd")["closed"] is None
    assert "ACME Ltd" in keys("accounts", "list")
    made = keys.json("invite", "create", "friends", "--uses", "3", "--expires", "8w", "--requests-per-min", "5")
    assert made["code"].startswith("pyi-")
    assert (made["uses_left"], made["limits"]["requests_per_min"]) == (3, 5)
    assert "friends" in keys("invite", "list")
    assert keys.json("invite", "revoke", made["id"])["state"] == "over"
    assert keys.json("invite", "list")[0]["state"] == "over"


def test_usage_is_summed_and_exported(keys_anywhere, database_url, tmp_path):
    keys = keys_anywhere
    made = keys.json("create", "laptop")
    store = Store(database_url)
    lines = [line(f"r{i}", account=made["account"], key=made["id"], cost=i, model="=m") for i in range(3)]
    store.write(lambda c: add(c, [*lines, line("r9", account="acct-x", cost=100)]))
    store.close()
    month = ("--from", "2023-11-01", "--to", "2023-11-30")
    assert keys.json("usage", *month)["total"]["cost_micro"] == 103
    found = keys.json("usage", *month, "--by", "model,key", "--key", "laptop")
    assert [(r["model"], r["key"], r["cost"]) for r in found["data"]] == [("=m", made["id"], "0.000003")]
    table = keys("usage", *month, "--by", "account")
    assert "total" in table
    assert "0.000103" in table
    rows = list(csv.DictReader(io.StringIO(keys("export", *month, "--account", "default"))))
    assert [(r["request"], r["model"]) for r in rows] == [(f"r{i}", "'=m") for i in range(3)]
    out = tmp_path / "usage.csv"
    keys("export", *month, "--out", str(out))
    assert len(out.read_text().splitlines()) == 5
    with pytest.raises(RequestError, match="cannot be written"):
        keys("export", "--out", str(tmp_path / "no" / "where.csv"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nobody"], "no key 'nobody'"),
        (["create", "x", "--account", "nobody"], "no account 'nobody'"),
        (["create", "x", "--scope", "root"], "'root' is unknown"),
        (["create", "x", "--admin", "--scope", "generate"], "not both"),
        (["create", "x", "--budget", "much"], "--budget is 'much'"),
        (["create", "x", "--concurrent", "few"], "--concurrent is 'few'"),
        (["create", "x", "--concurrent", "0"], "max_concurrent is 0"),
        (["create", "x", "--price", "1"], "three amounts"),
        (["create", "x", "--expires", "yesterday"], "--expires is"),
        (["create", "a\nb"], "NAME is"),
        (["rotate", "twice"], "2 keys are called 'twice'"),
        (["accounts", "close", "nobody"], "no account 'nobody'"),
        (["invite", "revoke", "nobody"], "no invite 'nobody'"),
        (["usage", "--by", "hour"], "summed by 'hour'"),
        (["usage", "--from", "x"], "from is 'x'"),
        (["list", "--account", "nobody"], "no account 'nobody'"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(keys, arguments, words):
    keys("create", "twice")
    keys("create", "twice")
    with pytest.raises(RequestError) as error:
        keys(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_key_that_is_unknown_is_not_repeated(keys):
    text = new_secret(KEY).text
    with pytest.raises(RequestError) as error:
        keys("show", text)
    assert text[:16] in str(error.value)
    assert text[16:22] not in str(error.value)


def test_a_running_server_sees_what_the_command_did(tmp_path):
    options = ServerOptions(state_path=str(tmp_path))
    keys = Command("--state", str(tmp_path))
    with guarded(open_store(options)) as server:
        made = keys.json("create", "laptop", "--concurrent", "5")
        client = server.client(made["secret"])
        assert client.post(TALK, json=BODY).status_code == 200
        assert keys.json("usage", "--by", "key")["data"][0]["key"] == made["id"]
        keys("revoke", "laptop")
        until(lambda: client.post(TALK, json=BODY).status_code == 401, 10)


def test_as_a_program_an_error_is_one_line_and_status_2(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "pyrosome", "keys", *arguments, "--state", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    wrong = run("show", "nobody")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("pyrosome: there is no key 'nobody'")
    assert len(wrong.stderr.splitlines()) == 1
    made = run("create", "laptop")
    store = open_store(ServerOptions(state_path=str(tmp_path)))
    (key,) = store.read(book.keys)
    assert made.stdout == f"{made.stdout.strip()}\n"
    assert made.stdout.startswith(KEY + key.id)
    assert time.time() - key.created < 60
    store.close()
