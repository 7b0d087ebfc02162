"""The usage ledger: every line once, and none lost that was promised."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, text

from pyrosome.errors import EngineError
from pyrosome.server.keys import ledger as ledgers
from pyrosome.server.keys import schema
from pyrosome.server.keys.ledger import Ledger, add
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.store import Store
from pyrosome.server.keys.usage import Slice, spent, sums
from pyrosome.server.problems import Refused
from tests.server.keys.lines import STARTED, line
from tests.server.scripted import until

DAY = 86400


def lines_in(store):
    return store.read(
        lambda c: c.execute(select(schema.usage_lines).order_by(schema.usage_lines.c.request)).mappings().all()
    )


def test_a_line_has_what_was_asked_used_and_paid(store):
    asyncio.run(Ledger(store).write(line("r1", price=Price(3, 2, 1), cost=77, status="length")))
    (row,) = lines_in(store)
    assert dict(row) == {
        "request": "r1", "account": "acct-a", "key": "k1", "path": "/v1/chat/completions", "model": "builtin:nano",
        "mode": "high", "status": "length", "started": STARTED, "day": "2023-11-14", "prompt_tokens": 100,
        "cached_tokens": 40, "output_tokens": 10, "reasoning_tokens": 4, "first_token_ms": 5.0, "total_ms": 12.5,
        "price_prompt": 3, "price_cached": 2, "price_output": 1, "cost_micro": 77,
    }  # fmt: skip


def test_a_request_is_written_and_summed_once_however_often_it_is_settled(store):
    for again in (
        [line("r1", cost=5)],
        [line("r1", cost=5), line("r1", cost=5), line("r2", cost=7)],
        [line("r2", cost=7)],
    ):
        store.write(lambda c, again=again: add(c, again))
    assert [r["request"] for r in lines_in(store)] == ["r1", "r2"]
    (total,) = store.read(lambda c: sums(c, Slice()))
    assert (total["requests"], total["cost_micro"], total["prompt_tokens"]) == (2, 12, 200)


def test_many_that_end_at_once_share_transactions_and_all_are_written(store):
    commits = []
    write = store.write

    def counted(change):
        commits.append(1)
        return write(change)

    store.write = counted

    async def all_at_once():
        ledger = Ledger(store)
        await asyncio.gather(*(ledger.write(line(f"r{i}", account=f"acct-{i % 7}", cost=i)) for i in range(1200)))

    asyncio.run(all_at_once())
    assert len(lines_in(store)) == 1200
    assert 3 <= len(commits) < 60
    by_account = store.read(lambda c: sums(c, Slice(), ["account"]))
    assert sum(r["cost_micro"] for r in by_account) == sum(range(1200))
    assert len(by_account) == 7


def test_two_servers_that_write_the_same_days_at_once_lose_nothing(database_url, store):
    other = Store(database_url)

    def write(to, name):
        async def all_of():
            ledger = Ledger(to)
            for batch in range(10):
                await asyncio.gather(
                    *(ledger.write(line(f"{name}{batch}-{i}", key=f"k{i % 5}", cost=1)) for i in range(20))
                )

        asyncio.run(all_of())

    threads = [threading.Thread(target=write, args=(to, name)) for to, name in ((store, "a"), (other, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    (total,) = store.read(lambda c: sums(c, Slice()))
    assert (total["requests"], total["cost_micro"]) == (400, 400)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_servers_that_add_to_the_same_days_do_not_wait_for_each_other_for_ever(store):
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    store.write(lambda c: add(c, [line("0", key="k1"), line("1", key="k2")]))
    with ThreadPoolExecutor(1) as other:

        def one(connection):
            add(connection, [line("2", key="k1")])
            theirs = other.submit(store.write, lambda c: add(c, [line("3", key="k2"), line("4", key="k1")]))
            until(lambda: store.read(lambda c: c.execute(waiting).scalar_one()))
            add(connection, [line("5", key="k2")])
            return theirs

        store.write(one).result()
    assert {r["key"]: r["requests"] for r in store.read(lambda c: sums(c, Slice(), ["key"]))} == {"k1": 3, "k2": 3}


@pytest.mark.parametrize("after_lines", [1, 25, 60])
def test_a_server_killed_at_any_moment_has_every_line_it_promised_and_sums_that_agree(database_url, after_lines):
    Store(database_url).close()
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.server.keys.lines", database_url], stdout=subprocess.PIPE, text=True
    )
    promised = [writer.stdout.readline().strip() for _ in range(after_lines)]
    writer.kill()
    promised += writer.stdout.read().split("\n")[:-1]
    writer.wait()
    writer.stdout.close()
    store = Store(database_url)
    written = {row["request"] for row in lines_in(store)}
    assert set(promised) <= written
    (total,) = store.read(lambda c: sums(c, Slice()))
    assert (total["requests"], total["cost_micro"]) == (len(written), 3 * len(written))
    store.write(lambda c: add(c, [line(r, cost=3) for r in promised]))  # as a retry would
    assert store.read(lambda c: sums(c, Slice())) == [total]
    store.close()


def test_a_client_that_does_not_wait_has_its_line_written_all_the_same(store):
    async def leave():
        ledger, go_on = Ledger(store), threading.Event()
        store.submit(go_on.wait)
        writing = asyncio.create_task(ledger.write(line("r1")))
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        go_on.set()
        await ledger.write(line("r2"))

    asyncio.run(leave())
    assert [r["request"] for r in lines_in(store)] == ["r1", "r2"]


def test_a_store_that_does_not_answer_is_tried_again(store):
    write, failures = store.write, iter([Refused(503, "gone"), Refused(503, "gone")])

    def sometimes(change):
        for failure in failures:
            raise failure
        return write(change)

    store.write = sometimes
    asyncio.run(Ledger(store).write(line("r1")))
    assert len(lines_in(store)) == 1


def test_a_line_that_cannot_be_written_is_an_error_and_the_next_one_is_written(store, monkeypatch, caplog):
    monkeypatch.setattr(ledgers, "PATIENCE_S", 0.1)
    write, is_gone = store.write, [True]

    def gone(change):
        if is_gone[0]:
            raise Refused(503, "gone")
        return write(change)

    store.write = gone

    async def two():
        ledger = Ledger(store)
        with pytest.raises(EngineError, match="ledger could not be written: gone"):
            await ledger.write(line("r1"))
        is_gone[0] = False
        await ledger.write(line("r2"))

    asyncio.run(two())
    assert [r["request"] for r in lines_in(store)] == ["r2"]
    assert "1 lines of the usage ledger were not written" in caplog.text


@pytest.mark.parametrize("model", ["\x00", "a\nb", "\ud800", "x" * 100_000, "=cmd()", "'; DROP TABLE usage_lines; --"])
def test_a_models_name_that_a_client_made_up_breaks_no_line(store, model):
    asyncio.run(Ledger(store).write(line("r1", model=model, path=model)))
    (row,) = lines_in(store)
    assert row["model"].isprintable()
    assert len(row["model"]) <= ledgers.MAX_TEXT_CHARS


def test_old_lines_go_and_the_sums_of_their_days_stay(store, monkeypatch):
    monkeypatch.setattr(ledgers, "PRUNED_AT_ONCE", 3)
    old = [line(f"old{i}", started=STARTED - 31 * DAY, cost=1) for i in range(10)]
    new = [line(f"new{i}", started=STARTED - 29 * DAY, cost=1) for i in range(2)]
    store.write(lambda c: add(c, old + new))
    Ledger(store, keep_days=30, wall=lambda: STARTED)
    for _ in range(10):
        store.submit(lambda: None).result()
    assert [r["request"] for r in lines_in(store)] == ["new0", "new1"]
    (total,) = store.read(lambda c: sums(c, Slice()))
    assert (total["requests"], total["cost_micro"]) == (12, 12)


def test_lines_are_kept_for_ever_unless_told_otherwise(store):
    store.write(lambda c: add(c, [line("old", started=0.0)]))
    Ledger(store, wall=lambda: STARTED)
    store.submit(lambda: None).result()
    assert len(lines_in(store)) == 1


def test_a_months_spending_is_of_that_month_in_utc_alone(store):
    november = 1_698_796_800.0
    rows = [(november - 0.001, 1), (november, 10), (november + 30 * DAY - 0.001, 100), (november + 30 * DAY, 1000)]
    store.write(lambda c: add(c, [line(f"r{i}", started=at, cost=n) for i, (at, n) in enumerate(rows)]))
    found = {m: store.read(lambda c, m=m: spent(c, "acct-a", m))["acct-a"] for m in ("2023-10", "2023-11", "2023-12")}
    assert found == {"2023-10": 1, "2023-11": 110, "2023-12": 1000}


def test_sums_can_be_told_apart_by_day_key_model_and_account(store):
    store.write(
        lambda c: add(
            c,
            [line("1", cost=1), line("2", cost=2, key="k2"), line("3", cost=4, started=STARTED + DAY),
             line("4", cost=8, model="other"), line("5", cost=16, account="acct-b")],
        )
    )  # fmt: skip

    def by(*names, part=Slice()):  # noqa: B008
        return {tuple(r[n] for n in names): r["cost_micro"] for r in store.read(lambda c: sums(c, part, names))}

    assert by("day") == {("2023-11-14",): 27, ("2023-11-15",): 4}
    assert by("key") == {("k1",): 29, ("k2",): 2}
    assert by("model", "account") == {
        ("builtin:nano", "acct-a"): 7,
        ("other", "acct-a"): 8,
        ("builtin:nano", "acct-b"): 16,
    }
    assert by("day", part=Slice("acct-a", frozenset(["k1"]), "2023-11-14", "2023-11-14")) == {("2023-11-14",): 9}
    assert by("key", part=Slice(keys=frozenset())) == {}


def test_the_ledger_of_no_lines_sums_to_nothing(store):
    assert [Counter(r).total() for r in store.read(lambda c: sums(c, Slice()))] == [0]
    assert store.read(lambda c: c.execute(select(func.count()).select_from(schema.usage_lines)).scalar_one()) == 0
