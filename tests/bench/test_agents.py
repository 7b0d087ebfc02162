"""The benchmark of agents' conversations runs, and its verdict is what was promised."""

import itertools
import json

import pytest

from bench import agents
from pyrosome import LLM
from pyrosome.testing.traces import agent_trace, chat_trace


def test_a_trace_has_a_row_for_each_turn_and_a_summary():
    with LLM("builtin:nano", cache_bytes=8 << 20) as llm:
        rows = list(agents.run_turns(llm, agent_trace(3, 600, 1500)))
        more = list(agents.run_turns(llm, chat_trace(2, 300, 700)))
    assert len(rows) == 3 and len(more) == 2 and rows[0]["shared"] == 0
    assert all(0 < r["reused"] <= r["shared"] < r["prompt"] and r["first_s"] > 0 for r in rows[1:])
    found = agents.summary(rows)
    assert found["turns"] == 3 and found["turn_2_share"] == rows[1]["first_s"] / rows[0]["first_s"]
    assert 0 < found["least_reused_share"] <= found["median_reused_share"] <= 1


def test_agents_are_interleaved_each_for_itself():
    found = agents.interleaved(3, 2, 2500, 3500, 2)
    assert (found["agents"], found["turns"], sum(found["limits"].values())) == (3, 2, 3)
    assert 0 < found["least_reused_share"] <= 1


def test_traces_are_the_same_every_time_and_grow():
    one, again, other = (list(agent_trace(4, 500, 2000, seed)) for seed in (1, 1, 2))
    assert one == again and one != other
    for before, after in itertools.pairwise(one):
        assert after.messages[: len(before.messages)] == before.messages
    assert one[0].messages[0] == other[0].messages[0], "all agents have one preamble"
    assert 1000 < len(json.dumps(one[-1].messages)) < 4000


@pytest.mark.parametrize(
    ("reused", "second", "status"), [(0.96, 0.09, 0), (0.94, 0.09, 1), (0.96, 0.11, 1), (float("nan"), 0.09, 1)]
)
def test_the_verdict_is_the_exit_status(monkeypatch, reused, second, status):
    monkeypatch.setattr(agents, "run_turns", lambda llm, turns: [])
    monkeypatch.setattr(agents, "summary", lambda rows: {"least_reused_share": reused, "turn_2_share": second})
    monkeypatch.setattr(agents, "interleaved", lambda *about: {"least_reused_share": 1.0})
    monkeypatch.setattr("sys.argv", ["agents", "--no-save"])
    assert agents.main() == status
