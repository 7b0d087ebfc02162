"""The table of devices: memory as drivers report it, bandwidths, dense peak rates and links, each with its source.

`hardware.toml` has the GPUs of one maker, `hardware_others.toml` those of others and machines of one memory,
`processors.toml` CPUs; a user's own file has the same form and goes before them.  Rates of a processor are counted:
channels x transfers x 8 bytes, and cores x clock x what one core finishes per cycle with its widest instructions.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pyrosome.errors import RequestError

Kind = Literal["gpu", "cpu", "unified"]  # unified: one memory for CPU and GPU (Apple, GB10)
FLOPS = ("f32", "fp16", "bf16", "fp8", "fp4", "int8")  # types that rates are given for
GIB_PER_GB = 1 << 30  # what a GB is in the name of a memory: those are sold in powers of two

_BUILT_IN = ("hardware.toml", "hardware_others.toml", "processors.toml")
_FIELDS: dict[str, dict[str, type]] = {
    "gpu": {"memory": dict, "tflops": dict, "links": dict, "capability": str, "host": str},
    "unified": {"memory": dict, "tflops": dict, "links": dict, "capability": str},
    "cpu": {"cores": int, "ghz": float, "channels": int, "mt_s": int, "vectors": str},
}
_PARTS = {
    "memory": {"gb", "mib", "gb_s", "from"},
    "tflops": set(FLOPS),
    "links": {"peer", "host"},
}
_COMMON = {"name": str, "title": str, "aliases": list, "source": str}
_TYPES: dict[type, str] = {dict: "table", str: "text", list: "list"}
_OPTIONAL = {"aliases", "capability", "host"}


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the processor of one machine.  Rates are the maker's peaks; what is reached is measured."""

    name: str  # how it is asked for: "h200"
    title: str
    kind: Kind
    memory_bytes: int  # as the driver reports it; of a CPU 0, since its memory is the machine's
    read_bytes_s: float  # memory bandwidth
    flops: Mapping[str, float]  # dense peak per second by type of FLOPS; absent: not in hardware; f32 is always there
    peer_bytes_s: float  # to another device of the machine, one direction; 0: only over the host
    host_bytes_s: float  # to host memory, one direction
    vendor_gb: float  # the number in its name or data sheet, in GB; of a CPU 0
    capability: str  # of CUDA, "9.0"; "": none
    source: str  # where the figures are from
    aliases: tuple[str, ...] = ()  # other names, the driver's among them
    host: str = ""  # processor that such devices are usually found beside; "": none is usual


def devices(file: str | Path | None = None) -> dict[str, Device]:
    """Every device of the table by its name; those of the user's `file` replace and join them.

    Raises:
        RequestError: the file cannot be read, or an entry is not of the form; the message names entry and field.
    """
    known = dict(_built_in())
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise RequestError(f"--hardware {file} cannot be read: {error}") from None
        known |= _read(text, str(file))
    return known


def device(name: object, known: Mapping[str, Device] | None = None) -> Device:
    """A device by its name, one of its aliases, or what its driver calls it; case, spaces and dashes do not matter.

    Raises:
        RequestError: there is none; the message lists the nearest names.
    """
    known = _built_in() if known is None else known
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{name!r} was asked for; a device is named as h200, rtx-4090 or epyc-9654")
    by_name = _by_any_name(known)
    if found := by_name.get(plain_name(name)):
        return found
    near = difflib.get_close_matches(plain_name(name), by_name, n=8, cutoff=0.5)
    names = list(dict.fromkeys(by_name[n].name for n in near))[:5]
    hint = f"nearest are {', '.join(names)}" if names else "`pyrosome plan --list` shows those that are known"
    shown = name if len(name) <= 60 else name[:57] + "..."
    raise RequestError(f"no device is called {shown!r}; {hint}; one's own goes into a file for --hardware")


def plain_name(name: str) -> str:
    """A name without case, spaces, dashes and the maker's word, so that "NVIDIA GeForce RTX 4090" is "rtx4090"."""
    words = re.sub(r"\(r\)|\(tm\)|nvidia|geforce|tesla|amd|intel|instinct|radeon|apple|processor", " ", name.lower())
    return re.sub(r"[^a-z0-9+]", "", words)


