"""A small checkpoint, and what else its repository holds."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from pyrosome.checkpoint.index import INDEX_NAME
from pyrosome.hub.pull import Offer, prepare, take
from pyrosome.hub.remote import Hub
from pyrosome.testing.shapes import tiny
from tests.checkpoint.files import DATA, random_checkpoint
from tests.hub.server import LoopHub

REPO = "tests/tiny"
WAITS = (0.0, 0.0, 0.0)
NEEDED = ["LICENSE", "config.json", "encoding/cases.json", "generation_config.json", INDEX_NAME, "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip


def make_source(path: Path) -> Path:
    """What a hub has: a checkpoint of three shards, texts beside it, and programs that nobody should fetch."""
    random_checkpoint(path, tiny(), 1, 3)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DATA / "tokenizer" / name, path / name)
    (path / "encoding").mkdir()
    (path / "encoding" / "cases.json").write_text("[]")
    (path / "encoding" / "encode.py").write_text("raise SystemExit('a program of a stranger ran')")
    (path / "modeling.py").write_text("raise SystemExit('a program of a stranger ran')")
    (path / "empty.json").write_text("")
    (path / "LICENSE").write_text("MIT")
    return path


def shards(files: Path) -> list[str]:
    return sorted(p.name for p in files.glob("*.safetensors"))


def same_files(source: Path, target: Path, names: list[str]) -> bool:
    return all((source / n).read_bytes() == (target / n).read_bytes() for n in names)


def asker(server: LoopHub, **kwargs) -> Hub:
    return Hub(REPO, server.url, waits_s=WAITS, **{"silence_s": 5.0, **kwargs})


def pulled(server: LoopHub, directory: Path, revision: str = "main", **kwargs) -> tuple[Offer, Counter]:
    """Pull; returns what was offered, and the bytes that were checked, fetched and dropped."""
    hub, heard = asker(server, **kwargs), Counter()
    offer = prepare(hub, revision, directory)
    take(hub, offer, lambda what, n: heard.update({what: n}))
    return offer, heard
