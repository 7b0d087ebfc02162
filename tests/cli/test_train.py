"""`pyrosome train` and `pyrosome data preview`, with a trainer that writes down what it was asked."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import pyrosome.train
from pyrosome.cli import data as data_command
from pyrosome.cli.data import marked_text, preview, segments
from pyrosome.cli.train import describe, train
from pyrosome.errors import RequestError
from pyrosome.train import data as training_data
from pyrosome.train.recipe import Recipe
from pyrosome.train.samples import Encoded
from pyrosome.train.state import TrainState, save_state


@dataclasses.dataclass(frozen=True)
class Result:
    directory: Path
    step: int
    finished: bool
    accuracy: dict[str, float]


class Trainer:
    """Stands in for `pyrosome.train.trainer`."""

    def __init__(self):
        self.calls = []
        self.raises = None
        self.interrupted = False

    def train(self, recipe, directory, **asked):
        self.calls.append((recipe, directory, asked))
        with asked["progress"] as progress:
            progress.update({"step": 1, "tokens": 64, "stage": "dense", "loss": 3.0})
            if self.raises:
                raise self.raises
            if self.interrupted:
                signal.raise_signal(signal.SIGINT)
                assert asked["stop"]()
        return Result(directory, 12345, not self.interrupted, {"records": 0.9375})


@pytest.fixture
def trainer(monkeypatch):
    fake = Trainer()
    module = types.SimpleNamespace(train=fake.train)
    monkeypatch.setitem(sys.modules, "pyrosome.train.trainer", module)
    monkeypatch.setattr(pyrosome.train, "trainer", module, raising=False)
    return fake


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory of its own, in which nothing may appear unasked."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The smoke recipe's tokenizer, trained once for all tests."""
    return training_data.tokenizer_for(Recipe.load("smoke"), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def trained(tokenizer, monkeypatch):
    """Commands find that tokenizer instead of training one each; the directories they offered are listed."""
    offered = []
    monkeypatch.setattr(training_data, "tokenizer_for", lambda _, at: offered.append(at) or tokenizer)
    return offered


def run(command, *args: str, status: int = 0):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    result = CliRunner().invoke(app, list(args))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_the_trainer_gets_what_was_asked(trainer):
    run(train, "smoke", "--out", "r", "--resume", "--threads", "3", "--device", "cuda", "--seconds", "1.5",
        "--set", "seed=7", "--set", "optimizer.clip=2", "--from", "w")  # fmt: skip
    ((recipe, directory, asked),) = trainer.calls
    assert recipe == Recipe.load("smoke", ["seed=7", "optimizer.clip=2"]) and directory == Path("r")
    progress, stop = asked.pop("progress"), asked.pop("stop")
    assert progress.recipe is recipe
    assert not stop()
    assert asked == {"resume": True, "threads": 3, "device": "cuda", "seconds": 1.5, "start_from": Path("w")}


def test_what_is_not_said_is_left_to_the_trainer(trainer):
    run(train, "smoke")
    ((_, directory, asked),) = trainer.calls
    del asked["progress"], asked["stop"]
    assert directory == Path("runs/smoke")
    assert asked == {"resume": False, "threads": None, "device": "cpu", "seconds": None, "start_from": None}


def test_the_result_goes_to_standard_output_and_progress_elsewhere(trainer):
    result = run(train, "smoke")
    assert result.stdout.splitlines() == [
        f"directory: {Path('runs/smoke')}", "step: 12,345", "finished: yes", "accuracy: records 0.9375",
    ]  # fmt: skip
    assert "stage 1 of 3, dense" in result.stderr and "loss 3.000" in result.stderr


def test_the_result_as_json(trainer):
    found = json.loads(run(train, "smoke", "--json", "--out", "r").stdout)
    assert found == {"directory": "r", "step": 12345, "finished": True, "accuracy": {"records": 0.9375}}


def test_ctrl_c_lets_the_step_end_and_saves(trainer):
    trainer.interrupted = True
    result = run(train, "smoke", "--out", "r", status=130)
    assert not result.stdout and "stopped and saved; go on with --resume --out r" in result.stderr


def test_a_second_ctrl_c_says_how_to_go_on_too(trainer):
    trainer.raises = KeyboardInterrupt()
    result = run(train, "smoke", "--out", "r", status=130)
    assert not result.stdout and "saved last with --resume --out r" in result.stderr


def test_a_run_that_is_there_is_not_begun_anew(trainer, here):
    save_state(here / "r", TrainState(step=1, tokens=2))
    with pytest.raises(RequestError, match=r"r holds a run already.*--resume.*--out"):
        run(train, "smoke", "--out", "r")
    assert not trainer.calls
    run(train, "smoke", "--out", "r", "--resume")
    assert len(trainer.calls) == 1


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["nanu"], "'nanu' cannot be read"),
        (["smoke", "--set", "optimizer.muon_rl=1"], "did you mean 'muon_lr'"),
        (["smoke", "--set", "stages.2.mix.1.thinking=deep"], "stages.2.mix.1 of recipe 'smoke'"),
        (["smoke", "--device", "tpu"], "--device is 'tpu'; it is cpu or cuda"),
        (["smoke", "--seconds", "0"], "--seconds is 0"),
        (["smoke", "--seconds", "nan"], "--seconds is nan"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(trainer, here, args, part):
    with pytest.raises(RequestError) as caught:
        run(train, *args)
    assert part in str(caught.value) and not trainer.calls and not list(here.iterdir())


def test_no_threads_at_all_is_bad_usage(trainer):
    assert "--threads" in run(train, "smoke", "--threads", "0", status=2).output


def test_a_dry_run_tells_all_and_writes_nothing(trainer, trained, here):
    text = run(train, "smoke", "--dry-run", "--set", "stages.0.mix.1.share=0.6").stdout
    assert "557,941 parameters, 418,677 active per token; draft head 124,737 more" in text
    assert "at most 60,000 tokens in 30 steps of 2,048" in text
    assert re.search(r"dense +dense +0 to 30,000 +records 90% +57% +records +64 to 128, facts \(2, 6\)", text)
    assert re.search(r"\n +43% +copy +64 *\n", text) and re.search(r"warmup +warmup +10,000 +- +100%", text)
    assert "<｜User｜>copy" in text and re.search(r"\? \w+« \d\d»", text)
    assert not trainer.calls and not list(here.iterdir())
    assert trained and not any(at.exists() for at in trained)


def test_a_dry_run_as_json(trainer, trained):
    found = json.loads(run(train, "smoke", "--dry-run", "--json").stdout)
    assert found["fingerprint"] == Recipe.load("smoke").fingerprint() and found["steps"] == 30
    weights = found["parameters"]["trunk"] + found["parameters"]["draft"]
    assert found["memory_bytes"] == 16 * weights + 4 * 2 * 1024 * 64
    assert [s["name"] for s in found["stages"]] == ["dense", "warmup", "sparse"]
    assert found["stages"][0]["gate"] == {"kind": "records", "accuracy": 0.9} and found["stages"][1]["gate"] is None
    assert found["stages"][2]["mix"][1] == {"kind": "sums", "share": 0.2, "length": [48, 48], "thinking": "high"}
    assert [s["kind"] for s in found["samples"]] == ["records", "copy", "sums/high"]
    assert all(0 < s["learnt"] < s["tokens"] for s in found["samples"])


def test_shares_are_of_their_stage(trained):
    shares = [m["share"] for m in describe(Recipe.load("smoke", ["stages.0.mix.0.share=0.3"]))["stages"][0]["mix"]]
    assert shares == pytest.approx([0.6, 0.4])


def blocks(text: str) -> list[tuple[str, str]]:
    """(heading, sample) of each sample shown."""
    return re.findall(r"^(\w+: .* tokens, .*)\n(.*)$", text, re.MULTILINE)


def test_a_preview_marks_what_is_learnt(trained):
    shown = blocks(run(preview, "smoke").stdout)
    assert [h.split(",")[0] for h, _ in shown] == [
        "dense: records", "dense: copy", "warmup: records", "sparse: records", "sparse: sums",
    ]  # fmt: skip
    for heading, text in shown[:1] + shown[2:4]:
        asked = re.findall(r"\? \w+« (\d\d)»", text)
        assert f", {len(asked)} learnt, {len(asked)} of answers" in heading and asked
        assert "«" not in re.sub(r"\? \w+« \d\d»", "", text)
    assert re.search(r"</think>«.*<｜end▁of▁sentence｜>»$", shown[1][1])
    assert re.search(r"<think>«.*=.*</think>\d+<｜end▁of▁sentence｜>»$", shown[4][1])


def test_a_preview_of_less_and_of_more(trained):
    shown = blocks(run(preview, "smoke", "--kind", "records", "--stage", "dense", "-n", "3").stdout)
    assert [h.split(",")[0] for h, _ in shown] == ["dense: records"] * 3 and len({t for _, t in shown}) == 3
    assert blocks(run(preview, "smoke", "--kind", "records", "--stage", "0", "-n", "3").stdout) == shown
    other = blocks(run(preview, "smoke", "--kind", "records", "--stage", "0", "-n", "3", "--seed", "1").stdout)
    assert other != shown


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--stage", "3"], "stage '3' was asked for; smoke has dense, warmup, sparse"),
        (["--kind", "sum"], "kind 'sum' were asked for; there are records, copy, sums"),
        (["--kind", "sums", "--stage", "dense"], "there are records, copy"),
    ],
)
def test_a_preview_of_what_is_not_there(args, part):
    with pytest.raises(RequestError) as caught:
        run(preview, "smoke", *args)
    assert part in str(caught.value)


