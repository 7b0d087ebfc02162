"""`pyrosome data preview`: samples of a recipe as a network will see them, with what is learnt marked."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyrosome.cli.terminal import Screen, printable
from pyrosome.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from pyrosome.train.data import Samples
    from pyrosome.train.recipe import Mix, Recipe, Stage
    from pyrosome.train.samples import Encoded, Encoder

RECIPE_HELP = "A recipe's .toml file, or one of the package's: nano, nano-finish, tiny, smoke."
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Put a value in place of the recipe's: optimizer.muon_lr=0.01."),
]
_STYLES = {"answer": "bold green", "learnt": "green", "background": "dim"}

Segments = list[tuple[str, str]]


def preview(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    kind: Annotated[str | None, typer.Option(help="Only samples of this kind.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples of each source.")] = 1,
    stage: Annotated[str | None, typer.Option(help="Only this stage, by name or number from 0.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same samples.")] = 0,
    overrides: Set = None,
) -> None:
    """Show samples of a recipe's data with their token counts; what is learnt is marked.

    Bold is an answer that can be right or wrong, dim what counts little.  Without colours, what is learnt stands
    between « and ».
    """
    from pyrosome.cli.tables import console, heading
    from pyrosome.train.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    sources = chosen(loaded, stage, kind)
    loaded.check_samples()
    screen = Screen()
    out = console(screen)
    with samples_of(loaded) as samples:
        rng = random.Random(seed)
        for of_stage, mix in sources:
            for _ in range(n):
                encoded = samples.encoded(mix, rng, heldout=False)
                counts = f"{len(encoded.ids)} tokens, {num_learnt(encoded)} learnt, {sum(encoded.answer)} of answers"
                heading(out, f"{of_stage.name}: {mix.kind}, {counts}")
                show(out, segments(encoded, samples.encoder), screen.styled)


def chosen(recipe: Recipe, stage: str | None, kind: str | None) -> list[tuple[Stage, Mix]]:
    """The sources asked for, in the recipe's order.

    Raises:
        RequestError: there is no such stage, or no such kind in it.
    """
    names = [s.name for s in recipe.stages]
    stages = [s for i, s in enumerate(recipe.stages) if stage in (None, s.name, str(i))]
    if not stages:
        raise RequestError(f"stage {stage!r} was asked for; {recipe.name} has {', '.join(names)}")
    found = [(s, m) for s in stages for m in s.mix if kind in (None, m.kind)]
    if not found:
        there = dict.fromkeys(m.kind for s in stages for m in s.mix)
        raise RequestError(f"samples of kind {kind!r} were asked for; there are {', '.join(there)}")
    return found


@contextmanager
def samples_of(recipe: Recipe) -> Iterator[Samples]:
    """A recipe's samples, with a tokenizer made for them in a directory that goes away."""
    from pyrosome.train.data import Samples, tokenizer_for

    with tempfile.TemporaryDirectory(prefix="pyrosome-") as directory:
        yield Samples(recipe, tokenizer_for(recipe, Path(directory)))


def num_learnt(encoded: Encoded) -> int:
    """Tokens that count in full."""
    return sum(w >= 1 for w in encoded.weight)


def segments(encoded: Encoded, encoder: Encoder, keep: tuple[int, int] | None = None) -> Segments:
    """(text, "answer" | "learnt" | "background") of runs of tokens; `keep` (first, last) leaves the middle out."""
    marked = [
        (token, "answer" if is_answer else "learnt" if weight >= 1 else "background")
        for token, weight, is_answer in zip(encoded.ids, encoded.weight, encoded.answer, strict=True)
    ]
    if keep is None or len(marked) <= sum(keep):
        return list(_runs(marked, encoder))
    head, tail = marked[: keep[0]], marked[len(marked) - keep[1] :]
    return [*_runs(head, encoder), (" ... ", "background"), *_runs(tail, encoder)]


def _runs(marked: Sequence[tuple[int, str]], encoder: Encoder) -> Iterator[tuple[str, str]]:
    for of, run in itertools.groupby(marked, key=lambda m: m[1]):
        yield encoder.tokenizer.decode([token for token, _ in run]), of


def show(out: Console, parts: Segments, styled: bool) -> None:
    """Print a sample: in colours, or with « and » around what is learnt."""
    from rich.text import Text

    if styled:
        out.print(Text.assemble(*((printable(text), _STYLES[of]) for text, of in parts)))
        return
    out.print(Text(marked_text(parts)))


def marked_text(parts: Segments) -> str:
    """The text with « and » around what is learnt."""
    grouped = itertools.groupby(parts, key=lambda p: p[1] != "background")
    runs = ((is_learnt, "".join(text for text, _ in run)) for is_learnt, run in grouped)
    return "".join(f"«{text}»" if is_learnt else text for is_learnt, text in runs)
