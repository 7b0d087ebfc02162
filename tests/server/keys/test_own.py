"""A key that manages its account's keys never gets more than it has."""

import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrosome.server.caller import ACCOUNT, ADMIN, GENERATE, METRICS, SCOPES, SESSIONS, Caller
from pyrosome.server.keys import book, invites, own
from pyrosome.server.keys.keys import INVITE, new_secret
from pyrosome.server.keys.money import Price
from pyrosome.server.keys.records import Limits
from pyrosome.server.keys.store import Store
from pyrosome.server.problems import Refused

NOW = 1_700_000_000
TALKS = frozenset({GENERATE, ACCOUNT})


class World:
    """An account with a key that manages, and what it can do."""

    def __init__(self, store):
        self.store = store
        self.account = store.write(lambda c: book.create_account(c, NOW, "acc"))
        self.me = self.root(TALKS, limits=Limits(100, None, 5), expires=NOW + 1000)

    def root(self, scopes=TALKS, **terms):
        return self.store.write(lambda c: book.create_key(c, NOW, self.account.id, "root", frozenset(scopes), **terms))[
            0
        ]

    def do(self, what, *args, by=None, **kwargs):
        key = by or self.me
        caller = Caller(key.id, key.account, key.name, key.scopes, "")
        return self.store.write(lambda c: what(c, own.asking(c, caller, NOW), *args, **kwargs))

    def create(self, by=None, name="made", scopes=None, expires=None, limits=Limits()):  # noqa: B008
        return self.do(own.create, NOW, name, scopes, expires, limits, by=by)[0]

    def refused(self, status, what, *args, **kwargs):
        with pytest.raises(Refused) as error:
            what(*args, **kwargs)
        assert error.value.status == status, error.value
        return str(error.value)


@pytest.fixture
def world(sqlite_store):
    return World(sqlite_store)


def test_a_key_makes_keys_with_no_more_scopes_and_no_wider_limits(world):
    made = world.create(scopes=frozenset({GENERATE}), limits=Limits(50, 1000, 5), expires=NOW + 10)
    assert (made.parent, made.account, made.scopes) == (world.me.id, world.account.id, {GENERATE})
    assert (made.limits, made.expires) == (Limits(50, 1000, 5), NOW + 10)
    for scope in set(SCOPES) - TALKS:
        assert scope in world.refused(403, world.create, scopes=frozenset({GENERATE, scope}))
    assert "requests_per_min" in world.refused(403, world.create, limits=Limits(101))
    assert "max_concurrent" in world.refused(403, world.create, limits=Limits(1, 1, 6))
    assert "ends" in world.refused(403, world.create, expires=NOW + 1001)


def test_what_is_not_asked_for_is_not_given(world):
    made = world.create()
    assert made.scopes == {GENERATE}
    assert made.expires == world.me.expires
    assert made.price is None


def test_the_accounts_own_limits_bound_its_keys_too(world):
    world.store.write(lambda c: book.change_account(c, world.account.id, NOW, limits=Limits(budget_micro=10)))
    assert "budget_micro" in world.refused(403, world.create, limits=Limits(budget_micro=11))
    world.create(limits=Limits(budget_micro=10))


def test_a_key_made_by_a_made_key_is_bound_by_all_above_it(world):
    child = world.create(scopes=TALKS, limits=Limits(10))
    assert world.refused(403, world.create, by=child, limits=Limits(11))
    assert world.refused(403, world.create, by=child, limits=Limits(None, None, 6))
    grandchild = world.create(by=child, scopes=TALKS, limits=Limits(10, None, 5))
    great = world.create(by=grandchild, scopes=TALKS)
    assert "times over" in world.refused(409, world.create, by=great)


def test_a_key_sees_itself_and_what_it_made_and_one_nobody_made_sees_all_of_its_account(world):
    child = world.create(scopes=TALKS)
    grandchild, second = (world.create(by=child, scopes=TALKS) for _ in range(2))
    sibling = world.create()
    other = World(world.store)

    def seen(by):
        return {k.id for k in world.do(own.visible, by=by)}

    assert seen(world.me) == {world.me.id, child.id, grandchild.id, second.id, sibling.id}
    assert seen(child) == {child.id, grandchild.id, second.id}
    assert seen(grandchild) == {grandchild.id}
    assert seen(other.me) == {other.me.id}


