"""How a run is going: a panel that stays in place at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

if TYPE_CHECKING:
    from pyrosome.train.recipe import Recipe

LINE_SECONDS = 30.0  # between lines where the output is not a terminal
_SMOOTHED_OVER = 20  # steps


class Progress:
    """Shows the rows of a run's curves as they come; a context manager.

        with Progress(recipe, console) as progress:
            progress.update(row)
            progress.note("stage 2 of 3, sparse: the gate was reached")

    Args:
        console: where to; its `is_terminal` decides between panel and lines.
        every_s: seconds between lines, where lines are written.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        recipe: Recipe,
        console: Console,
        *,
        every_s: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.recipe, self.console, self.every_s, self.clock = recipe, console, every_s, clock
        self._row: dict[str, Any] = {}
        self._accuracy: dict[str, float] = {}
        self._loss: float | None = None
        self._rate: float | None = None  # tokens per second
        self._stage_began = 0  # tokens of the run when its stage began, as far as it was seen
        self._checkpoint_at: float | None = None
        self._line_at = -float("inf")
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._panel, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Take in one step's row of the curves.

        "stage" is the stage's number or name.  "stage_tokens", where the row has it, counts the tokens trained in the
        stage; without it they are counted from the first row of the stage that came here.
        """
        began, self._row = self._row.get("stage", 0), dict(row)
        if row.get("stage") != began:
            self._stage_began = row.get("tokens", 0)
        self._loss = _blend(self._loss, row.get("loss"))
        self._rate = _blend(self._rate, row.get("tokens_per_s"))
        self._accuracy |= {k: share for k, share in (row.get("accuracy") or {}).items() if share is not None}
        if self._live is None and self.clock() - self._line_at >= self.every_s:
            self._line_at = self.clock()
            self._say(" | ".join(self.parts()))

    def note(self, text: str, *, checkpoint: bool = False) -> None:
        """Say that something happened: a gate reached, another stage, a spike.

        With `checkpoint` the state was saved: its age is shown from now on, and it is not worth a line at a terminal.
        """
        if checkpoint:
            self._checkpoint_at = self.clock()
        if not (checkpoint and self._live):
            self._say(f"step {self._row['step']:,}: {text}" if "step" in self._row else text)

    def parts(self) -> list[str]:
        """What is known, one short phrase each."""
        row, number = self._row, self._stage_number()
        if not row:
            return ["starting"]
        out = [f"stage {self._stage_name(number)}", f"step {row['step']:,}", self._tokens(number)]
        if self._loss is not None:
            out.append(f"loss {self._loss:.3f}")
        out += [f"{kind} {share:.0%}" for kind, share in self._accuracy.items()]
        if self._rate:
            out.append(f"{self._rate:,.0f} tokens/s")
            if number is not None:
                out.append(f"stage ends in {spoken(self._left(number) / self._rate)} at most")
        if self._checkpoint_at is not None:
            out.append(f"saved {spoken(self.clock() - self._checkpoint_at)} ago")
        return out

    def _stage_number(self) -> int | None:
        stage, stages = self._row.get("stage"), self.recipe.stages
        if isinstance(stage, int):
            return stage if stage < len(stages) else None
        return next((i for i, s in enumerate(stages) if s.name == stage), None)

    def _stage_name(self, number: int | None) -> str:
        if number is None:
            return str(self._row.get("stage"))
        return f"{number + 1} of {len(self.recipe.stages)}, {self.recipe.stages[number].name}"

    def _stage_tokens(self) -> int:
        return int(self._row.get("stage_tokens", self._row.get("tokens", 0) - self._stage_began))

    def _tokens(self, number: int | None) -> str:
        if number is None:
            return f"{self._row.get('tokens', 0):,} tokens"
        return f"{self._stage_tokens():,} of {self.recipe.stages[number].max_tokens:,} tokens"

    def _left(self, number: int) -> int:
        """Tokens to the stage's end, or to the run's, which may come before it."""
        of_stage = self.recipe.stages[number].max_tokens - self._stage_tokens()
        return max(0, min(of_stage, self.recipe.run.max_tokens - self._row.get("tokens", 0)))

    def _panel(self) -> Panel:
        return Panel(Text("  ".join(self.parts())), title=Text(f"training {self.recipe.name}"), title_align="left")

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=not self.console.is_terminal)


def spoken(seconds: float) -> str:
    """A length of time in the two largest of its units: "45 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _blend(before: float | None, now: float | None) -> float | None:
    """A running mean: the first value, then each new one a little."""
    if now is None or not math.isfinite(now):
        return before
    if before is None:
        return now
    return before + (now - before) / _SMOOTHED_OVER
