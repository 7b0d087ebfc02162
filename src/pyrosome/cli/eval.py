"""`pyrosome eval recall|text|modes|tools`: what a model can do, on held-out samples, with intervals."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrosome.cli.first_contact import MODEL_HELP
from pyrosome.cli.terminal import INTERRUPTED, Screen, Stop, can_style, loading
from pyrosome.errors import RequestError
from pyrosome.evals.watch import Watch

if TYPE_CHECKING:
    from pyrosome.evals.report import Report
    from pyrosome.evals.subject import Subject

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Num = Annotated[int, typer.Option("--n", "-n", min=1, help="Questions, or passages of text.")]
Seed = Annotated[int, typer.Option(help="Same seed, same questions.")]
Numerics = Annotated[str, typer.Option(help="trained or exact.")]
KVFormat = Annotated[str | None, typer.Option(help="Stored cache rows: f32, bf16 or fp8.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Append the results to this file, as one line of JSON.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most, thoughts included.")]


def recall(
    model: Model,
    context: Annotated[str, typer.Option(help="Tokens of a prompt, about; several with commas.")] = "256,1024,8192",
    facts: Annotated[int, typer.Option(min=1, help="Facts in a document, of which one is asked.")] = 8,
    n: Num = 256,
    kind: Annotated[str, typer.Option(help="ledger (in the chat encoding) or records (plain text).")] = "ledger",
    ablation: Annotated[
        str,
        typer.Option(
            help="Compressed rows that are read: none (as the model does), dense (all), half (of the top-k), random "
            "(as many, drawn), window (no row at all); several with commas."
        ),
    ] = "none",
    numerics: Numerics = "trained",
    kv_format: KVFormat = None,
    against: Annotated[str | None, typer.Option(help="Another model, asked the same; differences are paired.")] = None,
    against_numerics: Annotated[str | None, typer.Option(help="Its numerics.", show_default="as --numerics")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Ask for facts far back in a document, each once, by length and distance.

    Shares have Wilson's 95 % interval.  Ctrl-C ends it with the figures of what was asked until then.
    """
    from pyrosome.evals import recall as evals
    from pyrosome.evals.report import about, report

    if against is None and against_numerics is not None:
        raise RequestError("--against-numerics was given without --against; name the other model")
    contexts = tuple(_integer("--context", part) for part in _parts("--context", context))
    task = evals.RecallTask(contexts, facts, n, kind, _parts("--ablation", ablation), seed)
    with _run(as_json, out) as (screen, watch, tell):
        with _opened(model, numerics, kv_format, screen) as subject:
            samples = evals.draw(subject, task)
            runs = evals.measure(subject, task, samples, watch)
            results = [evals.summary(r, subject.model.config.sliding_window) for r in runs]
            rest: dict[str, Any] = {"kind": kind, "facts": facts, "n": n, "results": results}
            rest["over_none"] = evals.over_none(runs)
            found = report("recall", subject, model, _command(), seed, **rest)
        if against is not None and not watch.stopped:
            with _opened(against, against_numerics or numerics, kv_format, screen) as subject:
                others = evals.measure(subject, task, samples, watch)
                results = [evals.summary(r, subject.model.config.sliding_window) for r in others]
                found["against"] = {
                    **about(subject, against), "results": results, "differences": evals.compared(runs, others),
                }  # fmt: skip
        tell(found)


