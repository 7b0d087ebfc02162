"""The benchmark of many requests at once runs, and says what it found; how fast decides nothing here."""

import importlib
import json
import shutil

import pytest

from bench import engine
from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.llm import load_model
from pyrosome.options import EngineOptions

NANO = open_checkpoint("builtin:nano").path


def test_the_quick_form_leaves_a_record_with_a_rate_and_a_ratio_for_each_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "COUNTS", (1, 3))
    monkeypatch.setattr(engine, "RESULTS", tmp_path)
    monkeypatch.setattr(engine.peers, "make_checkpoints", lambda path, plain, shape: shutil.copytree(NANO, path))
    monkeypatch.setattr("sys.argv", ["engine", "--quick", "--no-hf"])
    assert engine.main() == 0
    record = json.loads((tmp_path / "engine.jsonl").read_text())
    assert (record["bench"], record["prompt"], record["output"], record["repeats"]) == ("engine", 128, 8, 1)
    assert {"date", "commit", "cpu", "threads"} < set(record)
    for weights in ("nano", "nano, drafts", "44M"):
        found = record[weights]
        assert set(found["tokens_per_cpu_s"]) == set(found["times_one"]) == {"1", "3"}
        assert found["times_one"]["1"] == 1 and min(found["tokens_per_cpu_s"].values()) > 0
        assert bool(sum(found["drafted"])) is (weights == "nano, drafts")
    assert "drafts accepted" in capsys.readouterr().out


def test_requests_of_a_batch_say_what_each_says_alone_and_nothing_is_reused(monkeypatch):
    monkeypatch.syspath_prepend(engine.HERE)  # as a child process runs it
    run = importlib.import_module("batch_ours").run
    made = load_model("builtin:nano").engine(EngineOptions(max_sequences=3, cache_bytes=8 << 20))
    ids = [10 + i % 300 for i in range(3 * 130)]
    together = run(made, ids, 3, 130, 4, "a")
    assert together == run(made, ids, 3, 130, 4, "b") and together[:1] == run(made, ids, 1, 130, 4, "c")
    assert made.current_stats().reused_tokens == 0 and all(len(said) == 4 for said in together)


def test_a_child_that_fails_ends_the_benchmark(tmp_path, capfd):
    with pytest.raises(SystemExit, match="batch_ours"):
        engine.at_once(tmp_path / "none", tmp_path, 2, 1)
    assert "none" in capfd.readouterr().err


def test_a_batch_is_compared_by_turns_in_every_round(monkeypatch, tmp_path):
    asked = []

    def child(python, script, *about):
        asked.append(script)
        if script == "batch_hf.py":
            return {"seconds": [3.0], "tokens": [[1, 2], [3, 4]], "engine": "t", "torch": "2"}
        differs = len(asked) == 2  # in the first round one sequence does
        return {"seconds": {"16": [2.0]}, "tokens": [[1, 2], [3, 5 if differs else 4]]}

    monkeypatch.setattr(engine, "child", child)
    found = engine.against("python", tmp_path, tmp_path, tmp_path, 64, 1, 2)
    assert asked == ["batch_hf.py", "batch_ours.py"] * 2
    assert (found["ours"], found["ratio"], found["same"]) == (512, 1.5, 1)


def test_the_verdict_is_the_exit_status(monkeypatch, tmp_path, capsys):
    found: list[float] = []  # times at once, ratio to theirs, sequences that say the same

    def at_once(checkpoint, folder, num_tokens, repeats, drafter):
        return {"tokens_per_cpu_s": {"16": 9.0}, "times_one": {"16": found[0]}, "accepted": [], "drafted": []}

    def against(*about):
        return {"ours": 3.0, "theirs": 2.0, "ratio": found[1], "same": found[2], "their_engine": "t"}

    monkeypatch.setattr(engine, "RESULTS", tmp_path)
    monkeypatch.setattr(engine, "at_once", at_once)
    monkeypatch.setattr(engine, "against", against)
    monkeypatch.setattr(engine.peers, "make_checkpoints", lambda *about: None)
    monkeypatch.setattr(engine, "predicted", lambda checkpoint, rates, num_tokens: [{"predicted": rates["16"]}])
    monkeypatch.setattr("sys.argv", ["engine"])
    for *values, status in ((4.1, 10.6, 16, 0), (3.9, 10.6, 16, 1), (4.1, 9.4, 16, 1), (4.1, 10.6, 15, 1)):
        found[:] = values
        assert engine.main() == status
    lines = (tmp_path / "engine.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["batch of 16"]["ratio"] == 10.6
    assert json.loads(lines[0])["44M"]["predicted"] == [{"predicted": 9.0}]
    assert "ratio 10.60" in capsys.readouterr().out
