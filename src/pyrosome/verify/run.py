"""Which checks there are, and running them one after the other."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Collection, Iterator

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.errors import CheckpointError, DoesNotFit, RequestError
from pyrosome.verify.finding import Check, Finding, Wanted

log = logging.getLogger(__name__)

# In the order they run: what is cheap and explains much comes first.  A module is imported when its check begins.
CHECKS = {
    name: f"pyrosome.verify.{name}"
    for name in ("files", "dialect", "scales", "layers", "routes", "kvformat", "needle", "logprobs")
}
WITHOUT_WEIGHTS = ("files",)  # runs where a checkpoint cannot be opened, to say why


def chosen(only: Collection[str] | None = None, skip: Collection[str] = ()) -> list[str]:
    """Names of the checks to run, in their order; `only` None: all of them.

    Raises:
        RequestError: there is no such check, or none is left.
    """
    for option, names in (("--only", only or ()), ("--skip", skip)):
        if unknown := [n for n in names if n not in CHECKS]:
            raise RequestError(f"{option} names {unknown[0]!r}, and there is no such check; there are {_listed()}")
    left = [name for name in CHECKS if (only is None or name in only) and name not in skip]
    if not left:
        raise RequestError(f"no check is left to run; there are {_listed()}")
    return left


def run(wanted: Wanted, names: Collection[str]) -> Iterator[Finding]:
    """What the named checks find, as they find it.  What goes wrong inside a check is a finding too."""
    try:
        yield from _each(wanted, names)
    finally:
        if loaded := sys.modules.get("pyrosome.verify.subject"):  # a model that several checks shared
            loaded.release()


def _each(wanted: Wanted, names: Collection[str]) -> Iterator[Finding]:
    unreadable = functools.cache(lambda: _unreadable(wanted.model))  # files may change between one run and the next
    for name in names:
        if name not in WITHOUT_WEIGHTS and (why_not := unreadable()):
            yield Finding(name, "checkpoint", None if "files" in names else False, f"it cannot be opened: {why_not}")
            continue
        try:
            yield from _check(name)(wanted)
        except DoesNotFit as error:
            yield Finding(name, "memory", None, str(error))
        except CheckpointError as error:
            yield Finding(name, "checkpoint", False, str(error))
        except Exception as error:  # a receipt must be written with what the other checks find
            log.debug("the check %s failed", name, exc_info=True)
            yield Finding(name, "the check itself", False, f"it ended with {type(error).__name__}: {error}")


def _check(name: str) -> Check:
    found: Check = importlib.import_module(CHECKS[name]).check
    return found


def _unreadable(model: str) -> str:
    """Why a checkpoint cannot be opened; "" where it can."""
    try:
        open_checkpoint(model)
    except CheckpointError as error:
        return str(error)
    return ""


def _listed() -> str:
    return ", ".join(CHECKS)
