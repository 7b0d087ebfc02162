"""Tables and headings of `inspect` and `doctor`: plain columns, which survive being piped and pasted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyrosome.cli.terminal import Screen, can_style

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120  # characters, where nobody says how wide a line may be


def console(screen: Screen) -> Console:
    """Rich on standard output: as wide as the terminal, no marks, emoji or highlighting in what a file says."""
    from rich.console import Console

    return Console(
        file=screen.out,
        width=None if screen.out_is_terminal else PIPED_WIDTH,
        force_terminal=screen.styled,
        no_color=not can_style(),
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not screen.out_is_terminal,
    )


def heading(out: Console, text: str) -> None:
    """A title above what follows."""
    out.print(f"\n{text}", style="bold")


def table(out: Console, titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Columns, the first `left` of them flush left and the others flush right."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False, pad_edge=False)
    for i, title in enumerate(titles):
        grid.add_column(title, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    out.print(grid)