@pytest.mark.parametrize("deed", ["find", "change", "revoke", "rotate"])
def test_keys_it_does_not_see_are_to_it_as_if_they_were_not_there(world, deed):
    child, other = world.create(scopes=TALKS), World(world.store)
    args = {"find": (), "change": (), "revoke": (NOW,), "rotate": (NOW, 0)}[deed]
    unseen = [(child, world.me.id), (world.me, other.me.id), (world.me, "nosuchkey0000"), (world.me, "' OR 1=1 --")]
    words = set()
    for by, key_id in unseen:
        text = world.refused(404, world.do, getattr(own, deed), key_id, *args, by=by)
        words.add(text.replace(repr(key_id), "ID"))
    assert len(words) == 1
    assert world.store.read(lambda c: book.key(c, other.me.id)) == other.me


def test_it_cannot_give_itself_more(world):
    me = world.me.id
    for change in (
        {"scopes": TALKS | {ADMIN}}, {"scopes": TALKS | {METRICS}}, {"limits": Limits(101, None, 5)},
        {"limits": Limits()}, {"limits": Limits(100, None, None)}, {"expires": NOW + 1001}, {"expires": None},
    ):  # fmt: skip
        assert "cannot give it more" in world.refused(403, world.do, own.change, me, **change)
    narrower = world.do(own.change, me, name="n", scopes=TALKS, limits=Limits(99, 5, 5), expires=NOW + 999)
    assert (narrower.name, narrower.limits, narrower.expires) == ("n", Limits(99, 5, 5), NOW + 999)


def test_it_cannot_make_its_way_through_another_key_of_the_account(world):
    strong = world.root({*TALKS, ADMIN, SESSIONS})
    assert "rotate it with itself" in world.refused(403, world.do, own.rotate, strong.id, NOW, 0)
    assert world.refused(403, world.do, own.change, strong.id, limits=Limits(), scopes=frozenset(SCOPES))
    world.do(own.change, strong.id, scopes=frozenset({GENERATE}))
    assert world.refused(403, world.do, own.change, strong.id, scopes=TALKS), "what was taken is not given back"


def test_it_changes_what_it_made_within_what_it_has(world):
    child = world.create(limits=Limits(10))
    wider = world.do(own.change, child.id, limits=Limits(100), scopes=TALKS, expires=None)
    assert (wider.limits, wider.scopes, wider.expires) == (Limits(100), TALKS, world.me.expires)
    assert world.refused(403, world.do, own.change, child.id, limits=Limits(101))
    assert world.refused(403, world.do, own.change, child.id, scopes=TALKS | {SESSIONS})
    assert world.refused(403, world.do, own.change, child.id, expires=NOW + 1001)
    assert world.do(own.change, child.id, name="new") == world.store.read(lambda c: book.key(c, child.id))


def test_it_revokes_and_rotates_itself_and_what_it_made(world):
    child = world.create(scopes=TALKS)
    grandchild = world.create(by=child)
    for one in (world.me, child, grandchild):
        world.do(own.rotate, one.id, NOW, 0)
    ended = world.do(own.revoke, child.id, NOW)
    assert {k.id for k in ended} == {child.id, grandchild.id}
    assert world.do(own.revoke, child.id, NOW) == []
    assert "revoked" in world.refused(409, world.do, own.rotate, child.id, NOW, 0)
    world.do(own.revoke, world.me.id, NOW)
    assert "not valid" in world.refused(401, world.do, own.visible)


def test_a_key_that_lost_the_scope_meanwhile_manages_nothing(world):
    world.store.write(lambda c: book.change_key(c, world.me.id, scopes=frozenset({GENERATE})))
    assert "any more" in world.refused(403, world.do, own.visible)