def text(
    model: Model,
    n: Num = 256,
    chars: Annotated[int, typer.Option(min=16, help="Characters of a passage.")] = 1024,
    train_chars: Annotated[int, typer.Option(min=1, help="Characters that n-gram models are counted on.")] = 4_000_000,
    numerics: Numerics = "trained",
    kv_format: KVFormat = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Predict held-out passages of installed documents, beside a unigram and a 5-gram model.

    Errors are standard errors over documents.
    """
    from pyrosome.evals.report import report
    from pyrosome.evals.text import text

    with _run(as_json, out) as (screen, watch, tell), _opened(model, numerics, kv_format, screen) as subject:
        figures = text(subject, n, seed, chars, train_chars, watch=watch)
        tell(report("text", subject, model, _command(), seed, **figures))


def modes(
    model: Model,
    n: Num = 256,
    thinking: Annotated[str, typer.Option(help="Modes to ask in, with commas.")] = "off,high,max",
    terms: Annotated[int, typer.Option(min=2, max=8, help="Numbers in a sum.")] = 2,
    max_tokens: MaxTokens = 128,
    numerics: Numerics = "trained",
    kv_format: KVFormat = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Ask held-out sums in each thinking mode: how often right, by what margin, with how many thoughts."""
    from pyrosome.evals.modes import modes
    from pyrosome.evals.report import report

    asked = _parts("--thinking", thinking)
    with _run(as_json, out) as (screen, watch, tell), _opened(model, numerics, kv_format, screen) as subject:
        figures = modes(subject, n, seed, asked, max_tokens, watch, terms)
        tell(report("modes", subject, model, _command(), seed, n=n, terms=terms, **figures))


def tools(
    model: Model,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Look-ups, and as many questions without.")] = 192,
    thinking: Annotated[str, typer.Option(help="off, high or max.")] = "off",
    max_tokens: MaxTokens = 128,
    numerics: Numerics = "trained",
    kv_format: KVFormat = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Ask what needs the tool and what does not, freely and under the grammar of the tool."""
    from pyrosome.evals.report import report
    from pyrosome.evals.tools import tools

    with _run(as_json, out) as (screen, watch, tell), _opened(model, numerics, kv_format, screen) as subject:
        figures = tools(subject, n, seed, thinking, max_tokens, watch)
        tell(report("tools", subject, model, _command(), seed, n=n, **figures))


def plot(
    results: Annotated[Path, typer.Argument(help="A file written by --out.")],
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
) -> None:
    """Draw recall by context from results."""
    from pyrosome.evals.plot import plot
    from pyrosome.evals.report import read

    plot(read(results), picture)


def _parts(flag: str, given: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(p.strip() for p in given.split(",")))
    if not all(parts):
        raise RequestError(f"{flag} is {given!r}; give one or several, with commas between them")
    return parts


def _integer(flag: str, given: str) -> int:
    if not given.isascii() or not given.isdecimal():
        raise RequestError(f"{flag} is {given!r}; a whole number of tokens was expected")
    return int(given)


def _command() -> str:
    return shlex.join(["pyrosome", *sys.argv[1:]])


@contextmanager
def _opened(model: str, numerics: str, kv_format: str | None, screen: Screen) -> Iterator[Subject]:
    from pyrosome.evals.subject import Subject

    with loading(screen) as progress:
        subject = Subject(model, numerics=numerics, kv_format=kv_format, progress=progress)
    with subject:
        yield subject


@contextmanager
def _run(as_json: bool, out: Path | None) -> Iterator[tuple[Screen, Watch, Callable[[Report], None]]]:
    """Where to write, what watches, and what tells the report; exit status 130 where Ctrl-C ended it early."""
    from pyrosome.evals import report

    screen = Screen()
    if out is not None:
        report.check_out(out)

    def tell(found: Report) -> None:
        bar.close()
        found["interrupted"] = bar.stopped
        if out is not None:
            report.append(out, found)
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
        else:
            _print(report.tables(found), screen)

    with Stop() as stop:
        bar = _Bar(screen, stop)
        try:
            yield screen, bar, tell
        finally:
            bar.close()
    if bar.stopped:
        screen.notice("stopped: the figures are of what was asked until then")
        raise typer.Exit(INTERRUPTED)


class _Bar(Watch):
    """A bar on standard error, where that is a terminal; Ctrl-C stops it."""

    def __init__(self, screen: Screen, stop: Stop) -> None:
        self._screen, self._stop, self._broke_off = screen, stop, False
        self._progress: Any = None
        self._task: Any = None

    @property
    def stopped(self) -> bool:
        return self._stop.asked or self._broke_off

    @stopped.setter
    def stopped(self, value: bool) -> None:
        self._broke_off = value

    def begin(self, what: str, total: int) -> None:
        if not self._screen.err_is_terminal:
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._screen.err, no_color=not can_style()),
                transient=True,
            )
            self._progress.start()
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def _print(found: list[Any], screen: Screen) -> None:
    from pyrosome.cli.tables import console, heading, table

    out = console(screen)
    for one in found:
        if one.rows:
            heading(out, one.heading)
            table(out, one.titles, one.rows, left=one.left)
