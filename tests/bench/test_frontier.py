"""Filled caches hold what their seed says, and a decode step that does not read them is found out."""

import json

import pytest
import torch

from bench import frontier
from bench.witness import Watch, selection_problems, verify
from pyrosome.cache.streams import layer_streams
from pyrosome.engine.runner import Runner
from pyrosome.errors import ContextTooLong
from pyrosome.model import deepseek_v4
from pyrosome.model.step import Span, Step
from pyrosome.quant.rows import index_rows, kv_rows
from pyrosome.testing.filled import RandomRows, emitted, fill

FILLED = 4096  # 1,024 CSA rows: twice what the indexer keeps
ROWS = RandomRows(3)
CSA, HCA = 1, 2  # layers


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return frontier.network()


def opened(model, length=FILLED, room=8, rows=ROWS):
    runner = Runner(model, frontier.KV_FORMAT, 1, length + room)
    sequence = runner.open()
    fill(runner, sequence, length, rows)
    return runner, sequence


def view(runner, sequence, layer):
    return runner.pool.layers(Step.of([Span(sequence.slot, sequence.length, [0])]))[layer]


def history(runner, sequence, layer, name, width, ratio):
    none = emitted(torch.empty(0, dtype=torch.int64), ratio, 0)
    return view(runner, sequence, layer).history(name, torch.empty(0, width), none, ratio)


def watched(runner, sequence, token=1):
    position = sequence.length
    with Watch(runner) as watch:
        (logits,) = runner.step([(sequence, [token])])
    return watch, position, logits


def test_the_narrow_model_has_flash_row_shapes():
    flash, ours = frontier.ModelConfig.preset("flash"), frontier.narrow()
    assert set(ours.layer_ratios) == set(flash.layer_ratios)
    for ratio in (0, 4, 128):
        theirs = {s.name: (s.width, s.row_bytes, s.keep) for s in layer_streams(flash, ratio, "fp8")}
        assert {s.name: (s.width, s.row_bytes, s.keep) for s in layer_streams(ours, ratio, "fp8")} == theirs
    assert (ours.index_topk, ours.max_position_embeddings) == (flash.index_topk, flash.max_position_embeddings)
    assert ours.index_n_heads <= 8


def test_rows_are_the_same_in_whatever_range_they_are_asked():
    whole = ROWS.rows(0, "csa_kv", 0, 9000, 4)
    assert torch.equal(ROWS.rows(0, "csa_kv", 4000, 8200, 4), whole[4000:8200])
    assert ROWS.rows(0, "csa_kv", 5, 5, 4).shape == (0, 4)
    assert len(whole.unique()) > 35_000
    for other in (
        ROWS.rows(1, "csa_kv", 0, 9, 4),
        ROWS.rows(0, "hca_kv", 0, 9, 4),
        RandomRows(4).rows(0, "csa_kv", 0, 9, 4),
    ):
        assert not torch.equal(other, whole[:9])


@pytest.mark.parametrize("length", [4, 1000, FILLED])
def test_a_filled_pool_gives_the_rows_of_its_seed(model, length):
    runner, sequence = opened(model, length)
    assert sequence.length == length
    kv, keys = kv_rows("fp8", 512, 64), index_rows("fp8", 128)
    for layer, name, width, ratio, row_format in (
        (CSA, "csa_kv", 512, 4, kv), (CSA, "index_k", 128, 4, keys), (HCA, "hca_kv", 512, 128, kv),
    ):  # fmt: skip
        count = length // ratio
        found = history(runner, sequence, layer, name, width, ratio).span_rows(0, count)[0]
        assert torch.equal(found, row_format.round_trip(ROWS.rows(layer, name, 0, count, width)))
    ring = view(runner, sequence, 0).window(torch.zeros(0, 512)).rows_NC[1:]
    kept = torch.arange(max(0, length - 128), length)
    assert torch.equal(ring[kept % 128], kv.round_trip(ROWS.rows(0, "window_kv", int(kept[0]), length, 512)))
    tail_kv, tail_gate = view(runner, sequence, CSA).tail("tail", torch.zeros(1, 1024))
    last = ROWS.rows(CSA, "tail", length - 1, length, 2048)[0]
    assert torch.equal(torch.cat([tail_kv, tail_gate], -1)[sequence.slot, (length - 1) % 8], last)


def test_filling_more_than_was_planned_is_refused(model):
    runner = Runner(model, "fp8", 1, 256)
    with pytest.raises(ContextTooLong):
        fill(runner, runner.open(), 384, ROWS)


