"""Predictions beside measurements: kept line by line, summed up by kind."""

import multiprocessing
import stat

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan import history


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_nothing_was_predicted_yet():
    assert history.summary() == []
    assert history.entries() == ([], 0)


def test_errors_are_summed_up_by_kind():
    for predicted in (80, 95, 100, 110, 150):
        history.keep("decode tok/s", predicted, 100, "a machine")
    history.keep("prefill tok/s", 3, 2, "a machine")
    decode, prefill = history.summary()
    assert (decode["what"], decode["count"]) == ("decode tok/s", 5)
    assert decode["median"] == pytest.approx(0.10)
    assert decode["p90"] == pytest.approx(0.50)
    assert decode["bias"] == pytest.approx(0.0)
    assert (prefill["what"], prefill["count"], prefill["bias"]) == ("prefill tok/s", 1, 0.5)


def test_an_entry_comes_back_as_it_was_kept():
    history.keep("decode tok/s", 12.5, 10, "a machine", {"pyrosome": "1.0"})
    ((entry,), broken) = history.entries()
    assert (entry.what, entry.predicted, entry.measured, entry.machine) == ("decode tok/s", 12.5, 10.0, "a machine")
    assert entry.versions == {"pyrosome": "1.0"}
    assert entry.error == 0.25
    assert broken == 0


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_what_is_no_rate_is_refused(value):
    with pytest.raises(RequestError, match="numbers above 0"):
        history.keep("decode tok/s", value, 1, "a machine")
    with pytest.raises(RequestError, match="measured"):
        history.keep("decode tok/s", 1, value, "a machine")
    assert history.entries() == ([], 0)


BROKEN = [
    b"{", b"[]", b"1", b'"x"', b"\xff\xfe", b"{}", b'{"what": "x"}',
    b'{"what": 1, "predicted": 1, "measured": 1, "machine": "m", "versions": {}, "when": "w"}',
    b'{"what": "x", "predicted": true, "measured": 1, "machine": "m", "versions": {}, "when": "w"}',
    b'{"what": "x", "predicted": 0, "measured": 1, "machine": "m", "versions": {}, "when": "w"}',
    b'{"what": "x", "predicted": NaN, "measured": 1, "machine": "m", "versions": {}, "when": "w"}',
    b'{"what": "x", "predicted": 1, "measured": 1, "machine": "m", "versions": [], "when": "w"}',
]  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_skipped_and_told(line, caplog):
    history.keep("x", 1, 2, "a machine")
    with open(history.path(), "ab") as file:
        file.write(line)  # without an end: its writer was stopped
    history.keep("x", 1, 4, "a machine")
    found, broken = history.entries()
    assert [e.measured for e in found] == [2, 4]
    assert broken == 1
    assert "not of a prediction: 1" in caplog.text


def test_the_file_is_bounded_and_keeps_what_is_newest(monkeypatch):
    monkeypatch.setattr(history, "MOST_BYTES", 4000)
    for i in range(1, 100):
        history.keep("x", i, 1, "a machine")
        assert history.path().stat().st_size <= 4000
    found, broken = history.entries()
    assert [e.predicted for e in found] == list(range(100 - len(found), 100))
    assert len(found) > 10
    assert broken == 0


def test_nobody_else_may_read_it():
    history.keep("x", 1, 1, "a machine")
    assert stat.S_IMODE(history.path().parent.stat().st_mode) == 0o700


def _keep_many(who: int) -> None:
    for _ in range(25):
        history.keep(f"by {who}", 1, 1, "m" * 2000)


def test_several_processes_write_at_once_and_no_line_is_lost_or_torn():
    spawned = multiprocessing.get_context("fork")
    writers = [spawned.Process(target=_keep_many, args=(i,)) for i in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
        assert w.exitcode == 0
    assert {e["what"]: e["count"] for e in history.summary()} == {f"by {i}": 25 for i in range(3)}
    assert history.entries()[1] == 0


def test_nobody_writes_while_another_drops_the_older_half(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    tried = []

    def halve():
        with open(history.path().parent / "plans.lock", "wb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(True)

    monkeypatch.setattr(history, "MOST_BYTES", 0)
    monkeypatch.setattr(history, "_halve", halve)
    history.keep("x", 1, 1, "a machine")
    assert tried


def test_a_folder_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    with pytest.raises(RequestError, match="cannot be used"):
        history.keep("x", 1, 1, "a machine")
