"""How the command starts: quickly, with help, with clear refusals, and as its reference says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyrosome import env
from pyrosome.cli import terminal
from pyrosome.cli.reference import reference
from tests.cli.sessions import REAL, ROOT, environment, piped

COMMANDS = ("run", "chat", "ask", "train", "eval", "data", "inspect", "doctor", "pull")
HEAVY = ("torch", "numpy", "safetensors", "tokenizers", "deepseek_recipe", "huggingface_hub", "pyrosome.llm")


@pytest.mark.parametrize("args", [("--help",), ("--version",), *((c, "--help") for c in COMMANDS)], ids=" ".join)
def test_help_and_version_import_nothing_heavy(tmp_path, args):
    code = f"""
import sys
from pyrosome.cli import main
try:
    main()
finally:
    print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, env=environment(tmp_path), text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command(tmp_path):
    shown = piped(tmp_path, "--help", program=REAL).stdout.decode()
    assert all(f" {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize(
    "args", [("run", "--nope"), ("nope",), ("inspect",), ("run", "--max-tokens", "many")], ids=" ".join
)
def test_bad_usage_is_status_2_without_a_traceback(tmp_path, args):
    done = piped(tmp_path, *args, program=REAL)
    assert (done.returncode, done.stdout) == (2, b"") and b"Traceback" not in done.stderr


def test_a_bad_log_level_is_named(tmp_path):
    done = piped(tmp_path, "inspect", "builtin:nano", program=REAL, PYROSOME_LOG="loud")
    assert done.returncode == 2 and done.stderr.startswith(b"pyrosome: PYROSOME_LOG is 'loud'")


def test_completion_is_offered(tmp_path):
    changes = {"_PYROSOME_COMPLETE": "complete_bash", "COMP_WORDS": "pyrosome ins", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'pyrosome'; from pyrosome.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(tmp_path, **changes))
    assert done.stdout.split() == [b"inspect"]


def test_output_in_an_encoding_that_lacks_a_character_is_no_error(tmp_path):
    done = piped(tmp_path, "run", "builtin:nano", "-p", "caf\u00e9 \u6df1\u6d77", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"You said: caf? ??\n")


def test_the_reference_in_docs_is_what_the_commands_say():
    committed = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert committed == reference(), "run: python -m pyrosome.cli.reference docs/reference.md"


def test_the_reference_has_every_command_option_status_and_variable():
    page = reference()
    assert all(f"### `pyrosome {command}" in page for command in COMMANDS)
    assert all(f"`{v.name}`" in page for v in env.ALL) and "`--kv-format`" in page and "`/fold`" in page
    assert all(f"| {code} |" in page for code in (0, 1, 2, 130, 141))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred", "·[31mred"),
        ("a\rb\r\nc", "ab\nc"),
        ("\x00\x07\x7f\x9b", "····"),
        ("\u202eevil\u2066", "·evil·"),
        ("深海 \u00a0é 👩\u200d🔬", "深海 \u00a0é 👩\u200d🔬"),
    ],
)
def test_control_characters_are_made_harmless_and_text_is_kept(text, shown):
    assert terminal.printable(text) == shown


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (1 << 40, "1,024.0 GiB")],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(num_bytes, shown):
    assert terminal.size(num_bytes) == shown