def test_an_account_has_so_many_keys_and_no_more(world, monkeypatch):
    monkeypatch.setattr(book, "MAX_KEYS", 4)
    made = [world.create() for _ in range(3)]
    assert "revoke some" in world.refused(409, world.create)
    world.do(own.revoke, made[0].id, NOW)
    world.create()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(0, 5),
            st.sets(st.sampled_from(SCOPES), min_size=1), st.one_of(st.none(), st.integers(1, 200)),
            st.sampled_from(["create", "change", "rotate"]),
        ),
        max_size=12,
    )
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_whatever_it_tries_all_its_secrets_together_open_no_more_than_it_had(shared_store, deeds):
    world = World(shared_store)
    strong = world.root(SCOPES)
    mine = [world.me]  # keys whose secrets it has
    for by, at, scopes, most, deed in deeds:
        key = mine[by % len(mine)]
        everything = [*mine, strong]
        target = everything[at % len(everything)]
        limits = Limits(most)
        try:
            if deed == "create":
                mine.append(world.create(by=key, scopes=frozenset(scopes), limits=limits))
            elif deed == "change":
                world.do(own.change, target.id, by=key, scopes=frozenset(scopes), limits=limits)
            else:
                mine.append(world.do(own.rotate, target.id, NOW, 0, by=key)[0])
        except Refused:
            continue
    for key in mine:
        known = shared_store.read(lambda c, i=key.id: book.known(c, i))
        assert known.key.scopes <= TALKS
        tightest = [k.limits.requests_per_min for k in (known.key, *known.ancestors)]
        assert min(n for n in tightest if n is not None) <= 100
        assert world.me.id in [k.id for k in (known.key, *known.ancestors)]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    opened = Store(f"sqlite:///{tmp_path_factory.mktemp('own') / 'keys.db'}")
    yield opened
    opened.close()


# Invites


def test_an_invite_makes_as_many_accounts_as_it_says_each_with_its_limits_and_salt(store):
    terms = {"limits": Limits(7), "price": Price(1, 2, 3), "scopes": frozenset({GENERATE})}
    _, code = store.write(lambda c: invites.create_invite(c, NOW, "friends", uses=2, **terms))
    made = [store.write(lambda c, n=n: own.sign_up(c, NOW, code, n)) for n in ("one", "two")]
    for (account, key, _), name in zip(made, ("one", "two"), strict=True):
        assert (account.name, account.limits, account.price) == (name, Limits(7), Price(1, 2, 3))
        assert (key.account, key.scopes, key.parent) == (account.id, {GENERATE}, None)
    salts = {store.read(lambda c, k=k: book.known(c, k.id)).salt for _, k, _ in made}
    assert len(salts) == 2
    with pytest.raises(Refused, match="not valid"):
        store.write(lambda c: own.sign_up(c, NOW, code, "three"))
    assert len(store.read(book.accounts)) == 2


def test_a_code_that_is_wrong_used_up_over_or_revoked_is_refused_in_the_same_words(store):
    def made(**terms):
        return store.write(lambda c: invites.create_invite(c, NOW, "x", **terms))

    over, revoked, used = made(expires=NOW), made(), made()
    store.write(lambda c: invites.revoke_invite(c, revoked[0].id, NOW))
    store.write(lambda c: own.sign_up(c, NOW, used[1], "x"))
    wrong = new_secret(INVITE, made()[0].id)
    words = set()
    for code in (over[1], revoked[1], used[1], wrong, new_secret(INVITE), None):
        with pytest.raises(Refused) as error:
            store.write(lambda c, code=code: own.sign_up(c, NOW, code, "x"))
        words.add((error.value.status, str(error.value)))
    assert len(words) == 1


def test_the_last_use_of_an_invite_is_one_use_however_many_come(store):
    _, code = store.write(lambda c: invites.create_invite(c, NOW, "x", uses=3))
    results, start, numbers = [], threading.Barrier(12), itertools.count()

    def come():
        start.wait()
        try:
            results.append(store.write(lambda c: own.sign_up(c, time.time(), code, f"n{next(numbers)}")))
        except Refused:
            results.append(None)

    threads = [threading.Thread(target=come) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert sum(r is not None for r in results) == 3
