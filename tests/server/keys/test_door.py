"""Who is let in: `KeyDoor`, without HTTP."""

import asyncio
import hmac
import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrosome.errors import RequestError
from pyrosome.options import ServerOptions
from pyrosome.server.caller import ADMIN, GENERATE, SCOPES, OpenDoor
from pyrosome.server.keys import book, keys
from pyrosome.server.keys.door import KNOWN_S, USE_NOTED_S, KeyDoor, door_for, is_loopback
from pyrosome.server.keys.keys import KEY, new_secret
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from pyrosome.server.keys.store import Store, open_store
from pyrosome.server.keys.usage import Slice, sums
from pyrosome.server.problems import Refused
from tests.server.keys.lines import STARTED, Clock, entry


@pytest.fixture
def clock():
    return Clock(STARTED)


@pytest.fixture
def door(store, clock):
    return KeyDoor(store, is_needed=True, clock=clock, wall=clock)


def make(store, name="k", *, account=None, scopes=SCOPES, now=STARTED, **more):
    """A key of an account, made where there is none, and its text."""
    account = account or store.write(lambda c: book.create_account(c, now, "acc")).id
    key, secret = store.write(lambda c: book.create_key(c, now, account, name, frozenset(scopes), **more))
    return key, secret.text


def caller(door, text):
    return asyncio.run(door.caller(text))


def refusal(door, text):
    with pytest.raises(Refused) as error:
        caller(door, text)
    assert error.value.status == 401
    assert error.value.headers["WWW-Authenticate"] == "Bearer"
    return str(error.value)


def enter(door, who, request="r1", prompt=10, most=10):
    return asyncio.run(door.enter(who, request, prompt, most))


def test_a_key_is_its_account_its_name_and_its_scopes(store, door):
    key, text = make(store, "laptop", scopes=[GENERATE])
    who = caller(door, text)
    assert (who.key, who.account, who.name, who.scopes) == (key.id, key.account, "laptop", {GENERATE})


def test_accounts_have_salts_of_their_own_which_their_keys_share(store, door):
    key, text = make(store)
    _, second = make(store, account=key.account)
    _, other = make(store)
    salts = [caller(door, t).salt for t in (text, second, other)]
    assert salts[0] == salts[1] != salts[2]
    assert all(len(s) >= 32 for s in salts)


def test_whatever_is_not_a_key_of_ours_is_refused_in_the_same_words(store, door):
    key, text = make(store)
    unknown = new_secret(KEY).text
    wrong_secret = new_secret(KEY, key.id).text
    words = {
        refusal(door, t) for t in (unknown, wrong_secret, text[:-1], text + "x", "pyr-", "sk-other", "\xff", "x" * 9999)
    }
    assert len(words) == 1
    assert "a key is needed" in refusal(door, None)
    assert refusal(door, "") == refusal(door, None)


def test_an_unknown_id_is_compared_as_often_as_a_known_one(store, door, monkeypatch):
    key, text = make(store)
    compared = []

    def counted(one, other):
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr("pyrosome.server.keys.door.is_same", counted)
    counts = []
    for presented in (text, new_secret(KEY).text, new_secret(KEY, key.id).text, "sk-other"):
        compared.clear()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda p=presented: asyncio.run(door.caller(p))).exception()
        counts.append(list(compared))
    assert counts == [[(64, 64)] * 2] * 4
    assert "compare_digest" in inspect.getsource(keys.is_same)


def test_a_key_that_expired_or_was_revoked_says_so_to_its_holder_alone(store, door, clock):
    key, text = make(store, expires=int(STARTED) + 10)
    caller(door, text)
    clock.now += 10
    assert "expired at 2023-11-14T22:13:30Z" in refusal(door, text)
    guess = new_secret(KEY, key.id).text
    assert "expired" not in refusal(door, guess)
    store.write(lambda c: book.revoke_key(c, key.id, clock.now))
    door.forget()
    assert "revoked" in refusal(door, text)
    assert "revoked" not in refusal(door, guess)


def test_a_revocation_by_another_process_is_seen_within_seconds_and_one_of_ours_at_once(store, door, clock):
    key, text = make(store)
    other, other_text = make(store)
    caller(door, text)
    caller(door, other_text)
    store.write(lambda c: book.revoke_key(c, key.id, clock.now))
    caller(door, text)
    clock.now += KNOWN_S
    refusal(door, text)
    store.write(lambda c: book.revoke_key(c, other.id, clock.now))
    door.forget()
    refusal(door, other_text)


