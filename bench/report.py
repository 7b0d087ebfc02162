"""docs/performance.md and its pictures, from the last record of each benchmark in bench/results/.

    python -m bench.report [--results DIRECTORY] [--docs DIRECTORY]

The page says nothing that its records do not: every figure stands under the command, machine, versions, date and
commit it comes from, and is marked as measured or computed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.records import ratio

HERE = Path(__file__).parent
TABLE_CHUNKS = 8  # chunks of a prefill that its table shows

HEAD = """# Performance

Made by `python -m bench.report` from the last record of each benchmark in `bench/results/`; not edited by hand.
**Measured** figures were taken by the command above them, on the machine and versions under it. **Computed** ones are
arithmetic on shapes. Rates are per second of one thread's CPU time unless the clock is named. 1 MB is 10⁶ bytes.
"""


def last_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line of each benchmark's file, by the benchmark's name.

    Raises:
        SystemExit: a last line that is no JSON object.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            continue
        try:
            record = json.loads(lines[-1])
        except ValueError as error:
            raise SystemExit(
                f"{path}: the last record is no JSON ({error}); remove that line, or run it again"
            ) from None
        if not isinstance(record, dict):
            raise SystemExit(f"{path}: the last record is {type(record).__name__}, not an object; remove that line")
        found[path.stem] = record
    return found


def page(records: dict[str, dict[str, Any]]) -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for bench, (title, command, body) in SECTIONS.items():
        if bench not in records and bench in WHERE_THERE_IS_A_GPU:
            continue
        parts.append(f"## {title}\n")
        if bench in records:
            parts += [origin(records[bench], command), body(records[bench])]
        else:
            parts.append(f"No record yet: run `{command}`.\n")
    return "\n".join(parts)


def origin(record: dict[str, Any], command: str) -> str:
    """Where a record's figures come from."""
    versions = [record.get("engine") or "pyrosome", f"torch {record['torch']}", f"Python {record['python']}"]
    if "their_engine" in record:
        versions.append(f"{record['their_engine']} on torch {record['their_torch']}")
    return table(
        ("", ""),
        [
            ("command", f"`{command}`"),
            ("date, commit", f"{record['date']}, `{record['commit']}`"),
            ("machine", f"{record['cpu']}, {record['cores']} cores, load {record['load']} at the start"),
            *([("device", _device(record))] if "device" in record else []),
            ("threads", f"{record['threads']}"),
            ("versions", ", ".join(versions)),
        ],
    )


def _device(record: dict[str, Any]) -> str:
    versions = record["versions"]
    return f"{record['device']}, driver {versions['driver']}, CUDA {versions['cuda']}, Triton {versions['triton']}"


def frontier(record: dict[str, Any]) -> str:
    """Long contexts: the shape, prefill, decode, memory."""
    shape = record["shape"]
    ratios = ", ".join(str(r) for r in shape["layer_ratios"])
    text = (
        f"A narrow model with V4-Flash's row shapes: head_dim {shape['head_dim']}, {shape['qk_rope_head_dim']} of it "
        f"rotary, index keys of {shape['index_head_dim']}, window {shape['sliding_window']}, top "
        f"{shape['index_topk']}; layers with compress ratios {ratios}, {shape['num_attention_heads']} attention and "
        f"{shape['index_n_heads']} index heads, hidden size {shape['hidden_size']}, {record['weights_mb']:.1f} MB of "
        f"seeded weights. Numerics `{record['numerics']}`, rows `{record['kv_format']}`. Its rates are not those of "
        "V4-Flash.\n"
    )
    return "\n".join(
        [text, f"Checks of the run: {_verdict(record)}.\n", _prefill(record), _decode(record), _memory(record)]
    )


