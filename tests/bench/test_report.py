"""The page of figures says what its records say, where they come from, and what is measured."""

import json
import re
from pathlib import Path

import pytest

from bench import report

ORIGIN = {
    "date": "2031-02-03T04:05:06+00:00", "commit": "abc1234-dirty", "cpu": "Some CPU", "cores": 3, "load": 0.25,
    "threads": 1, "python": "3.99.1", "torch": "9.8.7", "engine": "pyrosome 0.0.1",
}  # fmt: skip


def decode_point(context: int, rate: float) -> dict:
    planned = 2_000_000 + 168 * context
    return {
        "context": context, "rate_cpu": rate, "repeats_cpu": [rate - 1, rate, rate + 2], "rate_wall": rate / 2,
        "step_peak_mb": 5.25, "resident_mb": planned / 1e6 + 0.5, "cache": {"allocated": planned, "planned": planned},
        "proof": {"problems": [], "keys_scored": context // 4, "rows_attended": 901, "attention_error": 4.9e-07,
                  "checksum": 0x00C0FFEE, "pool_checksum": 0x00C0FFEE},
    }  # fmt: skip


def frontier_record(**changes) -> dict:
    points = [decode_point(4096, 77.25), decode_point(65536, 45.5), decode_point(1048576, 9.75)]
    return {
        **ORIGIN, "bench": "frontier", "numerics": "trained", "kv_format": "fp8", "weights_mb": 19.9,
        "shape": {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_n_heads": 8,
                  "index_topk": 512, "sliding_window": 128, "num_attention_heads": 4, "hidden_size": 128,
                  "layer_ratios": [0, 4, 128]},
        "prefill": {"tokens": 40960, "chunk": 2048, "rate_cpu": 1234.5, "rate_wall": 1111.1, "peak_mb": 321.5,
                    "chunks": {"cpu_s": [1.0 + i / 20 for i in range(20)], "wall_s": [1.5] * 20},
                    "cache": {"allocated": 7654321, "planned": 7654321},
                    "growth": {"slope": 2.5e-5, "start": 1.0, "worst": 0.0, "r2": 0.987}},
        "decode": points, "run_cpu_s": 300.0, "problems": [],
        "memory": {"planned_per_token": 167.5625, "flash_per_token": 3514.25, "page_bytes": 79104,
                   "allocated": {"slope": 167.6178, "start": 2e6, "worst": 12345.0, "r2": 1.0},
                   "resident": {"slope": 168.0001, "start": 2e6, "worst": 9e4, "r2": 0.999999}},
        **changes,
    }  # fmt: skip


def peers_record() -> dict:
    figures = {"prefill 128 (tok/CPU-s)": 700.0, "decode (tok/CPU-s)": 50.0, "decode (tok/s)": 40.0,
               "prefill 128 peak (MB)": 16.5, "decode peak (MB)": 0.4}  # fmt: skip
    return {
        **ORIGIN, "bench": "peers", "shape": "small", "numerics": "exact", "their_engine": "transformers 5.1",
        "their_torch": "9.8.6", "ours": figures, "theirs": {k: v / 2 for k, v in figures.items()}, "rounds": 2,
        "repeats": 3, "same_tokens": True, "logits": {"max_abs": 3.2e-6, "positions": 1500, "top1": 1.0, "std": 1.0},
        "linear": {"4096": {"cache_bytes": 1234567, "peak_mb": 99.5}},
    }  # fmt: skip


def kernels_record(**changes) -> dict:
    def row(name, us, limit=None, size=0, flops=0, errors=None):
        return {
            "name": name, "us": us, "range_us": [us - 1, us + 1], "samples": 7, "bytes": size, "flops": flops,
            "ceiling_read": [25e9, 27e9], "ceiling_gemm": [150e9, 160.5e9] if flops else [0.0, 0.0],
            "read_share": 0.81 if size else None, "gemm_share": 0.93 if flops else None, "limit": limit,
            "errors": errors or {}, "problems": [],
        }  # fmt: skip

    return {
        **ORIGIN, "bench": "kernels", "level": "avx512", "problems": [],
        "rows": [row("fp4-w1", 200.0, ["read", 0.75], 4_400_000, errors={"from float64": [2.4e-8, 1e-5]}),
                 row("fp4-w1-m512", 71720.5, ["gemm", 0.8], flops=8_600_000_000, errors={"bits unlike": [0, 0]}),
                 row("indexer", 14500.0, ["ms", 15.0], 17_800_000, 4_300_000_000), row("norm_rope", 17.25)],
        "overhead": {"share": 0.067, "step_ms": 60.25, "calls": 190, "timer_us": 0.6, "limit": 0.1}, **changes,
    }  # fmt: skip


