"""No connection to another machine: a promise that Python itself keeps.

Under `--offline` a hook of the interpreter refuses to connect anywhere but to this machine, whichever library asks.
Libraries that open sockets outside Python are told by their own variables; of those in use only the hub's has one.
Databases and servers that the user names are reached all the same where their drivers are native.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from pyrosome import env
from pyrosome.errors import RequestError

_ON, _OFF = frozenset({"1", "on", "true", "yes"}), frozenset({"", "0", "off", "false", "no"})
_OTHERWISE = f"leave it out, or unset {env.OFFLINE.name}"
_guards: list[object] = []  # a hook cannot be taken away again, so there is at most one


def is_offline() -> bool:
    """Whether connections are forbidden, by this package's variable or by the hub's.

    Raises:
        RequestError: the variable has neither of its values.
    """
    asked = env.OFFLINE.get().strip().lower()
    if asked not in _ON | _OFF:
        raise RequestError(f"{env.OFFLINE.name} is {env.OFFLINE.get()!r}; it is 1 or 0")
    return asked in _ON or os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in _ON


def go_offline() -> None:
    """Forbid connections from now on, in this process and those it starts."""
    os.environ[env.OFFLINE.name] = os.environ["HF_HUB_OFFLINE"] = "1"
    if not _guards:
        _guards.append(_refuse)
        sys.addaudithook(_refuse)


def is_here(host: str) -> bool:
    """Whether an address is this machine's own: loopback, or unspecified, which leads there too."""
    import ipaddress  # when it is needed: commands start without it

    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        return bool(mapped.is_loopback or mapped.is_unspecified)
    return host in ("", "localhost")


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if _is_asked_of_others(args[0]):
            raise RequestError(f"the address of {args[0]} was asked for and --offline forbids it; {_OTHERWISE}")
        return
    if event not in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        return
    address = args[1]  # a path, where the socket is one of this machine's files
    if isinstance(address, tuple) and not is_here(str(address[0])):
        raise RequestError(
            f"a connection to {address[0]} port {address[1]} was asked for and --offline forbids it; {_OTHERWISE}"
        )


def _is_asked_of_others(host: object) -> bool:
    """Whether looking a host up may ask another machine: it is a name, and neither this machine's nor an address."""
    import ipaddress
    import socket

    name = host.decode("latin-1") if isinstance(host, bytes) else str(host or "")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.partition("%")[0])
        return False
    return not is_here(name) and name != socket.gethostname()
