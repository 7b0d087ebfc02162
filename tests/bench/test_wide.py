"""The model of V4-Flash's widths: its bytes, its checks, and that a run leaves nothing behind.  No test is of time."""

import json
import os

import pytest
import torch

from bench import report, wide
from pyrosome.ops import native
from pyrosome.quant.tiles import tiled_bytes


@pytest.fixture(autouse=True)
def _one_thread():
    if not native.available():
        pytest.skip("no native library here")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return wide.network(wide.QUICK.config)


def test_the_widths_are_those_of_flash():
    config, flash = wide.FULL.config, wide.ModelConfig.preset("flash")
    for key in ("hidden_size", "head_dim", "num_attention_heads", "q_lora_rank", "o_lora_rank", "index_n_heads",
                "index_topk", "moe_intermediate_size", "num_experts_per_tok", "sliding_window"):  # fmt: skip
        assert getattr(config, key) == getattr(flash, key)
    assert config.layer_ratios == (0, 0, 4, 128, 4, 128)
    assert (config.n_routed_experts, config.vocab_size, config.num_nextn_predict_layers) == (32, 4096, 0)
    assert wide.FULL.contexts == (4096, 262144) and wide.FULL.prompt == 512


def test_bytes_are_counted_once_and_experts_by_those_visited(model):
    config, found = model.config, wide.weight_bytes(model)
    D, inner = config.hidden_size, config.moe_intermediate_size
    one = 2 * tiled_bytes("fp4", inner, D) + tiled_bytes("fp4", D, inner)
    resting = (config.n_routed_experts - config.num_experts_per_tok) * config.num_hidden_layers * one
    assert found["all"] - found["touched"] == resting + (config.vocab_size - 1) * D * 2
    small = sum(p.nbytes for p in model.parameters())
    assert small < found["all"] - config.n_routed_experts * config.num_hidden_layers * one


def record(**several) -> dict:
    return {
        "decode": [{"context": 4096, "ms": 70.0, "read_share": 0.8}, {"context": 262144, "ms": 100.0}],
        "prefill": {"tokens": 512, "ms": 20.0}, "several": several,
    }  # fmt: skip


def test_what_is_missed_is_said():
    good = record(threads=2, prefill_gain=1.7, decode_gain=1.2, busy_gain=0.6)
    good["checks"] = wide.checks(good)
    assert len(good["checks"]) == 7 and wide.problems(good) == []
    bad = record(threads=2, prefill_gain=1.5, decode_gain=0.9, busy_gain=float("nan"))
    bad["decode"][0] |= {"ms": 81.0, "read_share": 0.6}
    bad["decode"][1]["ms"], bad["prefill"]["ms"] = 162.0, 27.0
    bad["checks"] = wide.checks(bad)
    said = wide.problems(bad)
    assert len(said) == 7 and "times as long a token at 262,144 tokens: 2.00, and 1.6 is the most" in said
    assert "share of the read ceiling at 4,096 tokens: 0.60, and 0.7 is the least" in said
    assert len(wide.checks(record())) == 4


def test_a_run_measures_all_and_records_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(wide, "RESULTS", tmp_path / "wide.jsonl")
    threads = min(2, len(os.sched_getaffinity(0)))
    assert wide.main(["--quick", "--threads", str(threads)]) == 0
    out = capsys.readouterr().out
    assert all(said in out for said in ("GB of weights", "decode at 512 tokens", "decode at 2,048", "prefill of 64"))
    assert ("beside a busy process" in out) is (threads > 1)
    assert not list(tmp_path.iterdir()) and torch.get_num_threads() == 1


def test_a_record_is_what_the_page_is_made_of(monkeypatch, tmp_path, model):
    monkeypatch.setattr(wide, "RESULTS", tmp_path / "wide.jsonl")
    monkeypatch.setattr(wide, "FULL", wide.QUICK)
    monkeypatch.setattr(wide, "network", lambda config: model)
    status = wide.main(["--threads", "1"])
    (record,) = map(json.loads, (tmp_path / "wide.jsonl").read_text().splitlines())
    assert status == bool(record["problems"]) and record["threads"] == 1 and len(record["checks"]) == 4
    text = report.page({"wide": record})
    assert f"| {record['decode'][1]['context']:,} | {record['decode'][1]['ms']:.2f} |" in text


def test_more_threads_than_cores_are_refused(capsys):
    with pytest.raises(SystemExit):
        wide.main(["--quick", "--threads", "4096"])
    assert "--threads 4096: this process has" in capsys.readouterr().err


def test_timers_are_taken_off_the_library_again(monkeypatch, model):
    library = native.library()
    before = [getattr(library, name) for name in native._SIGNATURES]
    monkeypatch.setattr(wide, "network", lambda config: model)
    found = wide.overhead(wide.QUICK)
    assert 0 < found["share"] < 1 and found["calls"] > 50 and found["timer_us"] > 0
    assert all(getattr(library, name) is was for name, was in zip(native._SIGNATURES, before, strict=True))


def test_a_busy_process_ends_with_its_block():
    with wide.busy_core() as child:
        assert child.poll() is None
    assert child.poll() is not None
