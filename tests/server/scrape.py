"""Reading `/metrics` in tests, and a scripted engine that counts as a real one does."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx2 as httpx
from prometheus_client import parser

from pyrosome.engine.request import Reuse
from pyrosome.engine.stats import Stats
from pyrosome.server.metrics import Metrics
from pyrosome.server.metrics_names import PREFIX
from pyrosome.server.service import Service
from tests.server.scripted import ScriptedEngine, saying

BODY = {"messages": [{"role": "user", "content": "? falcon"}]}
PATH = "/v1/chat/completions"


class Scrape:
    """Samples of `/metrics`, by name and labels, the constant ones left out."""

    def __init__(self, text: str) -> None:
        self.families = {f.name: f for f in parser.text_string_to_metric_families(text)}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                key = sample.name, frozenset(labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[PREFIX + name, frozenset(labels.items())]

    def get(self, name: str, **labels: str) -> float | None:
        return self.samples.get((PREFIX + name, frozenset(labels.items())))


def scrape(client: httpx.Client) -> Scrape:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return Scrape(answer.text)


class Counting(ScriptedEngine):
    """A scripted engine that counts as a real one does."""

    def __init__(self, script: Any, **options: Any) -> None:
        super().__init__(script, **options)
        self.num_asked = 0  # for these numbers
        self.stats = Stats(
            pool_bytes={"window_kv": (0, 50), "csa_kv": (30, 200), "hca_kv": (10, 100), "index_k": (5, 100),
                        "tail": (0, 70), "draft": (0, 20)},
            tree_blocks=3,
        )  # fmt: skip

    def step(self) -> list[Any]:
        if any(not s["at"] and not s["prompt"] for s in self._open.values()):
            self.stats.looked_up(Reuse(9, 4, 3, 1, "no snapshot"))
            self.stats.replayed_tokens += 1
        self.stats.step_done(0.04, 7)
        self.stats.drafts_checked(2, 1)
        self.stats.output_tokens += len(self._open)
        return super().step()

    def call(self, name: str, /, **arguments: Any) -> Any:
        if name == "stats":
            self.num_asked += 1
            return dataclasses.replace(self.stats, running=len(self._open))
        return super().call(name, **arguments)


def counting_engine(text: str) -> Counting:
    """In a process of its own: see `EngineProcess`."""
    return Counting(saying(text))


def metrics_of(service: Service) -> Metrics:
    """What watches a service that an app was made of."""
    return next(w for w in service.watchers if isinstance(w, Metrics))
