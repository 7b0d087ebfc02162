"""Make the document that comes with the package: `python -m pyrosome.testing.make_ledger [FILE]`.

A ledger as the built-in model is trained on, in lines that a person can read; a fact never breaks across two.
All its facts are held out: no training sample has one of them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from pyrosome.tasks.document import FACT_WORDS, draw_facts, spread

SEED = 6
WORDS = 9500
FACTS = 24
WIDTH = 100
HOME = Path(__file__).parent.parent / "builtin" / "ledger.txt"


def facts() -> list[tuple[str, str]]:
    """The name and value of each fact, in the order in which they stand in the document."""
    return draw_facts(random.Random(SEED), FACTS, FACTS, heldout=True)


def ledger_text() -> str:
    """The document; the same text every time."""
    words, positions = spread(random.Random(SEED + 1), facts(), WORDS, lead=1)
    begins = set(positions)
    lines: list[str] = []
    line, at = "", 0
    while at < len(words):
        num = FACT_WORDS if at in begins else 1
        part = " ".join(words[at : at + num])
        if line and len(line) + 1 + len(part) > WIDTH:
            lines.append(line)
            line = ""
        line = f"{line} {part}" if line else part
        at += num
    return "\n".join([*lines, line]) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else HOME).write_text(ledger_text(), encoding="utf-8")
