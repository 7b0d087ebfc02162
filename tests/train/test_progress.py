"""Progress: a panel at a terminal, lines elsewhere."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from pyrosome.train.progress import Progress, spoken
from pyrosome.train.recipe import Recipe

RECIPE = Recipe.load("smoke")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(terminal: bool = False, **kwargs) -> Progress:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    return Progress(RECIPE, console, clock=Clock(), **kwargs)


def said(progress: Progress) -> list[str]:
    return progress.console.file.getvalue().splitlines()


def row(step: int, **changes) -> dict:
    return {"step": step, "tokens": 1000 * step, "stage": 0, "loss": 4.0, "tokens_per_s": 500.0, **changes}


def test_a_line_every_so_often_where_there_is_no_terminal():
    progress = made(every_s=10)
    with progress:
        for step in range(1, 31):
            progress.clock.now = float(step)
            progress.update(row(step))
    lines = said(progress)
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["1", "11", "21"]
    assert lines[1] == (
        "stage 1 of 3, dense | step 11 | 11,000 of 30,000 tokens | loss 4.000 | 500 tokens/s | "
        "stage ends in 38 s at most"
    )


def test_a_long_line_is_not_broken():
    progress = made()
    progress.update(row(1, accuracy={f"kind{i}": 0.5 for i in range(30)}))
    (line,) = said(progress)
    assert line.count("50%") == 30


def test_the_loss_is_smoothed_and_accuracy_stays():
    progress = made()
    progress.update(row(1, loss=4.0, accuracy={"records": 0.25, "copy": 0.5}))
    progress.update(row(2, loss=2.0, accuracy={"records": 0.75, "copy": None}))
    progress.update(row(3, loss=math.nan))
    progress.update(row(4, loss=None))
    parts = progress.parts()
    assert "loss 3.900" in parts and "records 75%" in parts and "copy 50%" in parts


def test_stages_by_number_and_by_name():
    progress = made()
    progress.update(row(30))
    for stage in (1, "warmup"):
        progress.update(row(31, stage=stage))
        assert progress.parts()[:3] == ["stage 2 of 3, warmup", "step 31", "0 of 10,000 tokens"]
    progress.update(row(33, stage="warmup"))
    assert progress.parts()[2] == "2,000 of 10,000 tokens"
    progress.update(row(34, stage=9))
    assert progress.parts()[:3] == ["stage 9", "step 34", "34,000 tokens"]


def test_a_resumed_run_counts_the_stage_from_where_it_is_told():
    progress = made()
    progress.update(row(45, stage=2))
    assert progress.parts()[2] == "0 of 30,000 tokens"
    progress.update(row(45, stage=2, stage_tokens=5000))
    assert progress.parts()[2] == "5,000 of 30,000 tokens"


def test_the_time_left_is_bounded_by_the_whole_run():
    progress = made()
    progress.update(row(58, stage=2, stage_tokens=18_000))  # 12,000 tokens left of the stage, 2,000 of the run
    assert "stage ends in 4 s at most" in progress.parts()
    progress.update(row(70, stage=2, stage_tokens=31_000))
    assert "stage ends in 0 s at most" in progress.parts()


def test_notes_and_the_age_of_the_checkpoint():
    progress = made()
    progress.note("[bold]begin[/bold]")
    progress.update(row(2))
    progress.note("the gate was reached")
    progress.note("saved", checkpoint=True)
    progress.clock.now = 75.0
    assert progress.parts()[-1] == "saved 1 min 15 s ago"
    lines = said(progress)
    assert lines[0] == "[bold]begin[/bold]" and lines[2:] == ["step 2: the gate was reached", "step 2: saved"]


def test_before_the_first_step():
    assert made().parts() == ["starting"]


def test_a_panel_at_a_terminal():
    progress = made(terminal=True)
    with progress:
        progress.update(row(1))
        progress.note("the gate was reached")
        progress.note("saved", checkpoint=True)
        progress._live.refresh()
    text = progress.console.file.getvalue()
    assert "training smoke" in text and "stage 1 of 3, dense" in text and "step 1: the gate was reached" in text
    assert "step 1: saved" not in text and "saved 0 s ago" in text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor came back


def test_an_error_inside_gives_the_terminal_back():
    progress = made(terminal=True)
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert progress._live is None and "\x1b[?25h" in progress.console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7830, "2 h 10 min"),
    ],
)
def test_lengths_of_time(seconds, text):
    assert spoken(seconds) == text
