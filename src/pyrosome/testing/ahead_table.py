"""The table of kernels in docs/kernels.md: who launches which variant of what, and what it takes of each architecture.

`ahead --table` writes it.  All but its figures is found by tracing, without compiling, which a test compares.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pyrosome.testing.ahead import CAPABILITIES, Compiled, launches, name_of
from pyrosome.testing.calls import Call, all_calls

BEGIN = "<!-- made by python -m pyrosome.testing.ahead --table docs/kernels.md -->"
END = "<!-- the end of what is made -->"
FIGURE = re.compile(r"\d+ / \d+(?: \(spills \d+\))?")
Row = tuple[str, str, str]  # kernel, variant, whose products


def traced(calls: Sequence[Call] | None = None) -> list[str]:
    """The lines of the table with a mark in place of each figure."""
    calls = list(all_calls()) if calls is None else calls
    cells: dict[Row, dict[int, str]] = {}
    titles: dict[Row, list[str]] = {}
    for capability in CAPABILITIES:
        for launch, made_by in launches(calls, capability):
            row = name_of(launch), launch.variant.name, launch.matrix
            cells.setdefault(row, {})[capability] = "figure"
            titles.setdefault(row, []).extend(made_by)
    return _lines(cells, titles, calls)


def filled(results: Iterable[Compiled], calls: Sequence[Call] | None = None) -> list[str]:
    """The lines of the table, of everything that was compiled."""
    most: dict[Row, dict[int, tuple[int, int, int]]] = {}
    titles: dict[Row, list[str]] = {}
    for r in results:
        row = r.kernel, r.variant, r.matrix
        there = most.setdefault(row, {}).get(r.capability, (0, 0, 0))
        registers, shared, stack = (max(pair) for pair in zip(there, (r.registers, r.shared, r.stack), strict=True))
        most[row][r.capability] = registers, shared, stack
        titles.setdefault(row, []).extend(r.calls)
    cells = {row: {c: _figure(*figures) for c, figures in held.items()} for row, held in most.items()}
    return _lines(cells, titles, list(all_calls()) if calls is None else calls)


def without_figures(lines: Iterable[str]) -> list[str]:
    """Lines as `traced` has them."""
    return [FIGURE.sub("figure", line) for line in lines]


def write(page: Path, lines: Sequence[str]) -> None:
    """Put the lines between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    before, _, after = _cut(page)
    version = importlib.metadata.version("triton")
    head = f"Compiled by Triton {version}, without a device; the most of a row's shapes.\n"
    page.write_text("\n".join([before + BEGIN, "", head, *lines, "", END + after]), encoding="utf-8")


def read(page: Path) -> list[str]:
    """The lines of the table in a page."""
    return [line for line in _cut(page)[1].splitlines() if line.startswith("|")]


def _cut(page: Path) -> tuple[str, str, str]:
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} has to have one line {BEGIN!r} and one {END!r}, which the table goes between")
    before, rest = text.split(BEGIN)
    made, after = rest.split(END)
    return before, made, after


def _lines(cells: Mapping[Row, Mapping[int, str]], titles: Mapping[Row, list[str]], calls: Sequence[Call]) -> list[str]:
    called = {call.title: call for call in calls}
    head = ["kernel", "variant", "products", *(f"sm_{c}" for c in CAPABILITIES), "launched by"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * len(CAPABILITIES)}---|"]
    made_by = {row: [called[title] for title in titles[row]] for row in cells}
    for row in sorted(
        cells, key=lambda row: (min(c.op.name for c in made_by[row]), min(c.rows for c in made_by[row]), row)
    ):
        kernel, variant, matrix = row
        figures = [cells[row].get(c, "-") for c in CAPABILITIES]
        by = ", ".join(_callers(made_by[row], calls))
        lines.append(f"| {' | '.join([f'`{kernel}`', variant, matrix or '-', *figures, by])} |")
    return lines


def _figure(registers: int, shared: int, stack: int) -> str:
    kib = shared / 1024
    return f"{registers} / {kib:.0f}" + (f" (spills {stack})" if stack else "")


def _callers(made: Sequence[Call], calls: Sequence[Call]) -> list[str]:
    """For each op in order: `linear` (wq_a; wq_b: M = 1 to 16), without names where it is all of its calls'."""
    found: dict[str, list[Call]] = {}
    for call in made:
        found.setdefault(call.op.name, []).append(call)
    return [f"`{op}` ({_names(of_op, calls)}{_rows(of_op)})" for op, of_op in sorted(found.items())]


def _names(made: Sequence[Call], calls: Sequence[Call]) -> str:
    names = {call.name for call in made}
    every = {call.name for call in calls if call.op.name == made[0].op.name}
    return "" if names == every else "; ".join(sorted(names)) + ": "


def _rows(made: Sequence[Call]) -> str:
    least, most = min(call.rows for call in made), max(call.rows for call in made)
    return f"M = {least}" if least == most else f"M = {least} to {most}"
