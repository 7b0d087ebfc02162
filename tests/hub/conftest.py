"""A small checkpoint on a hub of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyrosome.testing.shapes import tiny
from tests.checkpoint.files import DATA, random_checkpoint
from tests.hub.server import LoopHub, loop_hub

REPO = "tests/tiny"


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """What the hub has: a checkpoint of three shards, and what else such repositories hold."""
    path = tmp_path_factory.mktemp("source") / "tiny"
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


@pytest.fixture
def hub(source: Path):
    with loop_hub(source) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_token(monkeypatch, tmp_path) -> None:
    """No token, variable or file of whoever runs the tests has a say."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "PYROSOME_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def shards(files: Path) -> list[str]:
    return sorted(p.name for p in files.glob("*.safetensors"))


def same_files(source: Path, target: Path, names: list[str]) -> bool:
    return all((source / n).read_bytes() == (target / n).read_bytes() for n in names)


__all__ = ["REPO", "LoopHub", "same_files", "shards"]
