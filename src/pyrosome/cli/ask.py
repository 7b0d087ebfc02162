"""`pyrosome ask`: a question about a document, and where in the document the indexer looked for the answer."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.chat import BUILTIN_TOKENS, MODES, Answer
from pyrosome.cli.document import SHIPPED, Document, Located
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
from pyrosome.cli.first_contact import BUILTIN, MODEL_HELP
from pyrosome.cli.terminal import INTERRUPTED, Screen, Stop, loading
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.options import SamplingParams

if TYPE_CHECKING:
    from pyrosome.chat.prompt import Prompt
    from pyrosome.llm import LLM

PLACES = 3  # that are told
_QUESTION_TOKENS = 64  # the last of a prompt, whose looks count
_BYTES_PER_TOKEN = 64  # more than any text has on average: a longer document is refused before it is encoded


def ask(
    document: Annotated[str, typer.Argument(help=f"A text file, - for standard input, or {', '.join(SHIPPED)}.")],
    question: Annotated[str, typer.Argument(help="What is asked; it follows the document on a line of its own.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = BUILTIN,
    think: Annotated[str, typer.Option(help=f"How much to think first: {', '.join(MODES)}.")] = "off",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the answer at most, thoughts included; by default the mode's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set with this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    join_lines: Annotated[
        bool | None,
        typer.Option(
            "--join-lines/--keep-lines",
            help="Put one space in place of line breaks and other white space, or leave the document as it is.",
            show_default="joined where the document is built in",
        ),
    ] = None,
    looked: Annotated[
        bool,
        typer.Option(
            "--looked/--no-looked",
            help="Say where in the document the indexer looked; the prompt is computed once more for that.",
        ),
    ] = True,
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
    """Ask a model about a document, and see where in it the indexer looked.

    The answer goes to standard output, all else to standard error.  Tokens and lines of the document count from 1.
    Ctrl-C ends the answer with what there is.
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if model == BUILTIN and max_tokens is None:
        given["max_tokens"] = BUILTIN_TOKENS
    given = {k: v for k, v in given.items() if v is not None}
    SamplingParams(**given)  # type: ignore[arg-type]  # what is out of range is refused before the load
    if think not in MODES:
        raise RequestError(f"{think!r} is no way of thinking; there are {', '.join(MODES)}")
    if not question.strip():
        raise RequestError("the question is empty; say after the document what is asked about it")
    options = engine_options(cache_gib, drafter, log_every, trace)
    held = load_options(experts, lock_memory, numa, device)
    screen = Screen()
    if document == "-" and sys.stdin.isatty():
        screen.notice("reading the document from the terminal; end it with Ctrl-D on a line of its own")
    read = Document.read(document, join_lines)
    from pyrosome.llm import LLM  # torch is loaded only now: `--help` stays quick

    with loading(screen) as progress:
        llm = LLM(model, numerics=numerics, kv_format=kv_format, options=options, progress=progress, **held)
    with llm:  # its end writes the trace
        prompt, located = _asked(llm, read, question, think)
        report: dict[str, Any] = {
            "model": model,
            "numerics": llm.model.numerics,
            "kv_format": llm.model.kv_format,
            "document": read.name,
            "document_tokens": len(located.tokens),
            "thinking": think,
        }
        report |= _answer(llm, prompt, given, None if as_json else screen)
        llm.close()  # the cache it had is free for the one that looks
        is_whole = report["finish_reason"] != "interrupted"
        if looked and is_whole:
            try:
                report |= _looked(llm, prompt, located)
            except KeyboardInterrupt:
                is_whole = False
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        screen.notice(_summary(report))
    if not is_whole:
        raise typer.Exit(INTERRUPTED)


def _asked(llm: LLM, document: Document, question: str, think: str) -> tuple[Prompt, Located]:
    """The prompt, and where the document stands in it.

    Raises:
        RequestError, ContextTooLong: the document alone is longer than the model's context.
    """
    most, num_bytes = llm.model.config.max_position_embeddings, len(document.text.encode())
    if num_bytes > most * _BYTES_PER_TOKEN:
        raise RequestError(
            f"{document.name} has {num_bytes:,} bytes, too long for a context of {most:,} tokens; ask about a part of "
            "it"
        )
    num_tokens = len(llm.tokenizer.encode(document.text))
    if num_tokens >= most:
        raise ContextTooLong(num_tokens, most, f"ask about a part of {document.name}")
    content = f"{document.text}\n{question.encode('utf-8', 'replace').decode()}"
    prompt = llm.chat_template.conversation([{"role": "user", "content": content}], think)
    before = prompt.text.rindex(content)  # whatever the template says before it, it is the last to say it
    return prompt, Located(document, prompt.text, before, prompt.ids, llm.tokenizer.token_bytes)


