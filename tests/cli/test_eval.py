"""`pyrosome eval`, with a model that answers by rule."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest
import torch
import typer
from typer.testing import CliRunner

from pyrosome.cli import eval as command
from pyrosome.errors import CheckpointError, ContextTooLong, PyrosomeError, RequestError
from pyrosome.evals import subject as subjects
from pyrosome.tasks.text import Corpus, Text
from tests.evals import test_modes, test_tools
from tests.evals.subjects import Oracle, checkpoint
from tests.evals.test_recall import knows


@pytest.fixture
def made(monkeypatch):
    """Oracles that answer in place of the models named; `rules` says how, by name."""
    found = []
    rules = {"good": knows, "bad": lambda _: "no", "sums": test_modes.thinks, "tools": test_tools.knows}

    class Named(Oracle):
        def __init__(self, name, numerics, kv_format, progress):
            super().__init__(rules[name])
            self.model.numerics, self.model.has_drafts, self.model.index = numerics, True, None
            self.model.kv_format = kv_format or "f32"
            self.model.logits = lambda ids: torch.zeros(len(ids), 1280)
            found.append((name, numerics, kv_format, self))

    monkeypatch.setattr(subjects, "Subject", Named)
    monkeypatch.setattr("pyrosome.evals.report.fingerprint", lambda *_: "f" * 64)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/pyrosome", "eval", "a b"])
    return found


def run(name: str, *args: str, status: int = 0):
    app = typer.Typer(pretty_exceptions_enable=False)
    for one in ("recall", "text", "modes", "tools", "plot"):
        app.command()(getattr(command, one))
    result = CliRunner().invoke(app, [name, *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


SMALL = ("--context", "256", "--n", "8")


def test_recall_as_tables(made):
    shown = run("recall", "good", *SMALL).stdout
    assert "recall of 8 facts, ledger, trained numerics, seed 0" in shown
    assert re.search(r"none +256 +8 +1\.000 \[\.68, 1\.00\]", shown)
    assert "mod 4: 3" in shown and "farthest" in shown
    assert made[0][:3] == ("good", "trained", None)


def test_recall_as_json_is_what_is_kept(made, tmp_path):
    out = tmp_path / "r.jsonl"
    args = (
        "--context",
        "256,384",
        "--n",
        "4",
        "--facts",
        "3",
        "--kind",
        "records",
        "--ablation",
        "none,window",
        "--seed",
        "9",
    )
    first = json.loads(run("recall", "good", *args, "--numerics", "exact", "--json", "--out", str(out)).stdout)
    run("recall", "good", *SMALL, "--out", str(out))
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept[0] == first and len(kept) == 2
    expected = {"eval": "recall", "model": "good", "numerics": "exact", "seed": 9, "kind": "records", "facts": 3,
                "n": 4, "command": "pyrosome eval 'a b'", "fingerprint": "f" * 16, "interrupted": False}  # fmt: skip
    assert {k: first[k] for k in expected} == expected and "against" not in first
    assert [(r["context"], r["ablation"]) for r in first["results"]] == [
        (256, "none"), (256, "window"), (384, "none"), (384, "window"),
    ]  # fmt: skip
    assert [d["ablation"] for d in first["over_none"]] == ["window"] * 2
    assert made[0][3].asked[0][0].count(" ;") == 3


def test_another_model_is_asked_the_same(made):
    args = ("--against", "bad", "--against-numerics", "exact", "--kv-format", "f32")
    found = json.loads(run("recall", "good", *SMALL, *args, "--json").stdout)
    assert [m[:3] for m in made] == [("good", "trained", "f32"), ("bad", "exact", "f32")]
    assert [p for p, _ in made[0][3].asked] == [p for p, _ in made[1][3].asked]
    other = found["against"]
    assert (other["model"], other["numerics"], other["results"][0]["right"]["hits"]) == ("bad", "exact", 0)
    assert other["differences"][0]["difference"] == 1
    assert "good over bad" in run("recall", "good", *SMALL, "--against", "bad").stdout


def test_modes_and_tools(made):
    found = json.loads(
        run("modes", "sums", "--n", "5", "--thinking", "off, high", "--max-tokens", "9", "--json").stdout
    )
    assert found["eval"] == "modes" and [r["thinking"] for r in found["results"]] == ["off", "high"]
    assert (found["n"], found["max_tokens"]) == (5, 9)
    assert "intervals apart" in run("modes", "sums", "--n", "5", "--thinking", "off,high").stdout
    found = json.loads(run("tools", "tools", "--n", "3", "--thinking", "off", "--seed", "4", "--json").stdout)
    assert (found["eval"], found["n"], found["seed"], found["thinking"]) == ("tools", 3, 4, "off")
    assert found["results"][1]["exchange_right"]["share"] == 1
    assert "whole exchange" in run("tools", "tools", "--n", "3").stdout


def test_text(made, monkeypatch, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"the falcon went to the river {number}\n" * 9)
    corpus = Text([Corpus("made up", "none", tmp_path, tuple(sorted(tmp_path.iterdir())), 0)])
    monkeypatch.setattr("pyrosome.evals.text.Text", lambda: corpus)
    args = ("--n", "6", "--chars", "100", "--train-chars", "2000")
    report = json.loads(run("text", "good", *args, "--json").stdout)
    assert (report["n"], report["chars"], report["train_chars"]) == (6, 100, 2000)
    assert report["results"][0]["nats_per_token"] == pytest.approx(math.log(1280))
    shown = run("text", "good", *args).stdout
    assert "6 held-out passages" in shown and "5-gram - model" in shown


def test_a_picture_of_what_was_kept(made, tmp_path):
    pytest.importorskip("matplotlib")
    run("recall", "good", *SMALL, "--out", str(tmp_path / "r.jsonl"))
    run("plot", str(tmp_path / "r.jsonl"), str(tmp_path / "r.png"))
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_ctrl_c_ends_with_what_there_is(made, tmp_path, monkeypatch):
    real = Oracle.submit

    def submit(self, request):
        if len(self.asked) == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, request)

    monkeypatch.setattr(Oracle, "submit", submit)
    out = tmp_path / "r.jsonl"
    result = run("recall", "good", *SMALL, "--against", "bad", "--json", "--out", str(out), status=130)
    found = json.loads(result.stdout)
    assert found["interrupted"] and 0 < found["results"][0]["right"]["n"] < 8 and "against" not in found
    assert json.loads(out.read_text()) == found
    assert "stopped: the figures are of what was asked until then" in result.stderr


@pytest.mark.parametrize(
    ("args", "kind", "part"),
    [
        (("recall", "good", "--context", "256,"), RequestError, r"--context is '256,'; give one or several"),
        (("recall", "good", "--context", "1k"), RequestError, r"--context is '1k'; a whole number of tokens"),
        (("recall", "good", "--context", "8192"), ContextTooLong, r"8272 tokens.*holds 4096; prompts vary by 64"),
        (("recall", "good", "--kind", "poem"), RequestError, "'poem' was asked for"),
        (("recall", "good", "--ablation", "all"), RequestError, "ablation 'all' was asked for"),
        (("recall", "good", "--against-numerics", "exact"), RequestError, "without --against"),
        (("recall", "good", "--facts", "80", "--context", "256"), RequestError, r"80 facts were asked for in 256"),
        (("modes", "sums", "--thinking", "low"), RequestError, "mode 'low'"),
        (("tools", "tools", "--n", "193"), RequestError, "192 held out"),
        (("recall", "good", "--out", "none/r.jsonl"), RequestError, "appended to none/r.jsonl"),
        (("plot", "none.jsonl", "r.png"), RequestError, "cannot be read"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_bad_input_is_told_before_anything_is_asked(made, args, kind, part):
    with pytest.raises(kind, match=part):
        run(*args)
    assert not any(m[3].asked for m in made)


def test_a_model_without_a_tokenizer_cannot_be_asked(tmp_path):
    for file in checkpoint().iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was looked for"):
        run("recall", str(tmp_path), *SMALL)
    with pytest.raises(PyrosomeError, match="does not exist"):
        run("modes", str(tmp_path / "none"))


def test_a_real_model_is_asked():
    found = json.loads(run("recall", str(checkpoint()), "--context", "128", "--n", "4", "--numerics", "exact", "--json",
                           "--facts", "4", "--ablation", "none,random").stdout)  # fmt: skip
    assert [r["right"]["n"] for r in found["results"]] == [4, 4] and len(found["fingerprint"]) == 16
    assert not found["interrupted"]