def sockets(processor: Device, num: int) -> Device:
    """Several processors of one machine, taken together: each computes on what is in its own memory."""
    if num == 1:
        return processor
    return dataclasses.replace(
        processor,
        title=f"{num}x {processor.title}",
        read_bytes_s=num * processor.read_bytes_s,
        flops={k: num * v for k, v in processor.flops.items()},
    )


def vector_rates(kind: str) -> tuple[dict[str, float], str]:
    """What one core does per cycle by type, with instructions of this kind ("zen4", "amx", ...), and how."""
    entry = dict(_vectors()[kind])
    how = str(entry.pop("how"))
    return {k: float(v) for k, v in entry.items()}, how


@functools.cache
def _built_in() -> Mapping[str, Device]:
    found: dict[str, Device] = {}
    for file in _BUILT_IN:
        found |= _read((resources.files("pyrosome.plan") / file).read_text(encoding="utf-8"), file)
    return found


def _by_any_name(known: Mapping[str, Device]) -> dict[str, Device]:
    """Own names last, so that they win over another's alias."""
    found = {plain_name(a): d for d in known.values() for a in (d.title, *d.aliases)}
    return found | {plain_name(n): d for n, d in known.items()}


def _read(text: str, file: str) -> dict[str, Device]:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise RequestError(f"{file} is not TOML: {error}") from None
    if extra := sorted(table.keys() - {"gpu", "unified", "cpu", "vectors"}):
        raise RequestError(f"{file} has {extra[0]!r}; a table of hardware has [[gpu]], [[unified]], [[cpu]], [vectors]")
    vectors = {**(_vectors() if file not in _BUILT_IN else {}), **_checked_vectors(table.get("vectors", {}), file)}
    found: dict[str, Device] = {}
    for kind, fields in _FIELDS.items():
        entries = table.get(kind, [])
        if not isinstance(entries, list):
            raise RequestError(f"{file} has {kind} as a {type(entries).__name__}; each entry begins with [[{kind}]]")
        for at, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise RequestError(f"{file} has {kind} {entry!r}; each entry begins with [[{kind}]]")
            where = f"{file}: [[{kind}]] {entry.get('name', f'number {at + 1}')!s}"
            _check(entry, fields, where)
            for d in _processors(entry, vectors, where) if kind == "cpu" else _accelerators(entry, kind, where):
                if d.name in found:
                    raise RequestError(f"{where} is there twice; give each a name of its own")
                found[d.name] = d
    return found