def test_a_sequence_with_tokens_is_not_filled(model):
    runner, sequence = opened(model, 256)
    with pytest.raises(ValueError, match="has 256 tokens"):
        fill(runner, sequence, 256, ROWS)


@pytest.mark.parametrize("length", [4, 128, 1200, FILLED])
def test_a_decode_step_is_proved_to_have_read_its_cache(model, length):
    runner, sequence = opened(model, length)
    watch, position, _ = watched(runner, sequence)
    proof = verify(runner, sequence, position, watch, ROWS)
    assert proof.problems == []
    near = min(length, 127) + 1
    assert proof.keys_scored == length // 4
    assert proof.rows_attended == 3 * near + min(512, length // 4) + length // 128
    assert proof.checksum == proof.pool_checksum
    assert proof.attention_error < 3e-3  # weights are rounded to bfloat16: see `witness.ATTENTION_TOLERANCE`


def test_no_token_that_may_finish_a_row_is_verified(model):
    runner, sequence = opened(model, FILLED - 1)
    watch, position, _ = watched(runner, sequence)
    with pytest.raises(ValueError, match="multiple of 4"):
        verify(runner, sequence, position, watch, ROWS)


def test_rows_of_another_seed_are_found_out(model):
    runner, sequence = opened(model)
    watch, position, _ = watched(runner, sequence)
    problems = verify(runner, sequence, position, watch, RandomRows(4)).problems
    assert [p.split()[0] for p in problems] == ["layer", "layer", "layer", "layer", "the"]
    assert "left out" in problems[1]


def half_the_keys(monkeypatch):
    whole = deepseek_v4.index_topk

    def topk(q, keys, weight, visible, layout, topk):
        return whole(q, keys, weight, visible // 2, layout, topk)

    monkeypatch.setattr(deepseek_v4, "index_topk", topk)
    return "was left out"


def the_first_rows(monkeypatch):
    def topk(q, keys, weight, visible, layout, topk):
        return torch.zeros(1, topk), torch.arange(topk)[None]

    monkeypatch.setattr(deepseek_v4, "index_topk", topk)
    return "was left out"


def _attending(monkeypatch, change):
    """Attention whose parts, the window and then the rows, are changed before they are read."""
    whole = deepseek_v4.attention

    def attend(q, parts, sink, rotation):
        return whole(q, [(source, change(at, index)) for at, (source, index) in enumerate(parts)], sink, rotation)

    monkeypatch.setattr(deepseek_v4, "attention", attend)
    return "away from that over"


def window_only(monkeypatch):
    return _attending(monkeypatch, lambda at, index: torch.full_like(index, -1) if at else index)


def no_window(monkeypatch):
    return _attending(monkeypatch, lambda at, index: index if at else torch.full_like(index, -1))


def one_row_less(monkeypatch):
    def change(at, index):
        index = index.clone()
        index[:, -1] = -1 if at else index[:, -1]
        return index

    return _attending(monkeypatch, change)


@pytest.mark.parametrize("skip", [half_the_keys, the_first_rows, window_only, no_window, one_row_less])
def test_a_step_that_does_not_read_its_rows_is_found_out(model, monkeypatch, skip):
    expected = skip(monkeypatch)
    runner, sequence = opened(model)
    watch, position, _ = watched(runner, sequence)
    problems = verify(runner, sequence, position, watch, ROWS).problems
    assert problems and all(expected in p for p in problems)


def test_rows_lost_by_the_pool_are_found_out(model):
    runner, sequence = opened(model)
    lost = emitted(torch.tensor([7]), 128, sequence.slot)
    view(runner, sequence, HCA).history("hca_kv", torch.zeros(1, 512), lost, 128)
    watch, position, _ = watched(runner, sequence)
    problems = verify(runner, sequence, position, watch, ROWS).problems
    assert problems[0].startswith("layer 2: the output of attention") and problems[1].startswith("the pool's rows")


@pytest.mark.parametrize(
    ("layer", "stream", "which", "changes"),
    [
        (CSA, "csa_kv", "chosen", True),
        (CSA, "csa_kv", "others", False),
        (CSA, "csa_kv", "not yet visible", False),
        (CSA, "index_k", "others", True),
        (CSA, "index_k", "not yet visible", False),
        (HCA, "hca_kv", "others", True),
        (HCA, "hca_kv", "not yet visible", False),
    ],
)
def test_logits_change_with_the_rows_that_are_read_and_with_no_other(model, layer, stream, which, changes):
    runner, sequence = opened(model, room=256)
    watch, position, before = watched(runner, sequence)
    index = watch.indexer[CSA][1][1][0]
    ratio, width = (128 if stream == "hca_kv" else 4), (128 if stream == "index_k" else 512)
    count = position // ratio
    rows = {
        "chosen": index,
        "others": torch.tensor([r for r in range(count) if stream == "hca_kv" or r not in set(index.tolist())]),
        "not yet visible": torch.tensor([count]),
    }[which]
    changed = RandomRows(8).rows(layer, stream, 0, count + 1, width)[rows]
    view(runner, sequence, layer).history(stream, changed, emitted(rows, ratio, sequence.slot), ratio)
    sequence.length = position
    _, _, after = watched(runner, sequence)
    assert torch.equal(before, after) is not changes


def test_a_choice_is_held_against_every_score():
    score = torch.tensor([5.0, 1.0, 4.0, 3.0], dtype=torch.float64)
    assert selection_problems(score, torch.tensor([0, 2]), 2) == []
    assert selection_problems(score, torch.tensor([0, 1, 2, 3]), 9) == []
    assert "row 2 was left out" in selection_problems(score, torch.tensor([0, 3]), 2)[0]
    assert "2 rows were chosen, 1 of them different" in selection_problems(score, torch.tensor([0, 0]), 2)[0]
    assert "of 4 rows 4 are" in selection_problems(score, torch.tensor([0, 2]), 9)[0]
    assert selection_problems(score + torch.tensor([0, 0, 0, 1 + 1e-9]), torch.tensor([0, 2]), 2) == []  # a near-tie


def test_a_prefill_counts_the_cpu_time_of_its_own_thread(model, monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(frontier.time, "thread_time", lambda: next(clock))
    found = frontier.prefilled(model, 256, 128)
    assert found["chunks"]["cpu_s"] == [2, 2] and found["rate_cpu"] == 64


def test_a_line_says_how_far_points_are_from_it():
    assert frontier.line([0, 1, 2], [1, 3, 5]) == pytest.approx({"slope": 2, "start": 1, "worst": 0, "r2": 1})
    assert frontier.line([0, 1, 2], [0, 3, 0])["worst"] == pytest.approx(2)
    assert frontier.line([5], [3.0])["start"] == 3.0


def a_point(context, allocated, planned=None, problems=()):
    cache = {"allocated": allocated, "planned": planned or allocated}
    return {"context": context, "cache": cache, "resident_mb": allocated / 1e6, "proof": {"problems": list(problems)}}


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (a_point(65536, 12_000_000), None),
        (a_point(65536, 12_000_000, planned=12_000_001), "12,000,000 B are allocated and 12,000,001 B are planned"),
        (a_point(65536, 12_000_000, problems=["layer 1: no"]), "65,536: layer 1: no"),
        (a_point(65536, 14_000_000), "memory is not linear"),
    ],
)
def test_what_fails_a_run(middle, reason):
    points = [a_point(0, 2_000_000), middle, a_point(131072, 22_000_000)]
    memory = frontier.memory_by_context(points)
    assert memory["planned_per_token"] == 167.5625 and memory["flash_per_token"] == 3514.25
    found = frontier.problems({"cache": {"allocated": 1, "planned": 1}}, points, memory)
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0])


