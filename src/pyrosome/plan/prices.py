"""What machines cost an hour: configurations of a price file, never a figure of ours.

`prices.toml` is the list of one hosting vendor; a user's own file has the same form and is read in its place.
"""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pyrosome.errors import RequestError
from pyrosome.plan.hardware import Machine, machine
from pyrosome.plan.quantities import dollars, show_dollars

_TEXTS = ("name", "gpu", "cpu", "ram", "nvme")
_FORM = 'an entry is [[configuration]] with name = "...", gpu = "h200:2", usd_hour = 9.42, and cpu, ram, nvme, nvlink'


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """One machine that can be rented."""

    name: str  # as whoever rents it out calls it
    gpu: str  # as the flags are written, "h200:2"
    usd_hour: float
    cpu: str = ""
    ram: str = ""
    nvme: str = ""
    nvlink: bool = True  # False: its devices reach each other over PCIe alone
    source: str = ""  # of the price

    def machine(self, hardware: str | Path | None = None) -> Machine:
        """What is rented, with its price.

        Raises:
            RequestError: as `hardware.machine`; the message names the configuration.
        """
        try:
            found = machine(
                self.gpu, self.cpu or None, self.ram or None, self.nvme or None, self.usd_hour, hardware=hardware
            )
        except RequestError as error:
            raise RequestError(f"configuration {self.name!r} of the price list: {error}") from None
        if not self.nvlink:
            over_host = dataclasses.replace(found.device, peer_bytes_s=found.device.host_bytes_s)
            found = dataclasses.replace(found, device=over_host)
        return dataclasses.replace(found, assumed=(*found.assumed, self.said))

    @property
    def said(self) -> str:
        """The price with where it is from."""
        return f"{show_dollars(self.usd_hour)} an hour: {self.name}, {self.source or 'from the price list'}"


def configurations(file: str | Path | None = None) -> tuple[Configuration, ...]:
    """Every configuration of a price file, in its order; of the vendor's list where none is named.

    Raises:
        RequestError: the file cannot be read or is not of the form; the message names entry and field.
    """
    if file is None:
        text = (resources.files("pyrosome.plan") / "prices.toml").read_text(encoding="utf-8")
        return _read(text, "prices.toml")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"--prices {file} cannot be read: {error}") from None
    return _read(text, str(file))


def listed(file: str | Path | None = None, hardware: str | Path | None = None) -> list[tuple[str, Machine]]:
    """Every configuration as a machine under its name.

    Raises:
        RequestError: as `configurations` and `Configuration.machine`.
    """
    return [(c.name, c.machine(hardware)) for c in configurations(file)]


def priced(asked: Machine, file: str | Path | None = None, hardware: str | Path | None = None) -> Machine:
    """The machine with the lowest price that is listed for so many of its devices; as it is where none is.

    A price that the machine has stays.  This very machine is not rented.

    Raises:
        RequestError: as `listed`.
    """
    if asked.price_usd_hour is not None or asked.is_here:
        return asked
    alike = []
    for c in configurations(file):
        rented = c.machine(hardware)
        if (rented.device.name, rented.count) == (asked.device.name, asked.count):
            alike.append(c)
    if not alike:
        return asked
    cheapest = min(alike, key=lambda c: c.usd_hour)
    return dataclasses.replace(asked, price_usd_hour=cheapest.usd_hour, assumed=(*asked.assumed, cheapest.said))


def _read(text: str, file: str) -> tuple[Configuration, ...]:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise RequestError(f"{file} is not TOML: {error}") from None
    source, entries = table.pop("source", ""), table.pop("configuration", None)
    if table or not isinstance(source, str) or not isinstance(entries, list) or not entries:
        odd = f"has {sorted(table)[0]!r}" if table else "has no list of configurations, or a source that is no text"
        raise RequestError(f"{file} {odd}; {_FORM}")
    found: dict[str, Configuration] = {}
    for at, entry in enumerate(entries):
        c = _entry(entry, source, f"{file}: configuration {at + 1}")
        if c.name in found:
            raise RequestError(f"{file} has two configurations called {c.name!r}; give each a name of its own")
        found[c.name] = c
    return tuple(found.values())


def _entry(entry: Any, source: str, where: str) -> Configuration:
    if not isinstance(entry, dict):
        raise RequestError(f"{where} is {entry!r}; {_FORM}")
    if extra := sorted(entry.keys() - {*_TEXTS, "usd_hour", "nvlink"}):
        raise RequestError(f"{where} has {extra[0]!r}; {_FORM}")
    if missing := [k for k in ("name", "gpu", "usd_hour") if k not in entry]:
        raise RequestError(f"{where} lacks {', '.join(missing)}; {_FORM}")
    for key in entry.keys() & set(_TEXTS):
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise RequestError(f"{where}.{key} is {entry[key]!r}; a text is expected: {_FORM}")
    if not isinstance(entry.get("nvlink", True), bool):
        raise RequestError(f"{where}.nvlink is {entry['nvlink']!r}; true or false is expected")
    if isinstance(entry["usd_hour"], str):
        raise RequestError(f"{where}.usd_hour is {entry['usd_hour']!r}; a number without quotes is expected")
    return Configuration(**{**entry, "usd_hour": dollars(entry["usd_hour"], f"{where}.usd_hour")}, source=source)
