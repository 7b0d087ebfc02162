"""Receipts: complete, whole or not at all, and harmless whatever a checkpoint calls its tensors."""

from __future__ import annotations

import html.parser
import json
import math
import os
import xml.etree.ElementTree as ElementTree

import pytest

from pyrosome.errors import RequestError
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.page import page
from pyrosome.verify.plots import drawn
from pyrosome.verify.receipt import HTML_NAME, JSON_NAME, Record, plain, prepare, write

HOSTILE = "</td></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&\x00\u202e\ud800"
BARS = {"title": "t", "kind": "bars", "x": ["a", "b"], "series": {"s": [1.0, 3.0]}}


def record(*findings, checks=("files", "layers")):
    made = Record(Wanted("builtin:nano"), checks)
    assert list(made.watched(iter(findings))) == list(findings)
    return made


def well(**changes):
    return Finding(**{"check": "files", "what": "headers", "ok": True, "detail": "as they are"} | changes)


class Seen(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_data(self, data):
        self.text += data


def test_a_receipt_holds_every_finding_with_its_figures():
    made = record(
        well(figures={"bytes": 7}),
        well(what="sums", ok=None),
        well(check="layers", what="layer 3, attention", ok=False, detail="off by 1"),
        well(check="layers", what="layer 4", warns=True),
    )
    told = made.as_dict({"machine": {"cores": 2}})
    assert told["counts"] == {"well": 2, "warned": 1, "failed": 1, "left_out": 1} and told["ok"] is False
    files, layers = told["checks"]
    assert files["findings"][0] == {
        "what": "headers",
        "ok": True,
        "detail": "as they are",
        "figures": {"bytes": 7},
        "warns": False,
    }
    assert [f["ok"] for f in layers["findings"]] == [False, True] and layers["counts"]["failed"] == 1
    assert (
        told["asked"]["seed"] == 0
        and told["asked"]["checks"] == ["files", "layers"]
        and told["machine"] == {"cores": 2}
    )
    assert told["seconds"] >= sum(c["seconds"] for c in told["checks"]) - 0.01


def test_it_is_well_where_something_held_and_nothing_failed():
    assert record(well(), well(ok=None), well(warns=True)).ok
    assert not record(well(), well(ok=False)).ok
    assert not record(well(ok=None)).ok and not record().ok


def test_both_files_are_written_and_are_what_they_say(tmp_path):
    told = record(well(figures={"worst": math.inf, "plots": [BARS]})).as_dict({})
    paths = write(tmp_path / "deep" / "er", told)
    assert [p.name for p in paths] == [JSON_NAME, HTML_NAME] and sorted(os.listdir(paths[0].parent)) == sorted(
        (JSON_NAME, HTML_NAME)
    )
    again = json.loads(paths[0].read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no Infinity, no NaN
    assert again == told and again["checks"][0]["findings"][0]["figures"]["worst"] == "inf"
    assert "<svg" in paths[1].read_text(encoding="utf-8")
    paths[1].write_text("older")
    write(paths[0].parent, told)
    assert "<svg" in paths[1].read_text(encoding="utf-8")


def test_names_of_strangers_stay_text(tmp_path):
    plot = {"title": HOSTILE, "kind": "lines", "x": [HOSTILE, "b"], "series": {HOSTILE: [1, 2], "c": [2, 1]}}
    plot |= {"x_title": HOSTILE, "y_title": HOSTILE}
    finding = well(what=HOSTILE, detail=HOSTILE, check=HOSTILE, figures={"plots": [plot], HOSTILE: HOSTILE})
    told = record(finding, checks=[HOSTILE]).as_dict({"model": {"name": HOSTILE, HOSTILE: HOSTILE}})
    path = write(tmp_path, told)[1]
    seen = Seen(path.read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "object", "link", "a", "form"} & set(seen.tags)
    assert not [a for a in seen.attributes if a[1].startswith("on") or a[1] in ("src", "href", "action", "style")]
    assert seen.text.count("alert(1)") >= 6  # in the title, headings, tables and plots, as text
    assert "default-src 'none'" in {a[1]: a[2] for a in seen.attributes if a[0] == "meta"}["content"]
    assert not set("\x00\u202e\ud800") & set(seen.text)


def test_the_page_says_how_it_ended():
    def verdict(*findings):
        return Seen(page(record(*findings).as_dict({}))).text

    assert "All is well" in verdict(well())
    assert "deserve a look" in verdict(well(warns=True))
    assert "Something is wrong" in verdict(well(), well(ok=False))
    assert "Nothing could be looked at" in verdict(well(ok=None))


def test_failures_are_open_and_what_held_is_folded():
    attributes = Seen(page(record(well(), well(check="layers", ok=False)).as_dict({}))).attributes
    folded = [a for a in attributes if a[0] == "details" and a[1] == "class"]
    assert [a[2] for a in folded] == ["ok", "fail"] and [a for a in attributes if a[1] == "open"] == [
        ("details", "open", None)
    ]


@pytest.mark.parametrize("where", ["file/receipt", "file"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(where, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="name another directory"):
        prepare(tmp_path / where)


def test_a_file_that_cannot_be_put_in_place_is_refused_and_nothing_is_left_behind(tmp_path):
    (tmp_path / HTML_NAME).mkdir()
    with pytest.raises(RequestError, match=HTML_NAME):
        write(tmp_path, record(well()).as_dict({}))
    assert sorted(os.listdir(tmp_path)) == sorted((JSON_NAME, HTML_NAME))


def test_plain_data_is_what_json_holds():
    found = plain({1: (math.nan, -math.inf, 1.5, None, True), "p": BaseException, "s": {3}})
    assert found["1"] == ["nan", "-inf", 1.5, None, True] and found["s"] == [3]
    json.dumps(found, allow_nan=False)


def test_a_plot_is_well_formed_and_within_its_frame():
    for changes in (
        {},
        {"log": True, "bound": 0.1},
        {"kind": "lines", "x": [0, 500]},
        {"low": {"s": [0.5, 2]}, "high": {"s": [2, 4]}},
        {"series": {"s": [-1, 2]}},
        {"title": HOSTILE, "x": [HOSTILE, "b"]},
    ):
        figure = ElementTree.fromstring(drawn(BARS | changes))
        assert figure.tag == "figure"
        for mark in figure.iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert -1 <= float(mark.get(key, 0)) <= 640
            assert float(mark.get("height", 0)) >= 0 and float(mark.get("width", 0)) >= 0


def test_bars_are_as_high_as_their_values():
    low, high = (float(r.get("height")) for r in ElementTree.fromstring(drawn(BARS)).iter("rect"))
    assert high == pytest.approx(3 * low, rel=0.01)
    (a, b, c) = (float(r.get("height")) for r in ElementTree.fromstring(
        drawn(BARS | {"x": [1, 2, 3], "series": {"s": [1e-3, 1e-2, 1e-1]}, "log": True})).iter("rect"))  # fmt: skip
    assert b - a == pytest.approx(c - b, rel=0.01) and a > 0


@pytest.mark.parametrize(
    "plot",
    [
        {}, {"x": [1]}, BARS | {"series": {}}, BARS | {"x": []}, BARS | {"series": {"s": [None, math.nan]}},
        BARS | {"series": {"s": ["1", True]}}, BARS | {"series": {"s": [0, -1]}, "log": True},
    ],
)  # fmt: skip
def test_a_plot_of_nothing_is_none(plot):
    assert drawn(plot) == ""


def test_gaps_break_a_line_and_zeros_are_told_where_a_scale_has_none():
    gap = drawn(BARS | {"kind": "lines", "x": [1, 2, 3, 4, 5], "series": {"s": [1, 2, None, 3, 4]}})
    assert gap.count("<polyline") == 2 and gap.count("<circle") == 4
    assert ">0</text>" in drawn(BARS | {"series": {"s": [0.0, 1e-3]}, "log": True})


def test_long_labels_are_turned_and_shared_words_said_once():
    turned = drawn(BARS | {"x": [f"a_long_name_of_an_op_{i}" for i in range(20)], "series": {"s": [1.0] * 20}})
    assert turned.count("rotate(-40") == 20
    said_once = drawn(BARS | {"x": [f"length mod 128 is {i}" for i in range(8)], "series": {"s": [1.0] * 8}})
    assert said_once.count("length mod 128 is") == 1 and "rotate(-40" not in said_once
