"""Curves: a resumed run's file is an unbroken one's."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys

import pytest

from pyrosome.errors import CheckpointError, RequestError
from pyrosome.train import curves as module
from pyrosome.train.curves import Curves, plot, read, smoothed


def row(step: int, **changes) -> dict:
    return {"step": step, "tokens": 100 * step, "stage": step // 4, "loss": 5 / step, "mtp_loss": 6 / step,
            "indexer_loss": None, "lr": 0.01, **changes}  # fmt: skip


def written(path, last: int) -> bytes:
    with Curves(path) as curves:
        for step in range(1, last + 1):
            curves.append(row(step))
    return path.read_bytes()


def test_a_line_a_row(tmp_path):
    path = tmp_path / "run" / "curves.jsonl"
    with Curves(path) as curves:
        curves.append(row(1))
        assert curves.offset == path.stat().st_size  # before it is closed: with the system at once
        curves.append(row(2, accuracy={"records": 0.5}))
        curves.sync()
        assert curves.offset == path.stat().st_size
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1), row(2, accuracy={"records": 0.5})] == read(path)


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("torn", [0, 1, 20])
def test_a_resumed_file_is_an_unbroken_one(tmp_path, step, torn):
    whole = written(tmp_path / "whole", 7)
    path = tmp_path / "curves.jsonl"
    before = written(path, 5)
    path.write_bytes(before + whole[len(before) :][:torn])
    with Curves(path, step) as curves:
        assert curves.offset == path.stat().st_size and [r["step"] for r in read(path)] == list(range(1, step + 1))
        for n in range(step + 1, 8):
            curves.append(row(n))
    assert path.read_bytes() == whole


def test_beginning_anew_empties_the_file(tmp_path):
    written(tmp_path / "c", 3)
    Curves(tmp_path / "c").close()
    assert (tmp_path / "c").read_bytes() == b""


def test_lost_rows_are_said(tmp_path, caplog):
    written(tmp_path / "c", 3)
    with caplog.at_level(logging.WARNING):
        Curves(tmp_path / "c", 3).close()
        assert not caplog.text
        Curves(tmp_path / "c", 5).close()
    assert "ends at step 3 and the run goes on from 5" in caplog.text


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"step": "2"}', b'{"tokens": 2}', b"\xff\xfe", b'{"step": 1}', b""])
def test_from_a_damaged_line_on_everything_goes(tmp_path, bad):
    good = written(tmp_path / "c", 2)
    (tmp_path / "c").write_bytes(good + bad + b"\n" + json.dumps(row(3)).encode() + b"\n")
    with Curves(tmp_path / "c", 9):
        assert (tmp_path / "c").read_bytes() == good


def test_reading_tolerates_a_torn_last_line_only(tmp_path):
    good = written(tmp_path / "c", 2)
    (tmp_path / "c").write_bytes(good + b'{"step": 3, "to')
    assert [r["step"] for r in read(tmp_path / "c")] == [1, 2]
    (tmp_path / "c").write_bytes(good + b'{"step": 3, "to\n' + good)
    with pytest.raises(CheckpointError, match=r"line 3 of .*resume"):
        read(tmp_path / "c")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "missing")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with Curves(tmp_path / "c") as curves:
        curves.append(row(1, loss=math.nan, accuracy={"a": math.inf, "b": 1.0}, norms=[1.0, -math.inf]))
    (found,) = read(tmp_path / "c")
    assert found["loss"] is None and found["accuracy"] == {"a": None, "b": 1.0} and found["norms"] == [1.0, None]


def test_a_full_disk_is_an_error_and_the_torn_row_goes_on_resume(tmp_path, monkeypatch):
    real, count = os.write, 0

    def fills(handle, data):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:10])

    good = written(tmp_path / "c", 2)
    curves = Curves(tmp_path / "c", 2)
    monkeypatch.setattr(module.os, "write", fills)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free the disk"):
        curves.append(row(3))
    monkeypatch.undo()
    curves.close()
    curves.close()
    assert (tmp_path / "c").stat().st_size == len(good) + 10
    with Curves(tmp_path / "c", 2) as curves:
        curves.append(row(3))
    assert (tmp_path / "c").read_bytes() == written(tmp_path / "whole", 3)


def test_a_place_that_cannot_be_written_to(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        Curves(tmp_path)


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert smoothed([2.0] * 9, 4) == pytest.approx([2.0] * 9)
    assert smoothed([0.0, 1.0, 1.0], 1) == [0.0, 1.0, 1.0]
    out = smoothed([0.0] * 50 + [1.0] * 50, 10)
    assert out[49] == 0 and 0 < out[50] < 0.2 and out[-1] > 0.98
    assert smoothed([], 3) == []


def test_a_picture_of_everything(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    made = []
    monkeypatch.setattr(figures, "Figure", lambda real=figures.Figure, **k: made.append(real(**k)) or made[-1])
    with Curves(tmp_path / "c") as curves:
        for step in range(1, 9):
            curves.append(row(step, **({"accuracy": {"records": 0.1 * step, "sums": None}} if step % 2 else {})))
    plot(tmp_path / "c", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    losses, accuracy, lr = made[0].axes
    assert [t.get_text() for t in losses.get_legend().get_texts()] == ["loss", "mtp loss"]
    assert [t.get_text() for t in losses.texts] == ["0", "1", "2"]
    records = next(line for line in accuracy.lines if line.get_label() == "records")
    assert list(records.get_xdata()) == [100, 300, 500, 700] and records.get_ydata()[-1] == pytest.approx(0.7)
    assert [line.get_xdata()[0] for line in lr.lines[1:]] == [400, 800]


def test_a_picture_of_one_bare_step(tmp_path):
    pytest.importorskip("matplotlib")
    with Curves(tmp_path / "c") as curves:
        curves.append({"step": 1, "tokens": 5})
    plot(tmp_path / "c", tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch):
    written(tmp_path / "c", 0)
    with pytest.raises(RequestError, match="no step yet"):
        plot(tmp_path / "c", tmp_path / "c.png")
    written(tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        plot(tmp_path / "c", tmp_path / "none" / "c.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pip install 'pyrosome\[train\]'"):
        plot(tmp_path / "c", tmp_path / "c.png")