def test_what_was_read_before_a_change_is_not_remembered_after_it(store, door, clock):
    key, text = make(store)
    known = book.known

    async def look_while_it_is_revoked():
        def slowly(connection, key_id):
            found = known(connection, key_id)
            door.store.submit(lambda: store.write(lambda c: book.revoke_key(c, key.id, clock.now))).result()
            door.forget()
            return found

        book.known = slowly
        try:
            await door.caller(text)  # it was read while it was valid
        finally:
            book.known = known
        with pytest.raises(Refused):
            await door.caller(text)

    asyncio.run(look_while_it_is_revoked())


def test_a_rotated_key_keeps_its_id_and_the_old_secret_its_grace(store, door, clock):
    key, text = make(store, limits=Limits(requests_per_min=5))
    rotated, secret = store.write(lambda c: book.rotate_key(c, key.id, clock.now, 60))
    assert (rotated.id, rotated.limits, rotated.scopes) == (key.id, key.limits, key.scopes)
    assert caller(door, secret.text) == caller(door, text)
    clock.now += 60
    refusal(door, text)
    caller(door, secret.text)
    _, third = store.write(lambda c: book.rotate_key(c, key.id, clock.now))
    door.forget()
    refusal(door, secret.text)
    caller(door, third.text)


def test_only_the_last_secret_has_a_grace(store, door, clock):
    key, first = make(store)
    _, second = store.write(lambda c: book.rotate_key(c, key.id, clock.now, 600))
    store.write(lambda c: book.rotate_key(c, key.id, clock.now, 600))
    refusal(door, first)
    caller(door, second.text)


def test_revoking_ends_the_old_secrets_grace_too(store, door, clock):
    key, text = make(store)
    store.write(lambda c: book.rotate_key(c, key.id, clock.now, 600))
    (revoked,) = store.write(lambda c: book.revoke_key(c, key.id, clock.now))
    assert revoked.old_until is None
    refusal(door, text)


def test_a_key_lives_no_longer_than_the_one_it_was_made_with(store, door, clock):
    parent, _ = make(store, expires=int(STARTED) + 100)
    child, text = make(store, account=parent.account, parent=parent.id)
    _, grandchild = make(store, account=parent.account, parent=child.id)
    caller(door, grandchild)
    clock.now += 100
    assert "expired at 2023-11-14T22:15:00Z" in refusal(door, grandchild)
    clock.now -= 50
    ended = store.write(lambda c: book.revoke_key(c, parent.id, clock.now))
    assert len(ended) == 3
    door.forget()
    for one in (text, grandchild):
        assert "revoked" in refusal(door, one)


def test_a_closed_account_lets_none_of_its_keys_in_until_it_is_open_again(store, door, clock):
    key, text = make(store)
    store.write(lambda c: book.change_account(c, key.account, clock.now, closed=True))
    assert "closed" in refusal(door, text)
    store.write(lambda c: book.change_account(c, key.account, clock.now, closed=False))
    door.forget()
    caller(door, text)


def test_when_a_key_was_last_used_is_known_to_the_minute(store, door, clock):
    key, text = make(store)

    def last_used():
        store.submit(lambda: None).result()
        return store.read(lambda c: book.key(c, key.id)).last_used

    assert last_used() is None
    caller(door, text)
    assert last_used() == int(STARTED)
    clock.now += USE_NOTED_S - 1
    caller(door, text)
    assert last_used() == int(STARTED)
    clock.now += 1
    caller(door, text)
    assert last_used() == int(STARTED) + USE_NOTED_S


def test_where_no_key_is_needed_any_is_welcome_and_a_known_one_is_known(store, clock):
    door = KeyDoor(store, is_needed=False, clock=clock, wall=clock)
    key, text = make(store)
    assert caller(door, text).key == key.id
    strangers = {caller(door, t) for t in (None, "dummy", new_secret(KEY).text, new_secret(KEY, key.id).text)}
    assert len(strangers) == 1
    (stranger,) = strangers
    assert (stranger.key, stranger.account, stranger.salt) == ("", "", "")
    assert stranger.scopes.isdisjoint({ADMIN, "account"}), "they could make themselves a key"


# Admission


