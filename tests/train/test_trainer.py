"""Runs: what they leave, that they can be killed and go on, and what stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.errors import CheckpointError, DoesNotFit, RequestError, TrainError
from pyrosome.llm import LLM
from pyrosome.options import SamplingParams
from pyrosome.tasks import text as corpora
from pyrosome.train import data, state
from pyrosome.train.curves import read
from pyrosome.train.network import Masters, export, initial_tensors
from pyrosome.train.trainer import Run, train
from tests.train.recipes import RECORDS, small

UNTIMED = ("seconds", "tokens_per_s")


def rows(directory):
    return [{k: v for k, v in row.items() if k not in UNTIMED} for row in read(directory / "curves.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    directory = tmp_path_factory.mktemp("whole")
    result = train(small(), directory, threads=1)
    assert result.finished
    return directory


def test_a_run_goes_through_its_stages_and_leaves_both_layouts(whole):
    seen = rows(whole)
    assert list(dict.fromkeys(r["stage"] for r in seen)) == ["dense", "warmup", "sparse"]
    assert seen[-1]["tokens"] >= 3000 and seen[-1]["lr"] < 0.25 < seen[0]["lr"] * 20
    assert {k for r in seen for k in r.get("accuracy", {})} == {"records", "sums/high"}
    assert (whole / "recipe.toml").exists()
    for layout, stored in (("bf16", "BF16"), ("fp8fp4", "F8_E4M3")):
        index = open_checkpoint(whole / layout)
        index.check().raise_if_bad()
        assert index.tensors["layers.1.attn.wq_b.weight"].dtype == stored
        with LLM(whole / layout) as llm:
            (out,) = llm.generate([" falcon 37 ; ? falcon"], SamplingParams(max_tokens=2, temperature=0))
            assert len(out.token_ids) == 2
            assert llm.chat_template.tokenizer.id_of("<think>") is not None


def test_the_same_recipe_gives_the_same_run(whole, tmp_path):
    train(small(), tmp_path, threads=1)
    assert rows(tmp_path) == rows(whole)
    for layout in ("bf16", "fp8fp4"):
        (shard,) = (tmp_path / layout).glob("*.safetensors")
        assert shard.read_bytes() == (whole / layout / shard.name).read_bytes()


def test_another_seed_gives_another(whole, tmp_path):
    train(small(seed=4, run__max_tokens=600, run__decay_tokens=0, run__quantize_tokens=0), tmp_path, threads=1)
    assert rows(tmp_path)[0]["loss"] != rows(whole)[0]["loss"]


CHILD = """
import sys
from pathlib import Path
import torch
from tests.train.recipes import small
from pyrosome.train.trainer import train
torch.set_num_threads(1)
train(small(run__checkpoint_seconds=0.02), Path(sys.argv[1]), threads=1, resume=True)
"""


def test_a_run_that_is_killed_goes_on_as_if_it_never_was(whole, tmp_path):
    """kill -9 at three places, in every stage: the same curves and the same weights, to the bit."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    for kill_at in (300, 1200, 2400):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=env, cwd=root)
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            curves = tmp_path / "curves.jsonl"
            lines = curves.read_bytes().split(b"\n")[:-1] if curves.exists() else []
            if lines and json.loads(lines[-1])["tokens"] >= kill_at:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"
    result = train(small(run__checkpoint_seconds=0.02), tmp_path, threads=1, resume=True)
    assert result.finished
    assert rows(tmp_path) == rows(whole)
    (shard,) = (tmp_path / "fp8fp4").glob("*.safetensors")
    assert shard.read_bytes() == (whole / "fp8fp4" / shard.name).read_bytes()


def test_a_time_limit_leaves_a_run_that_goes_on(tmp_path):
    first = train(small(run__max_tokens=900, run__decay_tokens=0), tmp_path, threads=1, seconds=0)
    assert not first.finished and 0 < first.tokens < 900
    assert not (tmp_path / "bf16").exists()
    second = train(small(run__max_tokens=900, run__decay_tokens=0), tmp_path, threads=1, resume=True)
    assert second.finished and second.tokens >= 900
    again = train(small(run__max_tokens=900, run__decay_tokens=0), tmp_path, threads=1, resume=True)
    assert again.finished and again.step == second.step


def test_a_directory_with_a_run_in_it_is_not_begun_anew(whole):
    with pytest.raises(TrainError, match=r"holds a run of 3,\d+ tokens already.*--resume"):
        train(small(), whole, threads=1)


def test_a_run_of_another_recipe_is_refused(whole):
    with pytest.raises(RequestError, match=r"optimizer\.muon_lr"):
        train(small(optimizer__muon_lr=0.5), whole, threads=1, resume=True)


def test_a_checkpoint_can_be_gone_on_from_and_one_of_another_shape_is_refused(whole, tmp_path):
    short = {"run__max_tokens": 300, "run__decay_tokens": 0, "run__quantize_tokens": 0}
    train(small(**short), tmp_path / "on", threads=1, start_from=whole / "bf16")
    train(small(**short), tmp_path / "new", threads=1)
    assert rows(tmp_path / "on")[0]["loss"] < rows(tmp_path / "new")[0]["loss"]
    other = small(model={**small().model, "hidden_size": 64}).config
    files = sorted((whole / "tokenizer").glob("*.json"))
    export(tmp_path / "other", Masters(other, dict(initial_tensors(other, 1))), "bf16", files)
    with pytest.raises(CheckpointError, match=r"\(1024, 64\).*\(1024, 32\)"):
        train(small(**short), tmp_path / "refused", threads=1, start_from=tmp_path / "other")


