"""The command `pyrosome`: one file per command."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from pyrosome import __version__, env, log
from pyrosome.cli import accounts, keys
from pyrosome.cli import eval as evaluations
from pyrosome.cli.ask import ask
from pyrosome.cli.calibrate import calibrate
from pyrosome.cli.chat import chat
from pyrosome.cli.data import preview
from pyrosome.cli.doctor import doctor
from pyrosome.cli.inspect import inspect
from pyrosome.cli.plan import plan
from pyrosome.cli.pull import pull
from pyrosome.cli.run import run
from pyrosome.cli.serve import serve
from pyrosome.cli.terminal import BAD_INPUT, READER_GONE, printable
from pyrosome.cli.train import train
from pyrosome.cli.verify import verify
from pyrosome.errors import PyrosomeError
from pyrosome.hub.offline import go_offline, is_offline

app = typer.Typer(help="An engine for DeepSeek-V4-Flash.", no_args_is_help=True, pretty_exceptions_enable=False)


_data = typer.Typer(help="Look at what a recipe trains on.", no_args_is_help=True)
_eval = typer.Typer(help="What a model can do, on held-out samples, with intervals.", no_args_is_help=True)
_keys = typer.Typer(help="Who may use a server: keys, accounts, limits, and what was used.", no_args_is_help=True)
_accounts = typer.Typer(help="Accounts, which keys belong to.", no_args_is_help=True)
_invites = typer.Typer(help="Codes with which strangers make themselves an account.", no_args_is_help=True)
app.add_typer(_data, name="data")
app.add_typer(_eval, name="eval")
app.add_typer(_keys, name="keys")
_keys.add_typer(_accounts, name="accounts")
_keys.add_typer(_invites, name="invite")


def _registered(command: Callable[..., Any], to: typer.Typer = app, name: str | None = None) -> None:
    """Add a command whose reader may go away, as `head` does, without a word."""

    @functools.wraps(command)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has nowhere else to go
            raise typer.Exit(READER_GONE) from None

    to.command(name)(quiet)


for _command in (run, chat, ask, serve, train, inspect, plan, calibrate, pull, doctor, verify):
    _registered(_command)
for _evaluation in (evaluations.recall, evaluations.text, evaluations.modes, evaluations.tools, evaluations.plot):
    _registered(_evaluation, _eval)
_registered(preview, _data)
for _group, _commands in ((_keys, keys.COMMANDS), (_accounts, accounts.ACCOUNTS), (_invites, accounts.INVITES)):
    for _name, _one in _commands.items():
        _registered(_one, _group, _name)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyrosome {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it."),
    offline: bool = typer.Option(
        False, "--offline", help=f"No connection to another machine; also {env.OFFLINE.name}=1."
    ),
) -> None:
    log.configure()
    if offline or is_offline():
        go_offline()


def main() -> None:
    """Entry point: an error of this package is a message and exit status 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may not be UTF-8
    try:
        app()
    except PyrosomeError as error:
        typer.echo(f"pyrosome: {printable(str(error))}", err=True)
        sys.exit(BAD_INPUT)