def wide_record(**changes) -> dict:
    return {
        **ORIGIN, "bench": "wide", "level": "avx512", "numerics": "trained", "kv_format": "fp8", "experts": 32,
        "vocab_size": 4096, "layer_ratios": [0, 0, 4, 128, 4, 128], "problems": [],
        "weights": {"all": 3_456_000_000, "touched": 1_370_000_000},
        "decode": [{"context": 4096, "ms": 68.5, "range_ms": [66.0, 71.0], "read_share": 0.77, "ceiling_read": 26e9},
                   {"context": 262144, "ms": 99.0, "range_ms": [97.0, 103.0], "read_share": 0.53,
                    "ceiling_read": 26e9}],
        "prefill": {"tokens": 512, "ms": 24.5, "range_ms": [24.0, 25.0]}, "several": {},
        "checks": [["share of the read ceiling at 4,096 tokens", 0.77, "least", 0.7],
                   ["CPU ms per token at 4,096 tokens", 68.5, "most", 80.0]], **changes,
    }  # fmt: skip


def test_every_figure_of_the_frontier_is_on_the_page_and_marked():
    text = report.page({"frontier": frontier_record()})
    for row in (
        "| tokens per CPU second, whole prompt | 1,234.5 | measured |",
        "| peak memory above the loaded model | 321.5 MB | measured |",
        "| cache, by the allocator | 7,654,321 B | measured |",
        "| cache, by the plan | 7,654,321 B | computed |",
        "| CPU seconds of a chunk after n tokens | 1.000 + 0.02500 × n / 1,000 | line through 20 measured, R² 0.987 |",
        "| 40,960 | 1.95 | 1,050 |",
        "| 1,048,576 | 9.75 | 8.75 to 11.75 | 4.88 | 5.2 |",
        "| 1,048,576 | 262,144 | 901 | 4.9e-07 | `00c0ffee` | `00c0ffee` |",
        "| 65,536 | 13,010,048 | 13,010,048 | 13.5 |",
        "| rows, by the table of streams | 167.5625 | computed |",
        "| slope of resident memory | 168.0001 | measured; R² 0.999999 |",
        "| rows of V4-Flash, by the same table | 3,514.25 | computed |",
    ):
        assert row in text
    assert "Checks of the run: passed." in text
    heads = [line for line, below in zip(text.splitlines(), text.splitlines()[1:], strict=False) if "---:" in below]
    assert heads and all("measured" in h or "computed" in h for h in heads if "| |" not in h and "bytes per" not in h)


RECORDS = [frontier_record(), peers_record(), kernels_record(), wide_record()]


@pytest.mark.parametrize("record", RECORDS, ids=[r["bench"] for r in RECORDS])
def test_a_section_says_where_its_figures_come_from(record):
    section = report.page({record["bench"]: record})
    for said in (
        f"| command | `python -m bench.{record['bench']}` |",
        "| date, commit | 2031-02-03T04:05:06+00:00, `abc1234-dirty` |",
        "| machine | Some CPU, 3 cores, load 0.25 at the start |",
        "pyrosome 0.0.1, torch 9.8.7, Python 3.99.1",
    ):
        assert said in section
    assert ("transformers 5.1 on torch 9.8.6" in section) is (record["bench"] == "peers")


def test_peers_are_set_side_by_side():
    text = report.page({"peers": peers_record()})
    assert "| measured | pyrosome | transformers 5.1 | ours / theirs |" in text
    assert "| decode (tok/s) | 40.0 | 20.0 | 2.00 |" in text
    assert "| decode peak (MB) | 0.4 | 0.2 | - |" in text
    assert "largest difference 3.20e-06 (measured). Greedy tokens: the same (measured)" in text
    assert "| 4,096 | 1,234,567 | 99.5 |" in text


def test_kernels_stand_beside_their_ceilings():
    text = report.page({"kernels": kernels_record()})
    for row in (
        "| `fp4-w1` | 200.0 | 22.0 | 0.81 | - | - | at least 0.75 of read | from float64: 2.4e-08 |",
        "| `fp4-w1-m512` | 71,720.5 | - | - | 119.9 | 0.93 | at least 0.80 of bf16 | bits unlike: 0 |",
        "| `indexer` | 14,500.0 | 1.2 | 0.81 | 296.6 | 0.93 | at most 15 ms | - |",
        "| `norm_rope` | 17.2 | - | - | - | - | - | - |",
        "25.0 to 27.0 GB/s summing a buffer, 150.0 to 160.5 GFLOP/s in bfloat16",
        "60.2 CPU ms with 190 calls of kernels, 6.7% is spent outside them (measured; limit: below 10%)",
    ):
        assert row in text
    assert "Limits and checks of the run: passed." in text
    alone = kernels_record(rows=kernels_record()["rows"][-1:])
    del alone["overhead"]
    assert "spent outside" not in report.page({"kernels": alone}) and "- GFLOP/s" in report.page({"kernels": alone})


