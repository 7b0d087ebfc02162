"""Reports: what they say of the model, how they are kept, and what people see of them."""

from __future__ import annotations

import json
import sys

import pytest

from pyrosome.errors import RequestError
from pyrosome.evals import recall
from pyrosome.evals.modes import modes
from pyrosome.evals.plot import plot
from pyrosome.evals.report import append, check_out, margin, read, report, share, tables
from pyrosome.evals.shares import Share, difference
from pyrosome.evals.subject import Subject
from pyrosome.evals.tools import tools
from tests.evals import test_modes, test_tools
from tests.evals.subjects import Oracle, checkpoint
from tests.evals.test_recall import knows


@pytest.fixture(scope="module")
def subject():
    with Subject(checkpoint(), numerics="exact") as one:
        yield one


def recalled(subject, **rest):
    task = recall.RecallTask((256, 384), 8, 8, ablations=("none", "window"))
    oracle = Oracle(knows)
    runs = recall.measure(oracle, task, recall.draw(oracle, task))
    results = [recall.summary(r, 24) for r in runs]
    rest = {"kind": "ledger", "facts": 8, "n": 8, "results": results, "over_none": recall.over_none(runs), **rest}
    return report("recall", subject, "tiny", "pyrosome eval recall tiny", 5, **rest)


def test_a_report_says_what_would_repeat_it(subject):
    found = report("modes", subject, "some/where", "pyrosome eval modes", 7, n=3)
    expected = {"eval": "modes", "model": "some/where", "numerics": "exact", "kv_format": "f32", "window": 24,
                "topk": 16, "draft_head": True, "seed": 7, "command": "pyrosome eval modes", "n": 3}  # fmt: skip
    assert {k: found[k] for k in expected} == expected
    assert len(found["fingerprint"]) == 16 and found["threads"] >= 1 and found["at"].endswith("+00:00")
    with Subject(checkpoint(1), numerics="exact") as other:
        assert report("modes", other, "some/where", "", 7)["fingerprint"] != found["fingerprint"]
    json.dumps(found)


def test_reports_are_kept_one_on_each_line(tmp_path, subject):
    path = tmp_path / "results.jsonl"
    check_out(path)
    first, second = recalled(subject), report("modes", subject, "ü", "", 0)
    append(path, first)
    append(path, second)
    assert read(path) == [first, second] and len(path.read_text().splitlines()) == 2


def test_files_that_cannot_be(tmp_path):
    for write in (check_out, lambda p: append(p, {})):
        with pytest.raises(RequestError, match=r"appended to .*: No such file.*name another file"):
            write(tmp_path / "none" / "r.jsonl")
    with pytest.raises(RequestError, match=r"cannot be read .*--out"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "bad").write_text('{"eval": "text"}\n{"step": 1}\n')
    with pytest.raises(RequestError, match=r"line 2 of .* is no result of an evaluation"):
        read(tmp_path / "bad")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(RequestError, match="line 1"):
        read(tmp_path / "bad")


def test_figures_as_people_read_them():
    assert share(Share(8, 10).as_dict()) == "0.800 [.49, .94]" and share(Share(0, 0).as_dict()) == "-"
    assert (
        margin(difference([True] * 4, [False] * 4)).startswith("+1.000 [+0.17, ") and margin(difference([], [])) == "-"
    )


def shown(found):
    return {t.heading: [dict(zip(t.titles, row, strict=True)) for row in t.rows] for t in tables(found)}


