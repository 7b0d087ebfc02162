"""What a comparison concludes from its measurements, and that the measuring sees what is there."""

import math
import time

import pytest
import torch

from bench import measure, peers, records
from pyrosome.config import ModelConfig


def a_round(rate: float, peak: float) -> dict:
    return {
        "prefill": {"128": {"cpu": [rate, rate + 2], "wall": [rate / 2]}},
        "prefill_peak_mb": {"128": peak},
        "decode": {"cpu": [rate / 10], "wall": [rate / 20]},
        "decode_peak_mb": peak / 8,
    }


def test_rounds_merge_to_medians_of_rates_and_maxima_of_peaks():
    rows = records.merged([a_round(100, 16.0), a_round(200, 24.0)])
    assert rows == {
        "prefill 128 (tok/CPU-s)": 151, "decode (tok/CPU-s)": 15,
        "prefill 128 (tok/s)": 75, "decode (tok/s)": 7.5,
        "prefill 128 peak (MB)": 24.0, "decode peak (MB)": 3.0,
    }  # fmt: skip


def test_our_rates_are_told_beside_those_that_are_predicted(capsys):
    shape = measure.SHAPES["small"]
    config = ModelConfig.preset("flash", **shape.config, compress_ratios=shape.ratios, num_nextn_predict_layers=0)
    rows = {"prefill 1,024 (tok/CPU-s)": 50.0, "prefill 1,024 (tok/s)": 40.0, "decode (tok/CPU-s)": 10.0}
    found = peers.predicted(config, rows)
    assert [(x["kind"], x["about"], x["measured"]) for x in found] == [
        ("prefill", "1,024 by 1,024", 50.0), ("decode", "1 x 1 at 1,040", 10.0),
    ]  # fmt: skip
    assert all(x["predicted"] > 0 for x in found) and "50.0 measured" in capsys.readouterr().out


def test_peaks_too_small_to_compare_have_no_ratio():
    assert records.ratio("decode peak (MB)", 0.4, 8.0) == "-"
    assert records.ratio("decode peak (MB)", 4.0, 8.0) == "0.50"
    assert records.ratio("decode (tok/s)", 0.4, 0.8) == "0.50"


def test_the_table_shows_ours_then_theirs():
    row = records.table("t", {"decode (tok/s)": 30.0}, {"decode (tok/s)": 20.0}, ("ours", "theirs")).splitlines()[-1]
    assert row.split() == ["decode", "(tok/s)", "30.0", "20.0", "1.50"]


def test_logits_are_compared_everywhere():
    theirs = torch.zeros(3, 4)
    theirs[:, 2] = 1.0
    ours = theirs.clone()
    ours[1, 0] = 1.5
    found = peers.compare(ours, theirs)
    assert found["max_abs"] == 1.5 and found["top1"] == pytest.approx(2 / 3) and found["positions"] == 3


@pytest.mark.parametrize(
    ("worst", "tokens_agree", "verdict"),
    [(9e-5, True, True), (1.1e-4, True, False), (math.nan, True, False), (9e-5, False, False)],
)
def test_the_verdict(worst, tokens_agree, verdict):
    assert peers.passes([{"max_abs": 1e-6}, {"max_abs": worst}], tokens_agree) is verdict


def test_tokens_are_compared_as_far_as_both_sides_went():
    assert peers.same_tokens([{"tokens": [1, 2, 3]}], [{"tokens": [1, 2]}])
    assert not peers.same_tokens([{"tokens": [1, 2]}, {"tokens": [1, 2]}], [{"tokens": [1, 2]}, {"tokens": [1, 5]}])


def test_the_prompt_is_a_prefix_of_a_longer_one_and_inside_the_vocabulary():
    ids = measure.prompt(4096)
    assert measure.prompt(128) == ids[:128]
    assert min(ids) >= 0 and max(ids) < measure.SMALL["vocab_size"]
    assert len(set(ids)) > 3000  # of 8,192: the prompt does not cycle


def test_peak_memory_sees_what_was_held_and_freed():
    with measure.PeakMemory() as memory:
        held = bytearray(b"x") * (64 << 20)
        del held
    if not memory.marked:
        pytest.skip("this system does not let a process reset its mark of peak memory")
    assert 60 < memory.extra_mb < 100


def test_peak_memory_is_sampled_where_there_is_no_mark(monkeypatch):
    monkeypatch.setattr(measure, "reset_high_water", lambda: False)
    with measure.PeakMemory() as memory:
        held = bytearray(b"x") * (64 << 20)
        time.sleep(0.2)
        del held
    assert 60 < memory.extra_mb < 100


def test_rates_count_cpu_time_and_stop_when_enough_was_spent(monkeypatch):
    clock = iter([0.0, 8.0, 8.0, 16.0, 16.0, 24.0, 24.0, 32.0])
    monkeypatch.setattr(measure.time, "thread_time", lambda: next(clock))
    found = measure.rates(lambda: None, 80, repeats=9)
    assert found["cpu"] == [10.0, 10.0, 10.0]
    assert len(found["wall"]) == 3


@pytest.mark.parametrize(("run_s", "runs"), [(1.0, 4), (30.0, 1)])
def test_a_long_run_is_not_repeated_and_a_short_one_is_warmed_up(monkeypatch, run_s, runs):
    now = [0.0]
    monkeypatch.setattr(measure.time, "thread_time", lambda: now[0])
    calls = []

    def run():
        calls.append(1)
        now[0] += run_s * (2 if len(calls) == 1 and runs > 1 else 1)  # the first run is slow

    found, _ = measure.with_peak(run, 60, repeats=3)
    assert len(calls) == runs
    assert found["cpu"] == [60 / run_s] * max(1, runs - 1)


def test_both_decoders_are_asked_for_the_same_steps():
    asked = []

    def decode(state, count):
        asked.append((state, count))
        return [len(asked)] * count

    out = measure.measure(lambda length, room: (length, room), decode, repeats=2, quick=True)
    room = measure.DECODED * 3
    assert asked == [((measure.DECODED_AFTER, room), measure.DECODED)] * 3
    assert len(out["tokens"]) == room
    assert list(out["prefill"]) == [128, 1024]