def test_a_request_is_let_in_under_the_limits_of_key_parent_and_account(store, door):
    account = store.write(lambda c: book.create_account(c, STARTED, "acc", Limits(max_concurrent=2)))
    parent, parent_text = make(store, account=account.id, limits=Limits(requests_per_min=3))
    _, child_text = make(store, account=account.id, parent=parent.id)
    one, other = caller(door, parent_text), caller(door, child_text)
    tickets = [enter(door, one, "r1"), enter(door, other, "r2")]
    assert tickets[1].headers["x-ratelimit-remaining-requests"] == "1"
    with pytest.raises(Refused, match="account 'acc' may have 2"):
        enter(door, other, "r3")
    for n, ticket in enumerate(tickets):
        asyncio.run(ticket.settle(entry(f"r{n}")))
    enter(door, other, "r3")
    with pytest.raises(Refused, match="key 'k' may use 3 requests"):
        enter(door, other, "r4")


def test_limits_that_are_changed_hold_from_the_next_request_on(store, door):
    key, text = make(store)
    who = caller(door, text)
    enter(door, who, "r1")
    store.write(lambda c: book.change_key(c, key.id, limits=Limits(max_concurrent=1)))
    door.forget()
    with pytest.raises(Refused, match="running at once"):
        enter(door, who, "r2")


def test_a_key_revoked_between_its_look_up_and_its_admission_is_not_admitted(store, door):
    key, text = make(store)
    who = caller(door, text)
    store.write(lambda c: book.revoke_key(c, key.id, STARTED))
    door.forget()
    with pytest.raises(Refused) as error:
        enter(door, who)
    assert error.value.status == 401


def test_a_settled_request_is_a_line_with_the_price_of_that_time(store, clock):
    door = KeyDoor(store, is_needed=True, price=Price(1_000_000, 500_000, 2_000_000), clock=clock, wall=clock)
    key, text = make(store)
    priced, priced_text = make(store, price=Price(0, 0, 7_000_000))
    tickets = [enter(door, caller(door, t)) for t in (text, priced_text)]
    store.write(lambda c: book.change_key(c, priced.id, price=None))
    door.forget()
    for number, ticket in enumerate(tickets):
        asyncio.run(ticket.settle(entry(f"r{number}", prompt=100, cached=40, output=10)))
    rows = store.read(lambda c: sums(c, Slice(), ["key"]))
    assert {r["key"]: r["cost_micro"] for r in rows} == {key.id: 60 + 20 + 20, priced.id: 70}


@pytest.mark.parametrize(
    ("changes", "cost"),
    [({}, 110), ({"status": "abort"}, 110), ({"status": "error"}, 0), ({"status": "abort", "first_ms": None}, 0)],
)
def test_what_failed_or_never_began_costs_nothing_and_is_written_all_the_same(store, clock, changes, cost):
    door = KeyDoor(store, is_needed=True, price=Price(1_000_000, 1_000_000, 1_000_000), clock=clock, wall=clock)
    _, text = make(store)
    asyncio.run(enter(door, caller(door, text)).settle(entry(**changes)))
    (total,) = store.read(lambda c: sums(c, Slice()))
    assert (total["requests"], total["cost_micro"]) == (1, cost)


def test_usage_without_a_key_is_written_under_no_account(store, clock):
    door = KeyDoor(store, is_needed=False, clock=clock, wall=clock)
    asyncio.run(enter(door, caller(door, None)).settle(entry()))
    (row,) = store.read(lambda c: sums(c, Slice(), ["account", "key"]))
    assert (row["account"], row["key"], row["requests"]) == ("", "", 1)


def test_a_line_that_cannot_be_written_gives_the_place_back_all_the_same(store, door):
    _, text = make(store, limits=Limits(max_concurrent=1))
    ticket = enter(door, caller(door, text))

    async def broken(line):
        raise RequestError("no")

    write, door.ledger.write = door.ledger.write, broken
    with pytest.raises(RequestError):
        asyncio.run(ticket.settle(entry()))
    door.ledger.write = write
    enter(door, caller(door, text))


def test_a_budget_counts_what_was_spent_before_a_restart_and_by_keys_made_with_it(store, clock):
    price = Price(0, 0, 1_000_000)  # 1 micro-unit a token of output
    parent, parent_text = make(store, limits=Limits(budget_micro=100))
    _, text = make(store, account=parent.account, parent=parent.id)
    first = KeyDoor(store, is_needed=True, price=price, clock=clock, wall=clock)
    asyncio.run(enter(first, caller(first, text), most=60).settle(entry(output=60)))
    second = KeyDoor(store, is_needed=True, price=price, clock=clock, wall=clock)
    with pytest.raises(Refused) as error:
        enter(second, caller(second, parent_text), most=41)
    assert error.value.status == 402
    ticket = enter(second, caller(second, parent_text), most=40)
    with pytest.raises(Refused) as error:
        enter(second, caller(second, text), "r2", most=1)
    assert error.value.status == 429
    asyncio.run(ticket.settle(entry("r3", output=40)))
    with pytest.raises(Refused) as error:
        enter(second, caller(second, text), "r4", most=1)
    assert error.value.status == 402


