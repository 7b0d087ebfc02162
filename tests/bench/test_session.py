"""The benchmark of sessions runs, takes nothing of the cache for a fork, and writes what it reads back."""

import sys

import pytest
import torch

from bench import session
from pyrosome.cache.state import put_snapshot
from pyrosome.cache.store import open_session


def test_a_fork_takes_nothing_and_files_come_back(tmp_path):
    pool, holding = session.filled(512)
    fork = session.forks(pool, holding, 512, 3)
    assert (fork["slots"], fork["pages"]) == (0, 0) and fork["worst_ms"] >= fork["median_ms"] > 0
    found = session.files(pool, holding, 512, tmp_path, 2)
    assert found["bytes"] == (tmp_path / "a.session").stat().st_size == (tmp_path / "plain").stat().st_size
    assert all(len(each) == 2 for each in found["seconds"].values()) and min(found["gb_per_s"].values()) > 0
    assert min(found["save_share"], found["restore_share"]) > 0
    # What comes back is what was there.
    there = pool.open()
    put_snapshot(pool, there, open_session(tmp_path / "a.session", fingerprint=session.FINGERPRINT).load(pool, there))
    for ratio, pages in holding.pages.items():
        for (layer, name), planes in pool.planes.items():
            if pool.streams[layer][name].is_history and pool.streams[layer][name].per_tokens == ratio:
                rows = 512 // ratio
                for plane in planes:
                    ours, theirs = (
                        plane.view(-1, 64, plane.shape[-1])[p].flatten(0, 1)[:rows] for p in (pages, there.pages[ratio])
                    )
                    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_the_quick_form_promises_nothing_and_may_leave_no_record(monkeypatch, capsys):
    monkeypatch.setattr(session.records, "append", lambda *args: pytest.fail("no record was asked for"))
    monkeypatch.setattr(sys, "argv", ["session", "--quick", "--no-save"])
    assert session.main() == 0
    assert "fork of 2,048 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"median_ms": 5.0}, 1),
        ({"slots": 1}, 1),
        ({"pages": 1}, 1),
        ({"save_share": 0.69}, 1),
        ({"restore_share": 0.69}, 1),
    ],
    ids=str,
)
def test_a_bar_that_is_missed_is_told_by_the_exit_status_and_recorded_all_the_same(monkeypatch, changes, status):
    fork = {"median_ms": 4.9, "worst_ms": 9.0, "slots": 0, "pages": 0}
    disk = {"bytes": 1, "gb_per_s": {}, "save_share": 0.7, "restore_share": 0.7}
    fork, disk = ({k: changes.get(k, v) for k, v in each.items()} for each in (fork, disk))
    monkeypatch.setattr(session, "filled", lambda tokens: (None, None))
    monkeypatch.setattr(session, "forks", lambda *args: fork)
    monkeypatch.setattr(session, "files", lambda *args: disk)
    kept = []
    monkeypatch.setattr(session.records, "append", lambda path, record: kept.append((path.name, record)))
    monkeypatch.setattr(sys, "argv", ["session"])
    assert session.main() == status
    ((name, record),) = kept
    assert (name, record["fork"], record["disk"], record["tokens"]) == ("session.jsonl", fork, disk, 262_144)
