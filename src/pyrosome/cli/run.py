"""`pyrosome run`: continue one prompt, streaming, and say what it cost."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams

BUILTIN = "builtin:nano"
OFFICIAL_NOTE = """\
builtin:nano has seeded random weights for now: its text is noise, and shows that loader, cache and sampler work.
For the official weights, point at a directory with config.json, the .safetensors shards and tokenizer.json:
    pyrosome run /path/to/DeepSeek-V4-Flash -p "Hello"
(about 150 GiB of files, held in memory as stored; without native kernels, which come later, that is slow.)"""


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, single file, or builtin:nano.")] = BUILTIN,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")] = "Hello",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set with this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    numerics: Annotated[str, typer.Option(help="trained or exact.")] = "trained",
    kv_format: Annotated[str | None, typer.Option(help="Stored cache rows: f32, bf16 or fp8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Continue a prompt and print what it took."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty; pass some text with -p")
    from pyrosome.llm import LLM  # torch is loaded only now: `--help` stays quick

    started = time.perf_counter()
    llm = LLM(model, numerics=numerics, kv_format=kv_format, progress=None if as_json else _progress)
    loaded = time.perf_counter()
    ids, pieces, reason = [], [], None
    for piece in llm.stream(text, params):
        ids += piece.token_ids
        pieces.append(piece.text)
        reason = piece.finish_reason or reason
        if not as_json:
            sys.stdout.write(_printable(piece.text))
            sys.stdout.flush()
    context = len(llm.encode(text)) + len(ids)
    kv = llm.kv_bytes(context)
    report: dict[str, Any] = {
        "model": str(model),
        "numerics": llm.model.numerics,
        "kv_format": llm.model.kv_format,
        "text": "".join(pieces),
        "token_ids": ids,
        "finish_reason": reason,
        "context_tokens": context,
        "kv_bytes_per_token": kv["per_token"],
        "kv_bytes": kv["sequence"],
        "load_s": round(loaded - started, 3),
        "generate_s": round(time.perf_counter() - loaded, 3),
    }
    typer.echo(json.dumps(report, ensure_ascii=False) if as_json else _summary(report))


def _progress(done: int, total: int, shard: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rloading {shard}: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")
        sys.stderr.write("\n" if done >= total else "")


def _printable(text: str) -> str:
    """Noise may hold control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\u00b7" for c in text)


def _summary(report: dict[str, Any]) -> str:
    lines = [
        "",
        "",
        f"{report['model']}: numerics {report['numerics']}, cache rows {report['kv_format']}",
        f"generated {len(report['token_ids'])} tokens ({report['finish_reason']}); "
        f"context {report['context_tokens']} tokens; load {report['load_s']} s, generation {report['generate_s']} s",
        f"KV cache: {report['kv_bytes_per_token']:,.2f} bytes per token of history, "
        f"{report['kv_bytes']:,} bytes for this sequence with its windows and tails",
    ]
    return "\n".join([*lines, OFFICIAL_NOTE] if report["model"] == BUILTIN else lines)