class Letters:
    """A tokenizer of which id n is the n-th letter."""

    tokenizer = property(lambda self: self)

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


SAMPLE = Encoded(list(range(8)), [0, 0.1, 1, 1, 1, 0.1, 1, 0.1], [False] * 3 + [True] * 2 + [False] * 3, "k")


def test_runs_of_alike_tokens_are_one_segment():
    assert segments(SAMPLE, Letters()) == [
        ("ab", "background"), ("c", "learnt"), ("de", "answer"), ("f", "background"), ("g", "learnt"),
        ("h", "background"),
    ]  # fmt: skip
    assert marked_text(segments(SAMPLE, Letters())) == "ab«cde»f«g»h"


@pytest.mark.parametrize(
    ("keep", "text"),
    [((3, 2), "ab«c» ... «g»h"), ((0, 3), " ... f«g»h"), ((5, 3), "ab«cde»f«g»h"), ((5, 2), "ab«cde» ... «g»h")],
)
def test_the_middle_of_a_long_sample_is_left_out(keep, text):
    assert marked_text(segments(SAMPLE, Letters(), keep)) == text


def test_colours_mark_where_there_are_some():
    import io

    from rich.console import Console

    out = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    data_command.show(out, [("a\x1b[2J", "background"), ("b", "answer"), ("c", "learnt")], True)
    assert out.file.getvalue() == "\x1b[2ma·[2J\x1b[0m\x1b[1;32mb\x1b[0m\x1b[32mc\x1b[0m\n"