def test_recall_as_tables(subject):
    found = recalled(subject)
    whole, places, ablations = shown(found).items()
    assert whole[0] == "recall of 8 facts, ledger, exact numerics, seed 5"
    assert [(r["ablation"], r["context"]) for r in whole[1]] == [
        (a, c) for c in ("256", "384") for a in ("none", "window")
    ]
    first = whole[1][0]
    assert first["n"] == "8" and first["right"] == "1.000 [.68, 1.00]" and first["first draft"].startswith("0.750")
    low, high = found["results"][0]["tokens"]
    assert places[0] == "where, none" and len(places[1]) == 1 + 4 + 8 + 1 + 8
    assert places[1][0]["256 tokens"] == f"{low}-{high}"
    names = [r[""] for r in places[1]]
    assert names[1] == "mod 4: 0" and names[5] == "mod 128: 0-15" and names[13:15] == ["in window", "nearest quarter"]
    farthest = found["results"][2]["by_distance"][3]
    assert places[1][-1]["384 tokens"] == f"{farthest['from']}-{farthest['to']}"
    assert places[1][-2]["384 tokens"] == share(farthest)
    assert list(places[1][0]) == ["", "256 tokens", "384 tokens"]
    assert [(r["ablation"], r["difference"][:6]) for r in ablations[1]] == [("window", "+0.000")] * 2


def test_recall_against_another_model_as_tables(subject):
    one = recalled(subject)
    differences = [{"context": 256, "ablation": "none", **difference([True] * 8, [False] * 8)}]
    other = {"model": "other", "numerics": "trained", "results": one["results"], "differences": differences}
    found = shown(one | {"against": other})
    assert len(found["against other, trained numerics"]) == 4
    assert found["tiny over other"][0]["difference"].startswith("+1.000")


def test_nothing_done_is_an_empty_table(subject):
    (empty,) = tables(recalled(subject, results=[], over_none=[]))
    assert not empty.rows


def test_modes_and_tools_as_tables(subject):
    found = shown(report("modes", subject, "m", "", 2, **modes(Oracle(test_modes.thinks), 20, 0, ("off", "high"))))
    off, high = found["held-out sums of 2 numbers, seed 2"]
    assert high["right"].startswith("1.000") and off["thought tokens"] == "0.0" and high["most"] == "3"
    (one,) = found["margins"]
    assert one["intervals apart"] == "yes" and one["margin"].startswith("+")
    found = shown(report("tools", subject, "m", "", 2, **tools(Oracle(test_tools.knows), 4)))
    rows = found["the tool lookup, thinking off, seed 2"]
    assert len(rows) == 8 and all(r["free"][:5] == r["grammar"][:5] == "1.000" for r in rows[:-1])


def test_text_as_a_table(subject):
    figures = {"nats_per_token": 2.0, "nats_per_token_error": 0.05, "bits_per_byte": 1.5, "bits_per_byte_error": None}
    results = [{"name": "model", **figures}]
    found = report("text", subject, "m", "", 0, n=9, documents=3, tokens=1234, bytes=5678, results=results,
                   margins=[{"name": "unigram - model", **figures}])  # fmt: skip
    ((heading, rows),) = shown(found).items()
    assert heading == "9 held-out passages of 3 documents: 1,234 tokens, 5,678 bytes"
    assert rows[0] == {"": "model", "bits per byte": "1.500 ± -", "nats per token": "2.000 ± 0.050"}
    assert rows[1]["bits per byte"] == "+1.500 ± -"


def test_recall_as_a_picture(tmp_path, subject, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    made = []
    monkeypatch.setattr(figures, "Figure", lambda real=figures.Figure, **k: made.append(real(**k)) or made[-1])
    one = recalled(subject)
    other = {"model": "other", "numerics": "trained", "results": one["results"], "differences": []}
    plot([{"eval": "text"}, one, one | {"model": "second", "against": other}], tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))
    (axes,) = made[0].axes
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    names = ("tiny (exact)", "second (exact)", "other (trained)")
    assert labels == [f"{n}, ledger{a}" for n in names for a in ("", ", window")]
    assert list(axes.containers[0].lines[0].get_xdata()) == [256, 384]


def test_pictures_that_cannot_be_drawn(tmp_path, subject, monkeypatch):
    with pytest.raises(RequestError, match="there is none in these results; run `eval recall`"):
        plot([{"eval": "text"}], tmp_path / "r.png")
    pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match="name another file"):
        plot([recalled(subject)], tmp_path / "none" / "r.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pip install 'pyrosome\[train\]'"):
        plot([recalled(subject)], tmp_path / "r.png")
