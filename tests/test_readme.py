"""What the documents say is run: their Python, their commands, their links."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyrosome.cache.streams import plan_cache
from pyrosome.checkpoint.names import official_bytes
from pyrosome.config import ModelConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_two_commands_are_targets_of_the_makefile():
    commands = re.findall(r"^\$ make (\w+)", README, re.MULTILINE)
    assert commands == ["run", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{c}: \$\(READY\)", makefile, re.MULTILINE) for c in commands)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_make_run_prints_what_the_readme_shows():
    recipe = re.search(r"^run:.*\n\t(.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe and shlex.split(recipe[1])[0] == "$(BIN)/pyrosome"
    command = [sys.executable, "-m", "pyrosome", *shlex.split(recipe[1])[1:]]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    shown = re.search(r"<!-- output: pyrosome run -->\n```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    for line in shown.splitlines():
        settled = re.sub(r"[\d.,]+ s\b|[\d.,]+ tokens/s", "TIME", line)
        assert settled in re.sub(r"[\d.,]+ s\b|[\d.,]+ tokens/s", "TIME", said)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^\| `pyrosome (\w+)", README, re.MULTILINE))))
def test_every_command_named_exists(command):
    done = subprocess.run([sys.executable, "-m", "pyrosome", command, "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_sizes_named_are_the_inventory_s():
    flash, later = ModelConfig.preset("flash"), ModelConfig.preset("flash-0731")
    assert f"{official_bytes(flash, 1) / 1e9:.1f} GB" in README
    assert f"{official_bytes(later, 3) / 1e9:.1f} GB" in README
    for tokens in (131_072, 1_048_576):
        assert f"{plan_cache(flash, 'fp8', 1, tokens).sequence_bytes(tokens) / 1e9:.2f} GB" in README


def test_the_figures_beside_transformers_are_the_last_record_s():
    lines = (ROOT / "bench" / "results" / "peers.jsonl").read_text(encoding="utf-8").splitlines()
    record = [r for r in map(json.loads, lines) if r["shape"] == "small"][-1]
    rows = re.findall(
        r"^\| ((?:prefill|decode)[^|]*\)) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.]+) \|$", README, re.MULTILINE
    )
    assert len(rows) >= 4
    for name, ours, theirs, ratio in rows:
        assert (ours, theirs) == (f"{record['ours'][name]:,.1f}", f"{record['theirs'][name]:,.1f}")
        assert ratio == f"{record['ours'][name] / record['theirs'][name]:.2f}"
    assert f"| pyrosome | {record['their_engine']} |" in README