def _answer(llm: LLM, prompt: Prompt, given: dict[str, Any], screen: Screen | None) -> dict[str, Any]:
    """Show the answer as it comes; what was said, and how long it took."""
    limit = min(prompt.max_tokens, max(1, llm.model.config.max_position_embeddings - len(prompt.ids)))
    request = llm.request(prompt, prompt.sampling_params(**{"max_tokens": limit, **given}))
    _ = llm.engine  # made now: that is no part of the time to the first token
    answer = Answer(screen, folded=False)
    times: list[float] = []
    began = time.perf_counter()
    try:
        with Stop() as stop:
            stream = llm.answer(prompt, request)
            for event in stream:
                times.append(time.perf_counter() - began)
                answer.take(event)
                if stop.asked:
                    stream.close()  # type: ignore[attr-defined]
                    break
    except KeyboardInterrupt:  # the second one: it was the step that took long
        pass
    except ContextTooLong as error:
        hint = "ask about a part of the document, or give the cache more memory with --cache-gib"
        raise ContextTooLong(error.asked_tokens, error.max_tokens, hint) from None
    finally:
        answer.end()
    return {**answer.report(), "prompt_tokens": len(prompt.ids), **_rates(llm, prompt, answer, times)}


def _rates(llm: LLM, prompt: Prompt, answer: Answer, times: list[float]) -> dict[str, Any]:
    """What the times of events, in seconds since the request, say of prompt and answer; null where nothing does."""
    said = answer.usage.get("completion_tokens")
    if said is None:  # its end did not come
        said = len(llm.tokenizer.encode(answer.reasoning + answer.content))
    later = max(0, said - (answer.finish_reason != "stop"))  # after the first; one more was the end of the sentence
    first, rest = (times[0], times[-1] - times[0]) if times else (None, 0.0)
    computed = len(prompt.ids) - answer.usage.get("cached_tokens", 0)
    return {
        "first_token_s": None if first is None else round(first, 3),
        "prefill_tokens_per_s": round(computed / first, 1) if first else None,
        "decode_tokens": later,
        "decode_s": round(rest, 3),
        "decode_tokens_per_s": round(later / rest, 1) if later and rest > 1e-4 else None,
    }


def _looked(llm: LLM, prompt: Prompt, located: Located) -> dict[str, Any]:
    """The places of the document that the indexers ranked highest for the tokens after it."""
    from pyrosome.engine.looks import csa_layers, looks, places

    inside, num_last = located.tokens, min(_QUESTION_TOKENS, len(prompt.ids) - located.tokens.stop)
    layers = csa_layers(llm.model)
    found = places(looks(llm.model, prompt.ids, num_last), inside)[:PLACES] if layers else []
    told = []
    for place in found:
        told.append(
            {
                "tokens": [place.first - inside.start + 1, place.last - inside.start + 1],
                "lines": list(located.lines(place.first, place.last)),
                "text": located.excerpt(place.first, place.last),
                "first_in_layers": len(place.layers),
                "first_for": len(place.firsts),
                "score": round(place.score, 4),
            }
        )
    about = {"indexers": len(layers), "asked_by": len(layers) * num_last, "topk": llm.model.config.index_topk}
    return {"looked": told, **about}


def _summary(report: dict[str, Any]) -> str:
    first, rate, later = (report[k] for k in ("first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"))
    read = "no token came" if first is None else f"first token after {first:,.3f} s"
    read += f" ({rate:,.0f} tokens/s)" if rate else ""
    count = report["decode_tokens"]
    then = f"; {_number(count, 'token')} more in {report['decode_s']:,.3f} s" if count else ""
    then += f" ({later:,.0f} tokens/s)" if later else ""
    lines = [
        f"{report['model']}: numerics {report['numerics']}, cache rows {report['kv_format']}",
        f"{report['document']}: {_number(report['document_tokens'], 'token')}, {report['prompt_tokens']:,} with the "
        f"question; {read}{then} ({report['finish_reason']})",
    ]
    if "looked" in report:
        lines += _told(report)
    return "\n".join(lines)


def _told(report: dict[str, Any]) -> list[str]:
    layers = report["indexers"]
    if not layers:
        return ["This model has no indexer, so there is nothing it looked for."]
    if not report["looked"]:
        return ["No compressed row reaches into a document so short, so no indexer looked there."]
    lines = [
        f"Where in the document the indexers of {_number(layers, 'layer')} looked, for the last "
        f"{_number(report['asked_by'] // layers, 'token')} of the prompt:"
    ]
    for place in report["looked"]:
        (a, b), (from_line, to_line) = place["tokens"], place["lines"]
        line = f"line {from_line:,}" if from_line == to_line else f"lines {from_line:,}-{to_line:,}"
        by = f"{place['first_in_layers']} of {_number(layers, 'layer')}"
        times = f", {place['first_for']} of {_number(report['asked_by'], 'time')}" if place["first_for"] else ""
        lines.append(f"    tokens {a:,}-{b:,}, {line}, ranked first by {by}{times}:")
        lines.append(f"        {place['text']}")
    return lines


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
