"""Sessions through the engine: kept, forked, cut back, saved, and going on as if every word had been said at once."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from pyrosome.cache import store
from pyrosome.cache.streams import pages_for
from pyrosome.errors import CheckpointError, ContextTooLong, DoesNotFit, RequestError
from tests.engine.engines import CONFIG, IDS, Eager, bytes_for, drain, engine_of, is_empty, request, run
from tests.networks import agreeing_network, free


def turn(session: str, name: str = "turn", ids=(), num_tokens: int = 6, **changes):
    return dataclasses.replace(request(name, 0, num_tokens, session=session, logprobs=2, **changes), ids=tuple(ids))


def says(engine, session, ids=(), **changes):
    """What it says next."""
    name = f"turn {engine.stats.requests}"
    return run(engine, [turn(session, name, ids, **changes)])[name, 0]


def plain(ids, net=None, **changes):
    """What an engine without a past says to all ids at once."""
    asked = dataclasses.replace(turn("", "plain", ids, **changes), session="")
    return run(engine_of(net), [asked])["plain", 0].answer


def opened(engine, length: int = 300, start: int = 0) -> str:
    return engine.call("session_open", ids=IDS[start : start + length])


def known(engine, session) -> list[int]:
    return engine.call("session_ids", session=session)


# Going on


def test_turns_go_on_from_one_another_and_compute_what_is_new():
    engine, ids = engine_of(), IDS[:300]
    session = engine.call("session_open", ids=ids)
    for n in range(4):
        computed = engine.stats.computed_tokens
        new = IDS[400 + 10 * n : 407 + 10 * n] if n else []
        said = says(engine, session, new)
        ids = [*ids, *new]
        assert said.answer == plain(ids)
        assert engine.stats.computed_tokens - computed == (300 if not n else 1 + len(new)) + 5
        ids += said.tokens
        assert known(engine, session) == ids
    assert engine.call("session_extend", session=session, ids=IDS[:3]) == len(ids) + 3
    assert says(engine, session).answer == plain([*ids, *IDS[:3]])
    engine.call("session_close", session=session)
    assert is_empty(engine)


def test_a_turn_tells_how_much_of_its_session_was_computed_already():
    engine = engine_of()
    session = opened(engine)
    first, second = says(engine, session), says(engine, session, IDS[400:407])
    assert first.end.reuse.reused_tokens == 0 and first.end.reuse.prompt_tokens == 300
    reuse = second.end.reuse  # the last id of an answer is left to be computed
    assert (reuse.prompt_tokens, reuse.reused_tokens, reuse.limit) == (313, 305, "all")
    assert "305 of 313 tokens" in reuse.reason
    assert 0 < second.end.timeline.admitted == second.end.timeline.arrived


OPERATIONS: dict[str, dict] = {
    "session_ids": {}, "session_notes": {}, "session_fork": {}, "session_extend": {"ids": [1]},
    "session_rewind": {"num_tokens": 1}, "session_save": {"path": "x"}, "session_close": {},
}  # fmt: skip


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    engine = engine_of(max_context=400)
    session = opened(engine)
    empty = engine.call("session_open")
    with pytest.raises(RequestError, match="empty prompt"):
        engine.add(turn(empty))
    closed = engine.call("session_open", ids=IDS[:5])
    engine.call("session_close", session=closed)
    for gone in ("x", closed):
        for name, arguments in OPERATIONS.items():
            with pytest.raises(RequestError, match=f"there is no session '{gone}'"):
                engine.call(name, session=gone, **arguments)
        with pytest.raises(RequestError, match=f"there is no session '{gone}'"):
            engine.add(turn(gone))
    with pytest.raises(RequestError, match="there is no operation 'session_dance'"):
        engine.call("session_dance")
    for ids, kind in (([160], RequestError), (IDS[:101], ContextTooLong)):
        with pytest.raises(kind):
            engine.call("session_extend", session=session, ids=ids)
        with pytest.raises(kind):
            engine.add(turn(session, ids=ids))
    with pytest.raises(RequestError, match="301 tokens were to be taken back and the session has 300"):
        engine.call("session_rewind", session=session, num_tokens=301)
    engine.add(turn(session, "busy"))
    for name, arguments in OPERATIONS.items():
        with pytest.raises(RequestError, match="is generating"):
            engine.call(name, session=session, **arguments)
    with pytest.raises(RequestError, match="is generating"):
        engine.add(turn(session, "second"))
    assert drain(engine)["busy", 0].answer == plain(IDS[:300])


def test_sessions_are_listed_with_what_they_hold_and_what_they_do():
    engine = engine_of(max_sequences=1)
    assert engine.call("session_list") == {}
    first, second = opened(engine, 300), opened(engine, 200, 1000)
    says(engine, first)
    engine.add(turn(second, "busy", IDS[:7]))
    engine.step()
    assert engine.call("session_list") == {
        first: {"tokens": 306, "is_busy": False, "is_present": False},
        second: {"tokens": 207, "is_busy": True, "is_present": True},
    }
    assert [engine.call("session_length", session=s) for s in (first, second)] == [306, 207]
    drain(engine)
    engine.call("session_close", session=first)
    assert engine.call("session_list") == {second: {"tokens": 213, "is_busy": False, "is_present": True}}
    with pytest.raises(RequestError, match=f"there is no session '{first}'"):
        engine.call("session_length", session=first)


def test_what_a_client_may_know_of_an_engine_is_told():
    engine = engine_of(kv_format="bf16", max_sequences=3, max_context=700, cache_bytes=9 << 20)
    assert engine.call("about") == {
        "fingerprint": "", "max_context": 700, "max_sequences": 3, "drafter": "Drafter", "max_drafts": 0,
        "cache_bytes": 9 << 20, "kv_format": "bf16", "numerics": "exact", "vocab_size": 160,
    }  # fmt: skip


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_what_was_said_until_an_abort_stays(at):
    engine = engine_of()
    session = opened(engine)
    engine.add(turn(session, "turn"))
    for _ in range(at):
        engine.step()
    engine.abort("turn")
    (said,) = drain(engine).values()
    whole = plain(IDS[:300])[0]
    assert said.end.reason == "abort" and known(engine, session) == [*IDS[:300], *whole[: said.end.output_tokens]]
    assert engine.sessions[session].track.num_pending
    ids = known(engine, session)
    assert says(engine, session).answer == plain(ids)


@pytest.mark.parametrize("drafter", ["off", "mtp"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_turn_that_fails_half_way_never_was(monkeypatch, at, drafter):
    """Its new ids take three steps; they and what it had said of its answer are taken back."""
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    net = agreeing_network()
    engine = engine_of(net, drafter=drafter, step_tokens=64)
    session = opened(engine)
    says(engine, session)
    ids = known(engine, session)
    forward, calls = engine.runner.forward, iter(range(at))

    def breaking(*args, **kwargs):
        if next(calls, None) is None:
            raise RuntimeError("a broken step")
        return forward(*args, **kwargs)

    engine.runner.forward = breaking
    failed = says(engine, session, IDS[500:600], num_tokens=40)
    engine.runner.forward = forward
    assert failed.end.reason == "error" and "a broken step" in failed.end.error
    assert failed.end.output_tokens == len(failed.tokens) and bool(failed.tokens) == (at > 2)
    assert known(engine, session) == ids and not engine.sessions[session].is_busy
    assert says(engine, session, IDS[700:703]).answer == plain([*ids, *IDS[700:703]], net)
    engine.call("session_close", session=session)
    assert is_empty(engine)


@pytest.mark.parametrize("steps", range(4))
def test_each_answer_of_a_request_that_ends_before_its_first_token_is_told_its_end(steps):
    """Aborted while it waits, or while its prompt of three steps is computed."""
    engine = engine_of(step_tokens=100)
    engine.add(request("r", 399, n=3, temperature=1.0))
    for _ in range(steps):
        assert engine.step() == []
    engine.abort("r")
    said = drain(engine)
    assert [(said["r", i].end.reason, said["r", i].end.output_tokens) for i in range(3)] == [("abort", 0)] * 3
    assert engine.stats.ended_by_reason == {"abort": 3} and is_empty(engine)


def test_an_end_that_was_drafted_leaves_its_id_to_go_on_from(monkeypatch):
    """The last token may be a draft that agreed: then it was computed, and its logits are needed again."""
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    net = agreeing_network()
    for most in range(3, 12):
        engine = engine_of(net, drafter="mtp", max_drafts=4)
        session = opened(engine, 40)
        for n in range(4):
            before = known(engine, session)
            assert says(engine, session, num_tokens=most + n).answer == plain(before, net, num_tokens=most + n)
            assert engine.sessions[session].track.num_pending == 1
        assert engine.stats.accepted[0] > 0


# Forks and rewinds


# A turn leaves `length` + 5 computed tokens: each residue of 4, and each side of 128 and 256.
@pytest.mark.parametrize("length", [1, *range(119, 132), 250, 251, 252, 300])
def test_a_fork_takes_nothing_until_one_of_the_two_goes_on(length):
    engine = engine_of()
    session = opened(engine, length)
    says(engine, session)
    before = free(engine.runner.pool)
    twins = [engine.call("session_fork", session=session) for _ in range(5)]
    assert free(engine.runner.pool) == before
    ids = known(engine, session)
    one = says(engine, twins[0], IDS[500:503])
    assert one.answer == plain([*ids, *IDS[500:503]])
    assert before[0] - free(engine.runner.pool)[0] == 1
    for ratio, n in free(engine.runner.pool)[1].items():  # a copy of the page it goes on in, and those that are new
        assert before[1][ratio] - n <= 1 + pages_for(len(ids) + 8, ratio) - pages_for(len(ids) - 1, ratio)
    assert says(engine, session).answer == says(engine, twins[1]).answer == plain(ids)
    assert known(engine, twins[2]) == ids
    for s in (session, *twins):
        engine.call("session_close", session=s)
    assert is_empty(engine)


def test_both_ways_that_a_fork_went_are_prefixes_for_others():
    engine = engine_of()
    session = opened(engine)
    says(engine, session)
    twin = engine.call("session_fork", session=session)
    texts = []
    for s, start in ((session, 500), (twin, 900), (session, 1300)):  # by turns, past several blocks
        says(engine, s, IDS[start : start + 290])
    for s in (session, twin):
        texts.append(known(engine, s))
        engine.call("session_close", session=s)
    for n, ids in enumerate(texts):
        said = run(engine, [dataclasses.replace(request(f"r{n}", 0, 6, logprobs=2), ids=tuple(ids))])[f"r{n}", 0]
        assert said.answer == plain(ids)
        assert said.end.reuse.matched_tokens == (len(ids) - 1) // 128 * 128
    assert is_empty(engine)


def test_forks_of_what_is_not_computed_yet_or_set_aside_or_forked_already():
    engine = engine_of()
    session = opened(engine)
    early = engine.call("session_fork", session=session)
    first = says(engine, session)
    ids = known(engine, session)
    assert engine.park_idle()
    before = free(engine.runner.pool)
    aside = engine.call("session_fork", session=session)
    twin = engine.call("session_fork", session=aside)
    assert free(engine.runner.pool) == before
    engine.call("session_rewind", session=twin, num_tokens=9)
    engine.call("session_close", session=session)
    assert says(engine, twin).answer == plain(ids[:-9])
    assert says(engine, aside).answer == plain(ids)
    assert says(engine, early).answer == first.answer
    for s in (early, aside, twin):
        engine.call("session_close", session=s)
    assert is_empty(engine)


@pytest.mark.parametrize("drafter", ["off", "mtp"])
@pytest.mark.parametrize("side", ["session", "fork"])
def test_short_rewinds_go_on_exactly_though_drafts_were_made_there(monkeypatch, drafter, side):
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    net = agreeing_network()
    for length in (123, 40):  # the turn ends just past a block, or within one
        engine = engine_of(net, drafter=drafter, max_drafts=4, max_sequences=3)
        session = opened(engine, length)
        said = says(engine, session, num_tokens=10).tokens
        ids = [*IDS[:length], *said]
        for count in range(1, 13):
            twin = engine.call("session_fork", session=session)
            cut, other = (session, twin) if side == "session" else (twin, session)
            engine.call("session_rewind", session=cut, num_tokens=count)
            assert says(engine, cut).answer == plain(ids[: len(ids) - count], net)
            assert known(engine, other) == ids
            engine.call("session_close", session=cut)
            session = other
        assert says(engine, session).answer == plain(ids, net)
        assert drafter == "off" or engine.stats.accepted[0] > 0


@pytest.mark.parametrize("parked", [False, True])
def test_rewinds_of_any_length_at_rest_and_set_aside(parked):
    for count in (*range(13), 127, 128, 129, 250, 306):
        engine = engine_of()
        session = opened(engine)
        says(engine, session)
        if parked:
            assert engine.park_idle()
        again = engine.call("session_rewind", session=session, num_tokens=count)
        ids = known(engine, session)
        assert ids == [*IDS[:300], *plain(IDS[:300])[0]][: 306 - count]
        if ids:
            computed = engine.stats.computed_tokens
            assert says(engine, session, num_tokens=2).answer == plain(ids, num_tokens=2)
            assert 1 <= engine.stats.computed_tokens - computed - 1 <= max(1, again)
        else:
            assert says(engine, session, IDS[:9]).answer == plain(IDS[:9])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_rewind_just_after_coming_back_goes_no_further_than_its_state(tmp_path, count):
    """What a state was copied for is all it has: one token less needs a row that is not there."""
    engine = engine_of(max_sequences=3)
    session = opened(engine)
    says(engine, session)
    path = str(tmp_path / "a.session")
    engine.call("session_save", session=session, path=path)
    ids = known(engine, session)[: 306 - count]
    engine.park_idle()
    for start in (600, 1000):  # somebody else's rows in every slot
        other = opened(engine, 300, start)
        says(engine, other)
        engine.call("session_close", session=other)
    engine.call("session_save", session=session, path=path)  # brings it in
    restored = engine.call("session_restore", path=path)
    for s in (session, restored):
        engine.call("session_rewind", session=s, num_tokens=count)
        assert says(engine, s).answer == plain(ids)


# Memory


def test_more_sessions_than_there_is_room_for_take_turns():
    engine = engine_of(cache_bytes=bytes_for(CONFIG, 700, 2), max_sequences=2)
    sessions = {opened(engine, 280, 300 * n): IDS[300 * n : 300 * n + 280] for n in range(6)}
    for _ in range(3):
        for session in sessions:
            said = says(engine, session, num_tokens=3)
            assert said.answer == plain(sessions[session], num_tokens=3)
            sessions[session] = [*sessions[session], *said.tokens]
    assert engine.stats.parks > 0
    for session in sessions:
        engine.call("session_close", session=session)
    assert is_empty(engine)


def test_a_session_set_aside_is_saved_though_all_else_is_full(tmp_path):
    engine = engine_of(cache_bytes=bytes_for(CONFIG, 700, 2), max_sequences=2)
    sessions = [opened(engine, 280, 300 * n) for n in range(4)]
    for session in sessions:
        says(engine, session)
    for n, session in enumerate(sessions):
        path = tmp_path / f"{n}.session"
        engine.call("session_save", session=session, path=str(path))
        ids = known(engine, session)
        other = engine_of()
        restored = other.call("session_restore", path=str(path))
        assert known(other, restored) == ids and says(other, restored).answer == plain(ids)


# Files


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300])
def test_a_file_goes_on_in_another_engine(tmp_path, length):
    path = str(tmp_path / "a.session")
    engine = engine_of()
    session = opened(engine, length)
    if length:
        says(engine, session)
    notes = {"messages": [{"role": "user", "content": "é"}]}
    assert engine.call("session_save", session=session, path=path, notes=notes) == os.path.getsize(path)
    ids = known(engine, session)
    for options in ({}, {"step_tokens": 40, "max_sequences": 1}, {"cache_bytes": 32 << 20, "drafter": "lookup"}):
        other = engine_of(**options)
        restored = other.call("session_restore", path=path)
        assert known(other, restored) == ids and other.call("session_notes", session=restored) == notes
        computed = other.stats.computed_tokens
        assert says(other, restored, IDS[5:9]).answer == plain([*ids, *IDS[5:9]])
        assert other.stats.computed_tokens - computed <= 5 + 5 or other.stats.drafted
        other.call("session_close", session=restored)
        assert is_empty(other)


@pytest.mark.parametrize("length", [2, 40, 123])
def test_a_file_moves_between_engines_that_draft_more_or_less_or_not(tmp_path, monkeypatch, length):
    monkeypatch.setattr("pyrosome.engine.drafting.Depth", Eager)
    path, net = str(tmp_path / "a.session"), agreeing_network()
    choices = ({"drafter": "mtp", "max_drafts": 4}, {"drafter": "mtp", "max_drafts": 1}, {"drafter": "lookup"}, {})
    for mine in choices:
        engine = engine_of(net, **mine)
        session = opened(engine, length)
        says(engine, session)
        engine.call("session_save", session=session, path=path)
        ids = known(engine, session)
        expected = plain(ids, net, num_tokens=12)
        for theirs in choices:
            other = engine_of(net, **theirs)
            restored = other.call("session_restore", path=path)
            said = says(other, restored, num_tokens=12)
            assert said.answer == expected
            assert theirs.get("drafter") != "mtp" or other.stats.accepted[0] > 0
            assert known(other, restored) == [*ids, *said.tokens]


def test_what_came_from_a_file_is_a_prefix_for_others(tmp_path):
    path = str(tmp_path / "a.session")
    engine = engine_of()
    session = opened(engine)
    says(engine, session)
    engine.call("session_save", session=session, path=path)
    other = engine_of()
    other.call("session_restore", path=path)
    said = run(other, [request("r", 299)])["r", 0]
    assert said.end.reuse.matched_tokens == 256
    assert said.answer == run(engine_of(), [request("r", 299)])["r", 0].answer


def test_a_file_that_does_not_fit_or_is_damaged_is_refused_and_nobody_is_harmed(tmp_path):
    path = tmp_path / "a.session"
    engine = engine_of()
    engine.call("session_save", session=opened(engine, 1), path=str(path))
    session = opened(engine)
    says(engine, session)
    engine.call("session_save", session=session, path=str(path))
    with pytest.raises(ContextTooLong, match="305 tokens were asked for and the context holds 256"):
        engine_of(max_context=256).call("session_restore", path=str(path))
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    engine.add(request("other", 200, start=700))
    before = free(engine.runner.pool)
    with pytest.raises(CheckpointError, match="damaged"):
        engine.call("session_restore", path=str(path))
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.call("session_restore", path=str(tmp_path / "none"))
    assert free(engine.runner.pool) == before and len(engine.sessions) == 2
    assert drain(engine)["other", 0].answer == run(engine_of(), [request("other", 200, start=700)])["other", 0].answer


def test_a_full_disk_refuses_the_save_and_the_session_goes_on(tmp_path, monkeypatch):
    engine = engine_of()
    session = opened(engine)
    said = says(engine, session)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(DoesNotFit, match="the disk"):
        engine.call("session_save", session=session, path=str(tmp_path / "a.session"))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    assert says(engine, session).answer == plain([*IDS[:300], *said.tokens])


@pytest.mark.parametrize("slots", [1, 2])
def test_running_requests_leave_no_room_and_it_is_said(tmp_path, slots):
    """No slot; or a slot, and not the pages."""
    path = str(tmp_path / "a.session")
    engine = engine_of(max_sequences=slots, cache_bytes=bytes_for(CONFIG, 700, slots))
    session = opened(engine, 600)
    says(engine, session)
    engine.call("session_save", session=session, path=path)
    engine.park_idle()
    engine.add(request("running", 650, 6, 1000))
    engine.step()
    for name, arguments in (("session_save", {"session": session, "path": path}), ("session_restore", {"path": path})):
        with pytest.raises(RequestError, match="no room beside what is running"):
            engine.call(name, **arguments)
    drain(engine)
    restored = engine.call("session_restore", path=path)
    assert says(engine, restored).answer == says(engine, session).answer


@pytest.mark.parametrize("running", range(40, 680, 64))
@pytest.mark.parametrize("length", [129, 500, 640])
def test_a_session_that_comes_back_is_not_set_aside_to_make_room_for_itself(tmp_path, running, length):
    """Whatever room there is beside a request that runs: it is saved, or it is said that it cannot be now."""
    path = str(tmp_path / "a.session")
    engine = engine_of(max_sequences=2, cache_bytes=bytes_for(CONFIG, 700, 2))
    session = opened(engine, length)
    says(engine, session)
    ids = known(engine, session)
    engine.park_idle()
    engine.add(request("running", running, 6, 1000))
    engine.step()
    try:
        engine.call("session_save", session=session, path=path)
    except RequestError as error:
        assert "no room beside" in str(error)  # noqa: PT017 - both are right
    drain(engine)
    assert says(engine, session).answer == plain(ids)