def test_ids_that_do_not_go_with_the_weights_are_refused(whole, tmp_path):
    short = {"run__max_tokens": 300, "run__decay_tokens": 0, "run__quantize_tokens": 0}
    wider = small(tokenizer={"vocab_size": 1100}, **short)
    with pytest.raises(CheckpointError, match=r"has 1,024 ids and .*vocab_size is 1,100.*vocab_size=1024"):
        train(wider, tmp_path / "other", threads=1, start_from=whole / "bf16")
    export(tmp_path / "bare", Masters(small().config, dict(initial_tensors(small().config, 1))), "bf16", [])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was looked for"):
        train(small(**short), tmp_path / "none", threads=1, start_from=tmp_path / "bare")
    # A run that begins with a checkpoint reads by its tokenizer, whatever this machine's corpora would give.
    train(small(**short), tmp_path / "on", threads=1, start_from=whole / "bf16")
    mine, theirs = (p / "tokenizer" / "tokenizer.json" for p in (tmp_path / "on", whole))
    assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("name", "where"),
    [("layers.1.attn.wkv.weight", "layer 1's output"), ("layers.2.ffn.experts.w2", "layer 2's output")],
)
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_layer(tmp_path, name, where):
    recipe = small(run__max_tokens=900, run__decay_tokens=0, run__quantize_tokens=0)
    train(recipe, tmp_path, threads=1, seconds=0)
    kept = state.load_state(tmp_path, recipe).tokens
    run = Run(recipe, tmp_path, resume=True, threads=1, device="cpu")
    with torch.no_grad():
        run.parameters[name].view(-1)[0] = float("nan")
    with pytest.raises(TrainError, match=rf"step 2: the loss is nan .* {where}; .*{tmp_path}"):
        run.go(None, None)
    assert state.load_state(tmp_path, recipe).tokens == kept
    assert train(recipe, tmp_path, threads=1, resume=True).finished


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    run = Run(small(), tmp_path, resume=False, threads=1, device="cpu")
    run.parameters["layers.0.attn.wq_a.weight"].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainError, match=r"the gradient of layers\.0\.attn\.wq_a\.weight"):
        run.go(None, None)


def test_a_full_disk_is_said_and_the_last_state_stays(tmp_path, monkeypatch):
    recipe = small(run__checkpoint_seconds=1e-6)
    train(recipe, tmp_path, threads=1, seconds=0)
    kept = state.load_state(tmp_path, recipe).tokens
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DoesNotFit, match="GiB"):
        train(recipe, tmp_path, threads=1, resume=True)
    monkeypatch.undo()
    assert state.load_state(tmp_path, recipe).tokens == kept
    assert train(recipe, tmp_path, threads=1, resume=True).finished


def test_a_machine_without_any_text_is_told_what_to_install(tmp_path, monkeypatch):
    data.corpus.cache_clear()
    monkeypatch.setattr(corpora, "corpora", lambda *_, **__: [])
    try:
        with pytest.raises(RequestError, match="corp"):
            train(small(), tmp_path, threads=1)
    finally:
        data.corpus.cache_clear()


def test_a_gate_ends_a_stage_and_an_old_stages_accuracy_opens_none(tmp_path):
    low, high = ({"kind": "records", "accuracy": accuracy} for accuracy in (0.01, 0.9))
    stages = [
        {"name": "a", "selection": "dense", "max_tokens": 2000, "gate": low, "mix": [RECORDS]},
        {"name": "b", "selection": "sparse", "max_tokens": 600, "gate": high, "mix": [RECORDS]},
    ]
    run = Run(small(stages=stages, run__evaluate_steps=1), tmp_path, resume=False, threads=1, device="cpu")
    run.evaluate = lambda: {"records": 0.95 if run.stage.name == "a" else 0.5}
    run.go(None, None)
    seen = [r["stage"] for r in rows(tmp_path)]
    assert seen.count("a") == 1 and seen.count("b") >= 2


def test_products_in_bfloat16_are_near_those_in_float32(whole, tmp_path):
    short = {"run__max_tokens": 600, "run__decay_tokens": 0, "run__quantize_tokens": 0}
    train(small(run__dtype="bfloat16", **short), tmp_path / "narrow", threads=1)
    train(small(**short), tmp_path / "wide", threads=1)
    narrow, wide = rows(tmp_path / "narrow"), rows(tmp_path / "wide")
    assert narrow != wide
    for a, b in zip(narrow, wide, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
        assert a["indexer_loss"] == pytest.approx(b["indexer_loss"], rel=0.1, abs=0.01)


def test_a_run_measures_its_threads_where_none_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrosome.train.trainer.probe", lambda run: run() or 1)
    short = {"run__max_tokens": 300, "run__decay_tokens": 0, "run__quantize_tokens": 0}
    measured = train(small(**short), tmp_path / "measured")
    train(small(**short), tmp_path / "given", threads=1)
    assert measured.finished
    assert rows(tmp_path / "measured") == rows(tmp_path / "given")  # measuring changed nothing