def test_a_wide_model_has_its_rates_and_its_limits():
    text = report.page({"wide": wide_record()})
    for row in (
        "3.456 GB, of which a token reads 1.370 GB (computed)",
        "| 4,096 | 68.50 | 66.00 to 71.00 | 20.0 | 26.0 | 0.77 |",
        "| 262,144 | 99.00 | 97.00 to 103.00 | 13.8 | 26.0 | 0.53 |",
        "| share of the read ceiling at 4,096 tokens | 0.77 | at least 0.7 |",
        "| CPU ms per token at 4,096 tokens | 68.50 | at most 80 |",
        "Limits of the run: passed.",
    ):
        assert row in text


def plan_record(**changes) -> dict:
    line = {"shape": "three layers", "kind": "decode", "tokens": 1, "context": 65536}
    return {
        **ORIGIN, "bench": "plan", "problems": [], "calibration": {"residual": 0.031, "worst": 0.172},
        "lines": [{**line, "predicted": 1100.5, "measured": 1000.0, "error": 0.1005},
                  {**line, "kind": "prefill", "tokens": 512, "predicted": 88.0, "measured": 100.0, "error": -0.12}],
        **changes,
    }  # fmt: skip


def test_predictions_stand_beside_what_was_measured():
    text = report.page({"plan": plan_record()})
    for row in (
        "| three layers | decode | 1 | 65,536 | 1,100.5 | 1,000.0 | +10.1% |",
        "| three layers | prefill | 512 | 65,536 | 88.0 | 100.0 | -12.0% |",
        "within 3.1% (median) and 17.2% (largest)",
        "the largest error is 12.0%. Limits of the run: passed.",
    ):
        assert row in text


def test_what_failed_is_said():
    assert "FAILED: too slow" in report.page({"plan": plan_record(problems=["too slow"])})
    assert "FAILED: too slow" in report.page({"kernels": kernels_record(problems=["too slow"])})
    assert "FAILED: too slow" in report.page({"wide": wide_record(problems=["too slow"])})
    assert "FAILED: 4,096: layer 1: no" in report.page({"frontier": frontier_record(problems=["4,096: layer 1: no"])})
    assert "Greedy tokens: DIFFERENT" in report.page({"peers": {**peers_record(), "same_tokens": False}})


def test_a_benchmark_without_a_record_is_named_with_its_command():
    text = report.page({})
    for bench in set(report.SECTIONS) - set(report.WHERE_THERE_IS_A_GPU):
        assert f"No record yet: run `python -m bench.{bench}`." in text
    assert not re.search(r"\d{3}", text)


def test_the_last_record_of_a_file_counts(tmp_path):
    lines = [json.dumps({"commit": c}) for c in ("old", "new")]
    (tmp_path / "frontier.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "peers.jsonl").write_text("\n")
    assert report.last_records(tmp_path) == {"frontier": {"commit": "new"}}


@pytest.mark.parametrize(("line", "reason"), [("{half", "is no JSON"), ("[1]", "is list, not an object")])
def test_a_damaged_record_is_named(tmp_path, line, reason):
    (tmp_path / "peers.jsonl").write_text('{"bench": "peers"}\n' + line)
    with pytest.raises(SystemExit, match=rf"peers\.jsonl: the last record {reason}"):
        report.last_records(tmp_path)


def test_the_page_and_its_pictures_are_made_the_same_every_time(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need the extra `bench`")
    results = tmp_path / "results"
    results.mkdir()
    for record in RECORDS:
        (results / f"{record['bench']}.jsonl").write_text(json.dumps(record))
    for docs in ("a", "b"):
        assert report.main(["--results", str(results), "--docs", str(tmp_path / docs)]) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    linked = set(re.findall(r"\]\((img/[^)]+)\)", (tmp_path / "a" / "performance.md").read_text(encoding="utf-8")))
    assert {str(f) for f in files} == {"performance.md", *linked} and len(linked) == 4
    decode = (tmp_path / "a" / "img" / "frontier-decode.svg").read_text(encoding="utf-8")
    assert all(f">{label}<" in decode for label in ("4K", "64K", "1M", "tokens per CPU second"))
    assert "4 pictures" in capsys.readouterr().out


def test_the_published_page_is_the_one_its_records_give():
    home = Path(report.HERE.parent)
    published = home / "docs" / "performance.md"
    assert published.read_text(encoding="utf-8") == report.page(report.last_records(report.HERE / "results"))
    for picture in re.findall(r"\]\((img/[^)]+)\)", published.read_text(encoding="utf-8")):
        assert (home / "docs" / picture).stat().st_size < 100_000