def test_at_the_turn_of_the_month_in_utc_there_is_a_budget_again(store, clock):
    clock.now = 1_701_388_799.0  # 2023-11-30T23:59:59Z
    door = KeyDoor(store, is_needed=True, price=Price(0, 0, 1_000_000), clock=clock, wall=clock)
    _, text = make(store, limits=Limits(budget_micro=50))
    asyncio.run(enter(door, caller(door, text), most=50).settle(entry("r1", output=50, started=clock.now)))
    with pytest.raises(Refused, match="2023-12-01, 00:00 UTC") as error:
        enter(door, caller(door, text), "r2", most=1)
    assert error.value.status == 402
    clock.now += 1
    enter(door, caller(door, text), "r3", most=50)


def test_a_budget_changed_or_spent_elsewhere_is_seen_within_seconds(store, database_url, clock):
    price = Price(0, 0, 1_000_000)
    _, text = make(store, limits=Limits(budget_micro=100))
    one = KeyDoor(store, is_needed=True, price=price, clock=clock, wall=clock)
    other = KeyDoor(Store(database_url), is_needed=True, price=price, clock=clock, wall=clock)
    asyncio.run(enter(other, caller(other, text), most=1).settle(entry("r0", output=1)))
    asyncio.run(enter(one, caller(one, text), most=90).settle(entry("r1", output=90)))
    clock.now += 10
    with pytest.raises(Refused) as error:
        enter(other, caller(other, text), "r2", most=50)
    assert error.value.status == 402
    other.close()


def test_a_hundred_that_come_at_once_at_a_limit_of_five_are_five(store, door):
    _, text = make(store, limits=Limits(max_concurrent=5))

    def come(number):
        try:
            return asyncio.run(door.enter(asyncio.run(door.caller(text)), f"r{number}", 1, 1))
        except Refused as error:
            return error.status

    with ThreadPoolExecutor(100) as pool:
        came = list(pool.map(come, range(100)))
    assert came.count(429) == 95


# The address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_on_loopback_no_key_is_needed(host, tmp_path):
    assert is_loopback(host)
    door = door_for(ServerOptions(host=host, state_path=str(tmp_path)))
    assert caller(door, None).key == ""
    door.close()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.5", "10.0.0.1", "example.org", "localhost.example.org", "::ffff:10.0.0.1"]
)
def test_anywhere_else_a_server_without_keys_does_not_start(host, tmp_path):
    assert not is_loopback(host)
    options = ServerOptions(host=host, state_path=str(tmp_path))
    with pytest.raises(RequestError, match="pyrosome keys create --admin"):
        door_for(options)
    store = open_store(options)
    key, text = make(store, now=time.time())
    door = door_for(options)
    with pytest.raises(Refused):
        caller(door, None)
    assert caller(door, text).key == key.id
    door.close()
    store.write(lambda c: book.revoke_key(c, key.id, time.time()))
    store.close()
    with pytest.raises(RequestError, match="there is no key yet"):
        door_for(options)


def test_keys_of_a_closed_account_are_no_reason_to_start(tmp_path):
    options = ServerOptions(host="0.0.0.0", state_path=str(tmp_path))
    store = open_store(options)
    key, _ = make(store, now=time.time())
    store.write(lambda c: book.change_account(c, key.account, time.time(), closed=True))
    store.close()
    with pytest.raises(RequestError, match="there is no key yet"):
        door_for(options)


def test_keys_can_be_required_on_loopback_and_left_off_anywhere(tmp_path):
    with pytest.raises(RequestError, match="keys are required"):
        door_for(ServerOptions(keys="required", state_path=str(tmp_path)))
    off = door_for(ServerOptions(keys="off", host="0.0.0.0", state_path=str(tmp_path / "unused")))
    assert isinstance(off, OpenDoor)
    assert not (tmp_path / "unused").exists()


@given(st.text(max_size=40))
def test_no_host_breaks_the_question_whether_it_is_loopback(host):
    assert is_loopback(host) in (True, False)
