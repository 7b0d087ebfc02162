"""No key, prompt or body is in a log or in the store, whatever is asked and whatever goes wrong."""

import logging

import pytest

from pyrosome.server.caller import SCOPES
from pyrosome.server.keys import book
from pyrosome.server.keys.keys import ID_CHARS, KEY, new_secret
from pyrosome.server.keys.records import Limits
from tests.server.keys.serving import TALK, guarded
from tests.server.scripted import saying

PROMPT, ANSWER, TOOL, MODEL_MARK = "PromptMark7351", "AnswerMark7352", "ToolMark7353", "SaltMark7354"


class Everything(logging.Handler):
    """Keeps every record of every logger but the client's as it would be written, with tracebacks."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        if not record.name.startswith(("httpx2", "httpcore2")):
            self.lines.append(logging.Formatter("%(name)s %(levelname)s %(message)s").format(record))


@pytest.fixture
def logged():
    handler, root = Everything(), logging.getLogger()
    names = ["", "pyrosome", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "uvicorn", "uvicorn.error",
             "uvicorn.access", "asyncio", "psycopg"]  # fmt: skip
    before = {n: (logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)
    for name, (level, propagate) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = propagate


def body(**more):
    message = {"role": "user", "content": f"say {PROMPT}"}
    tools = [{"type": "function", "function": {"name": TOOL, "parameters": {"type": "object"}}}]
    return {"messages": [message], "tools": tools, "max_tokens": 20, "cache_salt": MODEL_MARK, **more}


def test_marked_secrets_are_in_no_log_line_and_in_no_file(store, database_url, tmp_path, logged):
    secrets = []
    with guarded(store, saying(f"thinking</think>{ANSWER}"), sign_up=True) as server:
        _, text = server.key(scopes=SCOPES, limits=Limits(requests_per_min=20, budget_micro=10**9))
        secrets.append(text)
        client = server.client(text)
        client.post(TALK, json=body())
        client.post(TALK, json=body(stream=True))
        client.post("/anthropic/v1/messages", json={**body(), "tools": []})
        client.post(TALK, json=body(temperature=PROMPT))  # a wrong field
        client.post(TALK, content=b'{"messages": "' + PROMPT.encode())  # no JSON
        client.post(f"{TALK}?key={PROMPT}", json=body(), headers={"x-api-key": text})
        server.engine.fail = "the engine broke"
        client.post(TALK, json=body())
        server.engine.script = lambda request: 1 / 0  # a fault nobody thought of
        client.post(TALK, json=body())
        made = client.post("/account/keys", json={"name": "child"}).json()["secret"]
        rotated = client.post(f"/account/keys/{made[4:][:ID_CHARS]}/rotate", json={"grace": "1h"}).json()["secret"]
        invite = client.post("/admin/invites", json={"name": "x"}).json()["code"]
        signed = server.client().post("/account/sign-up", json={"code": invite, "name": "x"}).json()["secret"]
        secrets += [made, rotated, invite, signed]
        guesses = [new_secret(KEY).text, new_secret(KEY, text[4:][:ID_CHARS]).text, "sk-GuessMark7355"]
        for guess in guesses:
            server.client(guess).post(TALK, json=body())
            client.post(TALK, json=body(), headers={"x-api-key": guess})
        broken, server.door.store.reading = server.door.store.reading, _broken
        server.door.forget()
        assert client.post(TALK, json=body()).status_code == 500
        server.door.store.reading = broken
        digests = store.read(lambda c: c.exec_driver_sql("SELECT digest FROM keys").scalars().all())
        salts = store.read(lambda c: c.exec_driver_sql("SELECT salt FROM accounts").scalars().all())
    text_of_log = "\n".join(logged.lines)
    assert "sqlalchemy.pool" in text_of_log, "the database's own log was listened to"
    assert "ZeroDivisionError" in text_of_log
    marks = [PROMPT, ANSWER, TOOL, MODEL_MARK, "GuessMark7355", *digests, *salts]
    marks += [s[4 + ID_CHARS :] for s in (*secrets, *guesses[:2])]
    assert [m for m in marks if m in text_of_log] == []
    files = list(tmp_path.rglob("*"))
    content = b"".join(f.read_bytes() for f in files if f.is_file())
    if "sqlite" in database_url:
        assert digests[0].encode() in content
    else:
        content = _everything_in(store)
    assert [s for s in secrets if s[4 + ID_CHARS :].encode() in content] == []
    assert [m for m in (PROMPT, ANSWER, TOOL, MODEL_MARK) if m.encode() in content] == []


async def _broken(ask):
    raise RuntimeError("the store broke")


def _everything_in(store):
    def ask(connection):
        tables = ("accounts", "keys", "invites", "usage_lines", "usage_days")
        return [connection.exec_driver_sql(f"SELECT * FROM {t}").all() for t in tables]

    return repr(store.read(ask)).encode()


def test_a_database_error_tells_no_values(store):
    account = store.write(lambda c: book.create_account(c, 1.0, "a"))
    row = {
        "id": "twice",
        "account": account.id,
        "name": "NameMark",
        "digest": "DigestMark",
        "scopes": "x",
        "created": 1,
    }

    def insert(connection):
        connection.execute(book.schema.keys.insert().values(**row))

    store.write(insert)
    with pytest.raises(Exception, match=r"(?i)unique") as error:
        store.write(insert)
    assert "DigestMark" not in str(error.value)
    assert "hide_parameters" in str(error.value)
