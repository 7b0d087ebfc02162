"""The command `pyrosome`: one file per command."""

from __future__ import annotations

import sys

import typer

from pyrosome import __version__, log
from pyrosome.cli.run import run
from pyrosome.errors import PyrosomeError

app = typer.Typer(help="An engine for DeepSeek-V4-Flash.", no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(run)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyrosome {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it.")) -> None:
    log.configure()


def main() -> None:
    """Entry point: an error of this package is a message and exit status 2, never a traceback."""
    try:
        app()
    except PyrosomeError as error:
        typer.echo(f"pyrosome: {error}", err=True)
        sys.exit(2)
