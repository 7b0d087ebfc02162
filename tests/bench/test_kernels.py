"""Rows of kernels: what a call is given, what is checked, which limits are missed.  No test depends on time."""

import json

import pytest
import torch

from bench import kernels, report, shapes
from bench.shapes import QUICK
from pyrosome.ops import native
from pyrosome.ops.index_topk import index_topk
from pyrosome.quant import QuantTensor, simulate_fp4
from pyrosome.quant.rows import FP4IndexRows, FP8KVRows


@pytest.fixture(autouse=True)
def _inference():
    if not native.available():
        pytest.skip("no native library here")
    with torch.inference_mode():
        yield


def same(a: QuantTensor, b: QuantTensor) -> bool:
    return torch.equal(a.dequantize(), b.dequantize())


def test_the_widths_are_those_of_flash():
    made = kernels.cases(shapes.FULL)
    assert {"fp4-w1", "fp8-wkv", "fp4-w1-m2", "fp4-w1-m512", "experts-t512", "indexer", "attention-hca"} <= set(made)
    assert made["fp8-wq_b"].args[2:] == (32768, 1024) and made["fp8-wo_b"].args[2:] == (4096, 8192)
    assert made["fp4-w1"].args[2:] == (2048, 4096) and made["fp4-w2"].args[2:] == (4096, 2048)
    assert made["attention-csa"].args[1:] == (65536, 512, 0.8) and made["attention-hca"].args[1:] == (8192, 8192, 6.0)
    config = shapes.FULL.config
    assert (config.index_n_heads, config.index_head_dim, shapes.FULL.index_rows) == (64, 128, 262144)


def test_copies_are_the_weight_again_in_places_of_their_own():
    one, other = shapes.quantized("fp4", 96, 64, seed=1), shapes.quantized("fp8", 128, 256, seed=2)
    plain = shapes.normal(3, 5).bfloat16()
    stack = shapes.stacked(one, 3)
    groups = shapes.copies([(one, 1), (other, 4), (plain, 1), (stack, 1)], cold_bytes=200_000)
    assert len(groups) > 2
    for a, b, c, d in groups:
        assert same(a, one) and same(b, other) and torch.equal(c, plain) and same(d, stack)
    places = [w.data.data_ptr() for group in groups for w in group]
    assert len(set(places)) == len(places) and all(place % shapes.ALIGNMENT == places[0] % 64 for place in places)


@pytest.mark.parametrize("row_format", [FP4IndexRows(64), FP8KVRows(64, 64)], ids=["index", "kv"])
def test_pools_hold_the_same_rows_in_pages_of_their_own(row_format):
    width = 64 if isinstance(row_format, FP4IndexRows) else 128
    planes = shapes.encoded(row_format, 192, width, seed=3)
    pools = shapes.pools(planes, row_format, cold_bytes=100_000)
    assert len(pools) > 2 and len({int(p) for pool in pools for p in pool.table_BP.flatten()}) == 3 * len(pools)
    for pool in pools:
        assert pool.num_rows == 192 and 0 not in pool.table_BP
        assert torch.equal(pool.span_rows(0, 192)[0], row_format.decode(planes))


def test_ties_stand_at_the_edge_of_what_is_chosen():
    row_format, K = FP4IndexRows(64), 20
    planes = shapes.encoded(row_format, 640, 64, seed=4)
    q, weight = simulate_fp4(shapes.normal(4, 64)), shapes.normal(4)
    score, size = shapes.planted_ties(q, weight, planes, row_format, K)
    edge = score.sort(descending=True).values[K - 1]
    tied = (score == edge).nonzero().flatten()
    assert len(tied) == 3 and int((score > edge).sum()) == K - 1 and (size >= score.abs()).all()
    (pool, *_) = shapes.pools(planes, row_format, 0)
    chosen = index_topk(q[None], pool, weight[None], torch.tensor([640]), ((0, 1),), K)[1][0]
    assert tied[0] in chosen and not torch.isin(tied[1:], chosen).any()


def test_a_wrong_choice_of_rows_is_found_out(monkeypatch):
    def wrong(*args):
        score, index = index_topk(*args)
        index[0, 0] += 1
        return score, index

    monkeypatch.setattr(kernels, "index_topk", wrong)
    assert kernels.cases(QUICK)["indexer"]().errors["rows chosen wrongly"][0] == 1


def test_a_wrong_product_is_found_out(monkeypatch):
    right = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, *rest: right(x, *rest) + 1e-3 * (len(x) > 1))
    name = f"fp4-w1-m{QUICK.many}"
    assert kernels.cases(QUICK)[name]().errors["bits unlike those alone"][0] > 0
    monkeypatch.setattr(kernels, "linear", lambda *args: right(*args) + 1e-3)
    found, allowed = kernels.cases(QUICK)["fp8-wq_a"]().errors["from float64"]
    assert found > allowed


def row(**changes) -> dict:
    return {"name": "some", "us": 5000.0, "limit": None, "errors": {}, "read_share": 0.7, "gemm_share": None, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"limit": ("ms", 6.0)}, []),
        ({"limit": ("ms", 4.0)}, ["some: 5.00 ms, and 4 ms are allowed"]),
        ({"limit": ("read", 0.75)}, ["some: 0.70 of the read ceiling, and 0.75 is the least"]),
        ({"errors": {"scores": (2e-6, 1e-6)}}, ["some: scores: 2e-06, and 1e-06 is allowed"]),
        ({"errors": {"scores": (float("nan"), 1e-6)}}, ["some: scores: nan, and 1e-06 is allowed"]),
    ],
)
def test_what_is_missed_is_said(changes, said):
    assert kernels.missed(row(**changes)) == said


def test_every_row_runs_and_nothing_is_recorded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path / "kernels.jsonl")
    assert kernels.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in kernels.cases(QUICK)) and not list(tmp_path.iterdir())


def test_one_row_can_be_asked_for_and_an_unknown_one_is_refused(capsys):
    assert kernels.main(["--quick", "--only", "fp8-wk"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(SystemExit):
        kernels.main(["--quick", "--only", "fp9"])
    assert "--only fp9: the rows are fp4-w1, " in capsys.readouterr().err


def test_a_record_says_what_was_missed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path / "kernels.jsonl")
    monkeypatch.setattr(shapes, "FULL", QUICK)
    late = kernels.Case(lambda i: None, limit=("ms", 0.0))
    monkeypatch.setattr(kernels, "cases", lambda size: {"late": lambda: late})
    assert kernels.main([]) == 1
    record = json.loads((tmp_path / "kernels.jsonl").read_text())
    assert record["bench"] == "kernels" and record["rows"][0]["name"] == "late"
    assert "| `late` |" in report.page({"kernels": record})
    assert len(record["problems"]) == 1 and "FAILED late: " in capsys.readouterr().err