def test_a_quick_run_passes_and_leaves_no_record(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(frontier, "TIMED", 4)
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "frontier.jsonl")
    assert frontier.main(["--quick", "--points", "256", "1024", "--prefill", "256"]) == 0
    assert "167.5625 planned" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_a_record_and_its_verdict(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(frontier, "network", lambda: model)
    monkeypatch.setattr(frontier, "TIMED", 4)
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "results" / "frontier.jsonl")
    monkeypatch.setattr(frontier, "REPEATS", 1)
    half_the_keys(monkeypatch)
    assert frontier.main(["--points", "4096", "256", "--prefill", "256"]) == 1
    assert "FAILED 4,096: layer 1" in capsys.readouterr().err
    record = json.loads((tmp_path / "results" / "frontier.jsonl").read_text())
    assert [p["context"] for p in record["decode"]] == [256, 4096]
    assert record["prefill"]["cache"]["allocated"] == record["prefill"]["cache"]["planned"]
    assert {"date", "commit", "cpu", "python", "torch", "engine"} <= set(record)


@pytest.mark.parametrize("asked", [["--points", "100", "256"], ["--points", "256"], ["--prefill", "2097152"]])
def test_contexts_that_cannot_be_measured_are_refused(asked, capsys):
    with pytest.raises(SystemExit):
        frontier.main(asked)
    assert asked[1] in capsys.readouterr().err.replace(",", "")
