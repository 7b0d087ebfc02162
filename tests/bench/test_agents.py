"""The benchmark of agents' conversations runs, and its verdict is what was promised."""

import dataclasses
import itertools
import json

import pytest

from bench import agents
from pyrosome import LLM
from pyrosome.testing.traces import agent_trace


def test_the_quick_form_leaves_a_record_of_the_three_measurements(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(agents, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["agents", "--quick", "--agents", "4", "--room", "2"])
    assert agents.main() == 0
    record = json.loads((tmp_path / "agents.jsonl").read_text())
    assert record["bench"] == "agents" and {"date", "commit", "cpu", "threads"} < set(record)
    for found in (record["agent"], record["chat"], record["interleaved"]):
        assert found["turns"] == 3 and 0 < found["least_reused_share"] <= found["median_reused_share"] <= 1
        assert found["least_because"].startswith("no common prefix: the prompt leaves what is known")
    for found in (record["agent"], record["chat"]):
        assert 1000 < found["first_prompt"] < 2500 < found["last_prompt"] < 4500, "in tokens, of any tokenizer"
        assert found["openings"] == 1
        assert min(found["turn_1_first_s"], found["turn_2_first_s"], found["turn_2_cpu_share"]) > 0
        assert found["turn_2_share"] == found["turn_2_first_s"] / found["turn_1_first_s"]
    many = record["interleaved"]
    assert (many["agents"], many["room"]) == (4, 2)
    assert many["restored_blocks"] > 0 and many["computed_tokens"] < many["prompt_tokens"]
    assert many["first_turn_s"] > 0 and many["later_turn_s"] > 0
    assert "least_reused_share" in capsys.readouterr().out


def turn(shared: int, reused: int, first_s: float) -> dict:
    return {"prompt": 200, "shared": shared, "reused": reused, "replayed": 0, "limit": "evicted", "reason": f"{reused}",
            "first_s": first_s, "first_cpu_s": first_s / 2}  # fmt: skip


def test_a_summary_has_the_least_that_was_reused_and_medians_of_the_openings():
    rows = [turn(0, 0, 4.0), turn(100, 90, 1.0), turn(100, 80, 9.0), turn(100, 100, 9.0)]
    openings = [rows[:2], [turn(0, 0, 4.0), turn(100, 90, 3.0)], [turn(0, 0, 8.0), turn(100, 90, 4.0)]]
    found = agents.summary(rows, openings)
    assert (found["least_reused_share"], found["least_because"], found["median_reused_share"]) == (
        0.8, "evicted: 80", 0.9,
    )  # fmt: skip
    assert (found["turn_1_first_s"], found["turn_2_first_s"], found["turn_2_share"]) == (4.0, 3.0, 0.5)
    assert found["turn_2_cpu_share"] == 0.5


def test_a_small_cache_is_just_large_enough():
    llm = LLM("builtin:nano")
    made = agents.cache_for(llm, 5000)
    for cache_bytes, is_enough in ((made, True), (made - 1, False)):
        options = dataclasses.replace(llm.options, cache_bytes=cache_bytes)
        assert (llm.model.engine(options).max_context >= 5000) is is_enough


def test_traces_are_the_same_every_time_and_grow():
    one, again, other = (list(agent_trace(4, 500, 2000, seed)) for seed in (1, 1, 2))
    assert one == again and one != other
    for before, after in itertools.pairwise(one):
        assert after.messages[: len(before.messages)] == before.messages
    assert one[0].messages[0] == other[0].messages[0], "all agents have one preamble"
    assert 1000 < len(json.dumps(one[-1].messages)) < 4000


@pytest.mark.parametrize(
    ("which", "change", "status"),
    [
        ("agent", {}, 0),
        ("agent", {"least_reused_share": 0.94}, 1),
        ("chat", {"least_reused_share": float("nan")}, 1),
        ("interleaved", {"least_reused_share": 0.94}, 1),
        ("agent", {"turn_2_share": 0.11}, 1),
        ("chat", {"turn_2_share": 0.11}, 1),
        ("interleaved", {"restored_blocks": 0}, 1),
    ],
)
def test_the_verdict_is_the_exit_status(monkeypatch, which, change, status):
    kept = {"least_reused_share": 0.96, "turn_2_share": 0.09, "restored_blocks": 9}
    found = iter({**kept, **(change if name == which else {})} for name in ("agent", "chat", "interleaved"))
    monkeypatch.setattr(agents, "one_alone", lambda *about: next(found))
    monkeypatch.setattr(agents, "interleaved", lambda *about: next(found))
    monkeypatch.setattr("sys.argv", ["agents", "--no-save"])
    assert agents.main() == status
