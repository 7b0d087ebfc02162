"""`pyrosome run`: continue one prompt, streaming, and say what it cost."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.engine_flags import (
    CACHE_GIB,
    CacheGiB,
    Device,
    Drafter,
    Experts,
    LockMemory,
    LogEvery,
    Numa,
    TracePath,
    engine_options,
    load_options,
)
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP, official_note
from pyrosome.cli.terminal import INTERRUPTED, Screen, Stop, decoded, loading
from pyrosome.errors import RequestError
from pyrosome.options import SamplingParams

if TYPE_CHECKING:
    from pyrosome.llm import LLM


def run(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=BUILTIN)] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")] = "Hello",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set with this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    numerics: Annotated[str, typer.Option(help="trained or exact.")] = "trained",
    kv_format: Annotated[str | None, typer.Option(help="Stored cache rows: f32, bf16 or fp8.")] = None,
    cache_gib: CacheGiB = CACHE_GIB,
    drafter: Drafter = "auto",
    experts: Experts = "resident",
    lock_memory: LockMemory = False,
    numa: Numa = "auto",
    device: Device = "cpu",
    log_every: LogEvery = 0,
    trace: TracePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Continue a prompt and print what it took.

    The text goes to standard output, all else to standard error.  Ctrl-C ends the text with what there is.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    options = engine_options(cache_gib, drafter, log_every, trace)
    held = load_options(experts, lock_memory, numa, device)
    screen = Screen()
    text = _standard_input(screen) if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty; pass some text with -p")
    from pyrosome.llm import LLM  # torch is loaded only now: `--help` stays quick

    started = time.perf_counter()
    with loading(screen) as progress:
        llm = LLM(model or BUILTIN, numerics=numerics, kv_format=kv_format, options=options, progress=progress, **held)
    with llm:  # its end writes the trace
        report: dict[str, Any] = {
            "model": model or BUILTIN,
            "numerics": llm.model.numerics,
            "kv_format": llm.model.kv_format,
        }
        report["load_s"] = round(time.perf_counter() - started, 3)
        report |= _generate(llm, text, params, None if as_json else screen)
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
        else:
            screen.notice(_summary(report))
    if model is None and not as_json:
        screen.notice("\n" + official_note('run /path/to/DeepSeek-V4-Flash -p "Hello"'))
    if report["finish_reason"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _generate(llm: LLM, text: str, params: SamplingParams, screen: Screen | None) -> dict[str, Any]:
    started = time.perf_counter()
    ids: list[int] = []
    pieces: list[str] = []
    reason: str | None = None
    try:
        with Stop() as stop:
            stream = llm.stream(text, params)
            for piece in stream:
                ids += piece.token_ids
                pieces.append(piece.text)
                reason = piece.finish_reason or reason
                if screen:
                    screen.text(piece.text)
                if stop.asked:
                    stream.close()  # type: ignore[attr-defined]
                    break
    except KeyboardInterrupt:  # the second one: it was the step that took long
        pass
    if screen:
        screen.end_line()
    context = len(llm.encode(text)) + len(ids)
    kv = llm.kv_bytes(context)
    return {
        "text": "".join(pieces),
        "token_ids": ids,
        "finish_reason": reason or "interrupted",
        "context_tokens": context,
        "kv_bytes_per_token": kv["per_token"],
        "kv_bytes": kv["sequence"],
        "generate_s": round(time.perf_counter() - started, 3),
    }


def _standard_input(screen: Screen) -> str:
    if sys.stdin.isatty():
        screen.notice("reading the prompt from the terminal; end it with Ctrl-D on a line of its own")
    return decoded(sys.stdin.buffer.read(), "standard input")


def _summary(report: dict[str, Any]) -> str:
    seconds = report["generate_s"]
    rate = f" ({len(report['token_ids']) / seconds:,.1f} tokens/s)" if seconds else ""
    return "\n".join(
        (
            f"{report['model']}: numerics {report['numerics']}, cache rows {report['kv_format']}",
            f"generated {len(report['token_ids'])} tokens ({report['finish_reason']}); context "
            f"{report['context_tokens']} tokens; load {report['load_s']} s, generation {seconds} s{rate}",
            f"KV cache: {report['kv_bytes_per_token']:,.2f} bytes per token of history, "
            f"{report['kv_bytes']:,} bytes for this sequence with its windows and tails",
        )
    )
