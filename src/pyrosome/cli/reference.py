"""The reference of commands and environment, made from the commands themselves.

    python -m pyrosome.cli.reference docs/reference.md

A test fails while the file in docs differs from what this makes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from pyrosome import env
from pyrosome.cli import app
from pyrosome.cli.chat import COMMANDS
from pyrosome.cli.history import MAX_LINES
from pyrosome.cli.terminal import EXIT_CODES

_CONVENTIONS = (
    ("NO_COLOR", "set and not empty: no colour, no dimming, no other escape sequence"),
    ("TERM", "`dumb` or unset: the same"),
    (
        "XDG_STATE_HOME",
        f"`chat` keeps the last {MAX_LINES:,} typed lines in `pyrosome/history` there (else ~/.local/state)",
    ),
    ("XDG_DATA_HOME", "`pull` puts checkpoints into `pyrosome/models` there (else ~/.local/share)"),
    ("HF_ENDPOINT, HF_TOKEN", "`pull` asks that hub or mirror, with that token"),
    ("HF_HUB_OFFLINE", "1: as `PYROSOME_OFFLINE`"),
)


def reference() -> str:
    """The whole page, in Markdown."""
    return "\n".join(_page()) + "\n"


def _each(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, those of groups under both names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _each(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _page() -> Iterator[str]:
    root: Any = typer.main.get_command(app)
    yield "# Reference"
    yield ""
    yield "Made by `python -m pyrosome.cli.reference docs/reference.md`; change the commands, not this page."
    yield ""
    yield "## Commands"
    yield ""
    yield "`pyrosome --install-completion` installs completion for the shell in use; `pyrosome --version` prints the"
    yield "version; `pyrosome --offline COMMAND` opens no connection to another machine. Answers go to standard output"
    yield "and all else to standard error. On a terminal, control characters that a model wrote are shown as `·`; into"
    yield "a file or a pipe its text goes unchanged."
    for name, command in _each(root):
        yield from _command(name, command)
    yield ""
    yield "## What can be typed in `pyrosome chat`"
    yield ""
    yield "A line that ends in a backslash goes on in the next. Piped in, the whole input is one message, and no line"
    yield "of it is a command."
    yield ""
    yield from _table(("typed", "does"), [(f"`{c.usage}`".replace("|", "\\|"), c.help) for c in COMMANDS.values()])
    yield ""
    yield "## Exit status"
    yield ""
    yield from _table(("status", "means"), [(str(code), text) for code, text in EXIT_CODES.items()])
    yield ""
    yield "## Environment"
    yield ""
    yield "Variables of this package are diagnostics: what a user wants is an option."
    yield ""
    yield from _table(("variable", "default", "does"), [(f"`{v.name}`", f"`{v.default}`", v.meaning) for v in env.ALL])
    yield ""
    yield "Conventions that are kept:"
    yield ""
    yield from _table(("variable", "does"), [(f"`{name}`", text) for name, text in _CONVENTIONS])


def _command(name: str, command: Any) -> Iterator[str]:
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    usage = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)
    yield ""
    yield f"### `pyrosome {name} {usage} [OPTIONS]`".replace("  ", " ")
    yield ""
    yield " ".join(command.help.split())
    yield ""
    yield from _table(("argument or option", "default", "is"), [_parameter(p) for p in shown])


def _parameter(p: Any) -> tuple[str, str, str]:
    if p.param_type_name == "argument":
        title = f"`{p.name.upper()}`"
    else:
        title = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
    told = p.show_default if isinstance(p.show_default, str) else p.default
    default = "" if told is None or told is False else f"`{told}`"
    return title, "needed" if p.required else default, p.help or ""


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