@functools.cache
def _vectors() -> Mapping[str, Any]:
    text = (resources.files("pyrosome.plan") / "processors.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["vectors"])


def _checked_vectors(found: Any, file: str) -> dict[str, Any]:
    """Kinds of instructions, each with how it is counted and what a core does per cycle."""
    if not isinstance(found, dict):
        raise RequestError(f"{file} has vectors as {found!r}; a table [vectors] is expected")
    for kind, rates in found.items():
        where = f"{file}: vectors.{kind}"
        if not isinstance(rates, dict) or not isinstance(rates.get("how"), str) or "f32" not in rates:
            raise RequestError(f"{where} is {rates!r}; a table with how (a text), f32 and other types is expected")
        if extra := sorted(rates.keys() - {"how", *FLOPS}):
            raise RequestError(f"{where} has {extra[0]!r}; it has how, {', '.join(FLOPS)}")
        for name in rates.keys() - {"how"}:
            _positive(rates[name], f"{where}.{name}")
    return found


def _check(entry: dict[str, Any], fields: dict[str, type], where: str) -> None:
    fields = {**_COMMON, **fields}
    if extra := sorted(entry.keys() - fields.keys()):
        raise RequestError(f"{where} has {extra[0]!r}; its fields are {', '.join(fields)}")
    if missing := sorted(fields.keys() - entry.keys() - _OPTIONAL):
        raise RequestError(f"{where} lacks {', '.join(missing)}")
    for key, value in entry.items():
        kind = fields[key]
        if kind in (int, float):
            _positive(value, f"{where}.{key}", whole=kind is int)
        elif type(value) is not kind or (key not in _OPTIONAL and not value):
            raise RequestError(f"{where}.{key} is {value!r}; a {_TYPES[kind]} is expected")
    if not plain_name(entry["name"]) or ":" in entry["name"]:
        raise RequestError(f"{where}.name is {entry['name']!r}; letters and digits are expected, as h200-nvl")
    if not all(isinstance(a, str) for a in entry.get("aliases", [])):
        raise RequestError(f"{where}.aliases is {entry['aliases']!r}; a list of names is expected")
    for key, parts in _PARTS.items():
        if extra := sorted(entry.get(key, {}).keys() - parts):
            raise RequestError(f"{where}.{key} has {extra[0]!r}; it has {', '.join(sorted(parts))}")


def _accelerators(entry: dict[str, Any], kind: str, where: str) -> list[Device]:
    """The devices of one entry: one, or where it is sold with several sizes of memory one for each."""
    memory, tflops, links = entry["memory"], entry["tflops"], entry["links"]
    if missing := sorted({"gb", "mib", "gb_s"} - memory.keys()) or sorted({"f32"} - tflops.keys()):
        raise RequestError(f"{where} lacks {missing[0]!r} of its memory or its tflops")
    sizes, reported = (v if isinstance(v, list) else [v] for v in (memory["gb"], memory["mib"]))
    if not sizes or len(sizes) != len(reported):
        raise RequestError(f"{where}.memory has {len(sizes)} of gb and {len(reported)} of mib; give one for each size")
    found = []
    for gb in sizes:
        _positive(gb, f"{where}.memory.gb")
    for gb, mib in zip(sizes, reported, strict=True):
        name, size = entry["name"], f"-{gb:g}" if len(sizes) > 1 else ""
        last = gb == sizes[-1]  # the largest answers to the bare name too
        aliases = [a + size for a in entry.get("aliases", [])] + ([name, *entry.get("aliases", [])] if last else [])
        found.append(
            Device(
                name=name + size,
                title=f"{entry['title']}, {gb:g} GB" if size else entry["title"],
                kind="unified" if kind == "unified" else "gpu",
                memory_bytes=_positive(mib, f"{where}.memory.mib", whole=True) << 20,
                read_bytes_s=_positive(memory["gb_s"], f"{where}.memory.gb_s") * 1e9,
                flops={k: _positive(v, f"{where}.tflops.{k}") * 1e12 for k, v in tflops.items()},
                peer_bytes_s=_positive(links.get("peer", 0), f"{where}.links.peer", zero=True) * 1e9,
                host_bytes_s=_positive(links.get("host", 0), f"{where}.links.host", zero=True) * 1e9,
                vendor_gb=float(gb),
                capability=entry.get("capability", ""),
                source=f"{entry['source']}; memory: {memory.get('from', 'as given')}",
                aliases=tuple(dict.fromkeys(aliases)) if size else tuple(entry.get("aliases", [])),
                host=entry.get("host", ""),
            )
        )
    return found


def _processors(entry: dict[str, Any], vectors: Mapping[str, Any], where: str) -> list[Device]:
    """The processor of one entry, its rates counted."""
    if entry["vectors"] not in vectors:
        raise RequestError(f"{where}.vectors is {entry['vectors']!r}; it is one of {', '.join(vectors)}")
    per_cycle = {k: v for k, v in vectors[entry["vectors"]].items() if k != "how"}
    cycles = entry["cores"] * float(entry["ghz"]) * 1e9
    return [
        Device(
            name=entry["name"],
            title=entry["title"],
            kind="cpu",
            memory_bytes=0,
            read_bytes_s=entry["channels"] * entry["mt_s"] * 1e6 * 8,
            flops={k: v * cycles for k, v in per_cycle.items()},
            peer_bytes_s=0.0,
            host_bytes_s=0.0,
            vendor_gb=0.0,
            capability="",
            source=(
                f"{entry['source']}; {entry['channels']} channels x {entry['mt_s']:,} MT/s x 8 bytes; "
                f"{entry['cores']} cores x {entry['ghz']:g} GHz x {vectors[entry['vectors']]['how']}"
            ),
            aliases=tuple(entry.get("aliases", [])),
        )
    ]


def _positive(value: Any, where: str, *, whole: bool = False, zero: bool = False) -> Any:
    """The number, finite and above 0 (or 0 where that means none)."""
    kinds = (int,) if whole else (int, float)
    # Comparisons that a NaN fails, and integers of any length do not.
    if type(value) not in kinds or not 0 <= value <= 1e12 or (value == 0 and not zero):
        what = "whole number" if whole else "number"
        raise RequestError(f"{where} is {value!r}; a {what} {'from' if zero else 'above'} 0 is expected")
    return value if whole else float(value)