def _prefill(record: dict[str, Any]) -> str:
    prefill, growth, cache = record["prefill"], record["prefill"]["growth"], record["prefill"]["cache"]
    chunk, spent = prefill["chunk"], prefill["chunks"]["cpu_s"]
    every = max(1, len(spent) // TABLE_CHUNKS)
    shown = sorted({0, *range(every - 1, len(spent), every)})
    rows = [(f"{chunk * (i + 1):,}", f"{spent[i]:.2f}", f"{chunk / spent[i]:,.0f}") for i in shown]
    fitted = f"{growth['start']:.3f} + {growth['slope'] * 1000:.5f} × n / 1,000"
    figures = [
        ("tokens per CPU second, whole prompt", f"{prefill['rate_cpu']:,.1f}", "measured"),
        ("tokens per second of the clock", f"{prefill['rate_wall']:,.1f}", "measured"),
        ("peak memory above the loaded model", f"{prefill['peak_mb']:,.1f} MB", "measured"),
        ("cache, by the allocator", f"{cache['allocated']:,} B", "measured"),
        ("cache, by the plan", f"{cache['planned']:,} B", "computed"),
        ("CPU seconds of a chunk after n tokens", fitted, f"line through {len(spent)} measured, R² {growth['r2']:.3f}"),
    ]
    return "\n".join([
        f"### Prefill of {prefill['tokens']:,} tokens in chunks of {chunk:,}\n",
        table(("", "", ""), figures),
        table(("context after the chunk", "CPU seconds (measured)", "tokens per CPU second (measured)"), rows),
        "![prefill rate by context](img/frontier-prefill.svg)\n",
    ])  # fmt: skip


def _decode(record: dict[str, Any]) -> str:
    rates = [
        (f"{p['context']:,}", f"{p['rate_cpu']:,.2f}", f"{min(p['repeats_cpu']):,.2f} to {max(p['repeats_cpu']):,.2f}",
         f"{p['rate_wall']:,.2f}", f"{p['step_peak_mb']:,.1f}")
        for p in record["decode"]
    ]  # fmt: skip
    proofs = [
        (f"{p['context']:,}", f"{p['proof']['keys_scored']:,}", f"{p['proof']['rows_attended']:,}",
         f"{p['proof']['attention_error']:.1e}", f"`{p['proof']['checksum']:08x}`",
         f"`{p['proof']['pool_checksum']:08x}`")
        for p in record["decode"]
    ]  # fmt: skip
    return "\n".join([
        "### Decode over caches filled with random rows\n",
        table(("context", "tokens per CPU second, median (measured)", "range (measured)",
               "tokens per second of the clock (measured)", "peak of a step above model and cache, MB (measured)"),
              rates),
        "![decode rate by context](img/frontier-decode.svg)\n",
        "One step at each context is computed again from the seed of the rows, without the cache: every key is scored, "
        "and attention is taken in float64 over every row that the step had to read. The CRC-32 is of the history rows "
        "among them.\n",
        table(("context", "keys it had to score (computed)", "rows it had to attend to (computed)",
               "relative error of attention, worst layer (measured)", "CRC-32 from the seed (computed)",
               "CRC-32 from the cache (measured)"), proofs),
    ])  # fmt: skip


def _memory(record: dict[str, Any]) -> str:
    memory = record["memory"]
    rows = [
        (f"{p['context']:,}", f"{p['cache']['allocated']:,}", f"{p['cache']['planned']:,}", f"{p['resident_mb']:,.1f}")
        for p in record["decode"]
    ]
    allocated, resident = memory["allocated"], memory["resident"]
    slopes = [
        ("rows, by the table of streams", f"{memory['planned_per_token']:,.4f}", "computed"),
        ("slope of bytes allocated, with page tables and whole pages", f"{allocated['slope']:,.4f}",
         f"measured; farthest point {allocated['worst']:,.0f} B from the line"),
        ("slope of resident memory", f"{resident['slope']:,.4f}", f"measured; R² {resident['r2']:.6f}"),
        ("rows of V4-Flash, by the same table", f"{memory['flash_per_token']:,.2f}", "computed"),
    ]  # fmt: skip
    head = ("context", "cache allocated, B (measured)", "cache planned, B (computed)", "cache resident, MB (measured)")
    return "\n".join([
        "### Memory by context\n",
        table(head, rows),
        table(("bytes per token of one sequence", "", ""), slopes),
        "![cache memory by context](img/frontier-memory.svg)\n",
    ])  # fmt: skip


def peers(record: dict[str, Any]) -> str:
    """The same weights in another engine and here."""
    logits = record["logits"]
    rows = [
        (name, f"{ours:,.1f}", f"{record['theirs'][name]:,.1f}", ratio(name, ours, record["theirs"][name]))
        for name, ours in record["ours"].items()
    ]
    linear = [(f"{int(n):,}", f"{r['cache_bytes']:,}", f"{r['peak_mb']:,.1f}") for n, r in record["linear"].items()]
    same = "the same" if record["same_tokens"] else "DIFFERENT"
    return "\n".join([
        f"Shape `{record['shape']}` of `bench/measure.py`, numerics `{record['numerics']}` on both sides, medians of "
        f"{record['rounds']} × {record['repeats']}. Logits of {logits['positions']:,} positions: largest difference "
        f"{logits['max_abs']:.2e} (measured). Greedy tokens: {same} (measured).\n",
        table(("measured", "pyrosome", record["their_engine"], "ours / theirs"), rows),
        "![rates beside the other engine's](img/peers.svg)\n",
        table(("tokens", "our cache, B (measured)", "our peak above the model, MB (measured)"), linear),
    ])  # fmt: skip


def kernels(record: dict[str, Any]) -> str:
    """The CPU's kernels one by one, beside the machine's ceilings."""
    rows = record["rows"]
    cells = [
        (f"`{r['name']}`", f"{r['us']:,.1f}", *_rate(r, "bytes", "read"), *_rate(r, "flops", "gemm"),
         _limit(r["limit"]), _differences(r["errors"]))
        for r in rows
    ]  # fmt: skip
    head = ("", "µs per call (measured)", "GB/s (measured)", "of the read ceiling (measured)", "GFLOP/s (measured)",
            "of the bf16 ceiling (measured)", "limit", "differences (measured)")  # fmt: skip
    text = (
        f"One thread, instructions `{record['level']}`; medians over calls whose weights and rows come from memory. "
        "The ceilings were measured before and after each row: "
        f"{_span(rows, 'ceiling_read')} GB/s summing a buffer, {_span(rows, 'ceiling_gemm')} GFLOP/s in bfloat16 "
        "products by torch (measured, least and most). Differences are relative to float64.\n"
    )
    parts = [text, f"Limits and checks of the run: {_verdict(record)}.\n", table(head, cells)]
    if share := record.get("overhead"):
        parts.append(
            f"Of a decode step of `bench.wide`'s model, {share['step_ms']:.1f} CPU ms with {share['calls']:.0f} calls "
            f"of kernels, {share['share']:.1%} is spent outside them (measured; limit: below {share['limit']:.0%}).\n"
        )
    return "\n".join(parts)


def _rate(row: dict[str, Any], unit: str, ceiling: str) -> tuple[str, str]:
    """A rate per second in units of 10^9, and its share of a ceiling."""
    share = row[f"{ceiling}_share"]
    return ("-", "-") if share is None else (f"{row[unit] / row['us'] / 1000:,.1f}", f"{share:.2f}")


def _differences(errors: dict[str, Any]) -> str:
    return ", ".join(f"{what}: {found:.1e}" if found else f"{what}: 0" for what, (found, _) in errors.items()) or "-"


def _limit(limit: list[Any] | None) -> str:
    if limit is None:
        return "-"
    kind, value = limit
    return f"at most {value:g} ms" if kind == "ms" else f"at least {value:.2f} of {'bf16' if kind == 'gemm' else kind}"


def _span(rows: list[dict[str, Any]], ceiling: str) -> str:
    found = [value / 1e9 for row in rows for value in row[ceiling] if value]
    return f"{min(found):.1f} to {max(found):.1f}" if found else "-"


def _verdict(record: dict[str, Any]) -> str:
    return "passed" if not record["problems"] else "FAILED: " + "; ".join(record["problems"])


def wide(record: dict[str, Any]) -> str:
    """A model of V4-Flash's widths: decoding, prefill, threads."""
    weights, ratios = record["weights"], ", ".join(str(r) for r in record["layer_ratios"])
    text = (
        f"V4-Flash's widths, layers with compress ratios {ratios}, {record['experts']} routed experts, a vocabulary of "
        f"{record['vocab_size']:,}; seeded weights in FP8 and FP4: {weights['all'] / 1e9:.3f} GB, of which a token "
        f"reads {weights['touched'] / 1e9:.3f} GB (computed). Numerics `{record['numerics']}`, rows "
        f"`{record['kv_format']}`, instructions `{record['level']}`.\n"
    )
    decode = [
        (f"{d['context']:,}", f"{d['ms']:.2f}", f"{d['range_ms'][0]:.2f} to {d['range_ms'][1]:.2f}",
         f"{weights['touched'] / d['ms'] / 1e6:.1f}", f"{d['ceiling_read'] / 1e9:.1f}", f"{d['read_share']:.2f}")
        for d in record["decode"]
    ]  # fmt: skip
    held = [(what, f"{value:.2f}", f"at {kind} {limit:g}") for what, value, kind, limit in record["checks"]]
    return "\n".join([
        text,
        f"Limits of the run: {_verdict(record)}.\n",
        table(("context", "CPU ms per token, median (measured)", "range (measured)", "GB/s of weights (measured)",
               "read ceiling, GB/s (measured)", "share of it (measured)"), decode),
        table(("", "measured", "limit"), held),
    ])  # fmt: skip


def predictions(record: dict[str, Any]) -> str:
    """The planner's rates after `pyrosome calibrate`, beside measured ones of networks it was not fitted to."""
    rows = [
        (x["shape"], x["kind"], f"{x['tokens']:,}", f"{x['context']:,}", f"{x['predicted']:,.1f}",
         f"{x['measured']:,.1f}", f"{x['error']:+.1%}")
        for x in record["lines"]
    ]  # fmt: skip
    worst = max(abs(x["error"]) for x in record["lines"])
    fit = record["calibration"]
    return (
        f"Calibrated in the same run: steps that were fitted to are met within {fit['residual']:.1%} (median) and "
        f"{fit['worst']:.1%} (largest). None of the networks, contexts and prompts below was among them; the largest "
        f"error is {worst:.1%}. Limits of the run: {_verdict(record)}.\n\n"
        + table(
            ("network", "", "tokens", "at context", "predicted, tok/s (computed)", "measured, tok/s", "error"), rows
        )
    )


def training(record: dict[str, Any]) -> str:
    """Steps of the built-in model's recipe, by who computes them."""
    titles = {
        "definitions": "definitions, float32",
        "kernels": "native kernels, float32",
        "bfloat16": "native kernels, bfloat16 products",
    }
    base = record["ways"]["definitions"]["tokens_per_cpu_s"]
    rows = [
        (titles[name], f"{each['tokens_per_cpu_s']:,.0f}", f"{each['tokens_per_cpu_s'] / base:.2f}")
        for name, each in record["ways"].items()
    ]
    return (
        f"Steps of {record['step_tokens']:,} tokens: forward, backward, the draft stage, Muon and AdamW. Measured, "
        "medians; the ways take turns in one process.\n\n" + table(("", "tokens/CPU-s", "to definitions"), rows)
    )


def kernels_gpu(record: dict[str, Any]) -> str:
    """A GPU's kernels one by one: what they take, of what there is, beside their definitions."""
    most = record["ceilings"]
    text = (
        f"Ceilings, measured by torch in the same run: memory {most['memory'] / 1e9:,.0f} GB/s, products "
        + ", ".join(f"{kind} {most[kind] / 1e12:,.1f} TFLOP/s" for kind in ("fp8", "bf16", "f32") if kind in most)
        + ". A share is of the ceiling that the call meets first; bytes and FLOPs are computed from shapes: weights "
        "and rows once. Calls are replayed as graphs, with the device's cache flushed between. Definitions are "
        f"multiples of the kernel's time. Limits of the run: {_verdict(record)}.\n\n"
        "![what calls reach by their intensity](img/kernels-gpu.svg)\n"
    )
    rows = [_kernel_gpu(row) for row in record["rows"]]
    head = ("call", "us, median (measured)", "GB/s (measured)", "TFLOP/s (measured)", "share (measured)",
            "definition", "compiled", "from the definition", "a row alone")  # fmt: skip
    return text + "\n" + table(head, rows)


def _kernel_gpu(row: dict[str, Any]) -> tuple[str, ...]:
    if row["us"] is None:
        return (row["title"], *["-"] * 7, row["problems"][0])
    seconds, definition = row["us"] / 1e6, row["definition"]
    ways = [definition.get(way, {}).get("us") for way in ("eager", "compiled")]
    return (
        row["title"],
        f"{row['us']:,.1f}",
        f"{row['bytes'] / seconds / 1e9:,.0f}",
        f"{row['flops'] / seconds / 1e12:,.1f}" if row["flops"] else "-",
        f"{row['share']:.2f}",
        *(f"{us / row['us']:.1f}" if us else "-" for us in ways),
        "-" if row["difference"] is None else f"{row['difference']:.1e}",
        {None: "-", True: "same bits", False: "other bits"}[row["same_alone"]],
    )


SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "frontier": ("Long contexts", "python -m bench.frontier", frontier),
    "peers": ("Beside transformers, on the same weights", "python -m bench.peers", peers),
    "kernels": ("Kernels at V4-Flash's widths", "python -m bench.kernels", kernels),
    "kernels_gpu": ("Kernels on a GPU", "python -m bench.kernels --device cuda", kernels_gpu),
    "wide": ("A model of V4-Flash's widths", "python -m bench.wide", wide),
    "plan": ("Predictions beside measurements", "python -m bench.plan", predictions),
    "train": ("Training the built-in model's recipe", "python -m bench.train", training),
}


WHERE_THERE_IS_A_GPU = ("kernels_gpu",)  # said nothing of until a record is there


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; columns after the first are right-aligned where they hold figures alone."""
    align = ["---", *("---:" if all(_is_figure(r[i]) for r in rows) else "---" for i in range(1, len(head)))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, align, *rows))


def _is_figure(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").isdigit()


def main(argv: list[str] | None = None) -> int:
    """Write the page and its pictures; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args(argv)
    records = last_records(args.results)
    try:
        from bench.plots import plots
    except ImportError as error:
        raise SystemExit(f"the pictures need matplotlib ({error}): pip install 'pyrosome[bench]'") from None
    args.docs.mkdir(parents=True, exist_ok=True)
    written = plots(records, args.docs / "img")
    (args.docs / "performance.md").write_text(page(records), encoding="utf-8")
    print(f"{args.docs / 'performance.md'} from {', '.join(records) or 'no records'}, {len(written)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
