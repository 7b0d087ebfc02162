"""A small checkpoint, and what else its repository holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from pyrosome.testing.shapes import tiny
from tests.checkpoint.files import DATA, random_checkpoint

REPO = "tests/tiny"


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
