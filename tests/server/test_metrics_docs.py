"""The documents of metrics: the table is what is told, and the dashboard asks for nothing that is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pyrosome.server.metrics_names import BY_NAME, LABELS, PREFIX, table
from pyrosome.server.metrics_names import METRICS as TABLE
from tests.server.scrape import BODY, PATH, scrape

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_in_docs_is_what_is_told():
    docs = (DOCS / "metrics.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- METRICS -->\n(.*?)<!-- /METRICS -->", docs, re.DOTALL)[1]
    assert shown == table(), "run: python -m pyrosome.server.metrics_names docs/metrics.md"
    assert {label for metric in TABLE for label in metric.labels} <= {*LABELS, "position"}


def dashboard() -> dict[str, Any]:
    return json.loads((DOCS / "grafana" / "pyrosome.json").read_text(encoding="utf-8"))


def queries(board: dict[str, Any]) -> list[str]:
    panels = [p for panel in board["panels"] for p in (panel, *panel.get("panels", ()))]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_the_dashboard_asks_only_for_what_a_real_scrape_tells(nano):
    nano.post(PATH, json={**BODY, "max_tokens": 8})
    told = scrape(nano)
    names = {name for name, _ in told.samples} | {
        f.name + "_total" for f in told.families.values() if f.type == "counter"
    }
    asked = {name for expr in queries(dashboard()) for name in re.findall(r"(?:pyrosome|vllm):[a-z0-9_]+", expr)}
    assert len(asked) > 40
    assert asked - names == set()


def test_the_dashboard_uses_labels_that_its_metrics_have():
    for expr in queries(dashboard()):
        for name, selector in re.findall(r"pyrosome:([a-z0-9_]+)\{([^}]*)\}", expr):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            metric = BY_NAME.get(name) or BY_NAME[base]
            for label in re.findall(r"([a-z_]+)\s*[=!]~?", selector):
                assert label in (*metric.labels, "model_name", "engine", "instance"), (name, label)
        for grouping in re.findall(r"by \(([^)]*)\)", expr):
            for label in filter(None, re.split(r",\s*", grouping)):
                assert label == "le" or any(label in BY_NAME[n].labels for n in BY_NAME if f":{n}" in expr), (
                    expr,
                    label,
                )


def test_the_dashboard_shows_everything_the_table_has_and_its_panels_do_not_overlap():
    board = dashboard()
    text = "\n".join(queries(board))
    assert [m.name for m in TABLE if f"{PREFIX}{m.name}" not in text] == []
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    for panel in board["panels"]:
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] == "row" or panel["description"], panel["title"]
    assert {p["type"] for p in board["panels"]} >= {"heatmap", "timeseries", "stat"}
