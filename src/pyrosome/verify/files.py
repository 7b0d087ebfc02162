"""`verify`'s first check: are these the files they claim to be?  Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyrosome.checkpoint.headers import TensorInfo
from pyrosome.checkpoint.index import INDEX_NAME, SUMS_NAME, CheckpointIndex, locate, open_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, RequestError
from pyrosome.verify.finding import Finding, Wanted

CHUNK_BYTES = 1 << 22  # read at once while hashing
RELEASES = ("flash", "flash-0731", "pro")
_SIZE = ("hidden_size", "num_hidden_layers", "n_routed_experts", "vocab_size")
_OF_STORAGE = ("expert_dtype", "quantization", "extra", "compress_ratios", "num_nextn_predict_layers")
LISTED = 8  # names of each sort in a detail
_SUM = re.compile(r"(?P<hex>[0-9a-fA-F]{64})(?: [ *]|\t)(?P<name>.+)")
_BSD_SUM = re.compile(r"SHA256 \((?P<name>.+)\) = (?P<hex>[0-9a-fA-F]{64})")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
# Endings that downloads and writers give to what is not finished.
_UNFINISHED = (".incomplete", ".partial", ".part", ".tmp", ".aria2", ".crdownload", ".lock")


def check(wanted: Wanted) -> Iterator[Finding]:
    """Configuration, index, headers against the inventory, sizes, stray files, and SHA-256."""
    folder = folder_of(wanted.model)
    yield from _configuration(folder)
    try:
        index = open_checkpoint(wanted.model)
    except CheckpointError as error:
        yield Finding("files", "headers", False, str(error))
        index = None
    if index is not None:
        yield _headers(index)
        yield _inventory(index)
        yield _sizes(index)
        yield _total(index)
    yield _strays(folder, index)
    yield from _sums(wanted, folder, index)


def folder_of(model: str) -> Path:
    """The directory of a checkpoint named as `open_checkpoint` takes it.

    Raises:
        CheckpointError: there is none.
    """
    path = locate(model)
    return path if path.is_dir() else path.parent


def read_sums(file: Path) -> dict[str, str]:
    """SHA-256 by file name, of "sha256  name" lines or BSD's; blank lines and those that begin with # are passed over.

    Raises:
        RequestError: the file cannot be read, a line is malformed, a name leads elsewhere, or two lines contradict.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"checksums were to be read from {file}: {error}") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _SUM.fullmatch(line.strip()) or _BSD_SUM.fullmatch(line.strip())
        if found is None:
            raise RequestError(
                f"line {number} of {file} is {line[:80]!r}; expected are 64 hex digits, two blanks and a file's name"
            )
        name, digest = found["name"].removeprefix("./"), found["hex"].lower()
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RequestError(f"line {number} of {file} names {name!r}; files of the model's directory are expected")
        if sums.setdefault(name, digest) != digest:
            raise RequestError(f"line {number} of {file} gives {name} another SHA-256 than a line before; keep one")
    if not sums:
        raise RequestError(f"{file} holds no checksums; expected are lines of 64 hex digits, two blanks and a name")
    return sums


def _configuration(folder: Path) -> Iterator[Finding]:
    try:
        config = ModelConfig.from_json(folder / "config.json")
    except CheckpointError as error:
        yield Finding("files", "config.json", False, str(error))
        return
    said = f"release {config.release}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}"
    figures = {"release": config.release, "unknown_keys": list(config.unknown_keys)}
    if config.unknown_keys:
        said += f"; keys unknown here, kept and without effect: {_some(config.unknown_keys)}"
    yield Finding("files", "config.json", True, said, figures, warns=bool(config.unknown_keys))
    yield from _values(config)


def _values(config: ModelConfig) -> Iterator[Finding]:
    """What shapes do not show: a window, a base, or a factor that is not the release's."""
    alike = [name for name in RELEASES if _is_shaped(config, name)]
    if not alike:
        return
    name, others = min(
        ((n, other_values(config, ModelConfig.preset(n))) for n in alike), key=lambda found: len(found[1])
    )
    detail = f"as published with {name}"
    if others:
        detail = f"not as published with {name}: {_some(others)}; what the same tensors compute depends on it"
    yield Finding("files", "config.json values", True, detail, {"others": others}, warns=bool(others))


def other_values(config: ModelConfig, published: ModelConfig) -> list[str]:
    """What a configuration says otherwise than a published one, but for how tensors are stored and counted."""
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _OF_STORAGE]
    pairs = [(n, getattr(config, n), getattr(published, n)) for n in [*names, "layer_ratios"]]
    return [f"{n} is {ours!r}, published {theirs!r}" for n, ours, theirs in pairs if ours != theirs]


def _is_shaped(config: ModelConfig, name: str) -> bool:
    """Whether it is of that release's size, whatever else it says."""
    published = ModelConfig.preset(name)
    return all(getattr(config, n) == getattr(published, n) for n in _SIZE)


def _headers(index: CheckpointIndex) -> Finding:
    shards = {t.file for t in index.tensors.values()}
    figures = {"tensors": len(index.tensors), "bytes": index.nbytes, "shards": len(shards)}
    detail = f"{len(index.tensors):,} tensors of {index.nbytes:,} bytes in {len(shards)} shard(s)"
    return Finding("files", "headers", True, detail, figures)


def _inventory(index: CheckpointIndex) -> Finding:
    """Every tensor the configuration implies, and no other."""
    try:
        report = index.check()
        report.raise_if_bad()
    except CheckpointError as error:
        return Finding("files", "inventory", False, str(error))
    detail = f"all {len(index.expected):,} tensors that config.json implies are there, and no other"
    if report.ignored:
        detail += f"; copies that nothing reads: {', '.join(report.ignored)}"
    return Finding("files", "inventory", True, detail, {"expected": len(index.expected)})


def _sizes(index: CheckpointIndex) -> Finding:
    """Each shard ends where its last tensor does, and no bytes lie between tensors."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in index.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    wrong = []
    for file, infos in sorted(by_file.items()):
        end, size = max(t.end for t in infos), file.stat().st_size
        if size != end:
            wrong.append(f"{file.name} has {size:,} bytes and its tensors end at {end:,}")
        if gap := end - min(t.begin for t in infos) - sum(t.nbytes for t in infos):
            wrong.append(f"{file.name} has {gap:,} bytes between its tensors that belong to none")
    if wrong:
        return Finding("files", "sizes", False, f"{_some(wrong)}; download what is named again")
    return Finding("files", "sizes", True, f"each of {len(by_file)} shard(s) is as long as its header says")


def _total(index: CheckpointIndex) -> Finding:
    """The index's own `total_size`, which writers disagree about: a difference is told, not held against it."""
    file = index.path / INDEX_NAME
    try:
        said = json.loads(file.read_bytes())["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    what = f"{INDEX_NAME} total_size"
    if not isinstance(said, int) or isinstance(said, bool):
        return Finding("files", what, None, "the index says no total_size")
    detail = f"{said:,} bytes, and the tensors have {index.nbytes:,}"
    return Finding("files", what, True, detail, {"said": said, "found": index.nbytes}, warns=said != index.nbytes)


def _strays(folder: Path, index: CheckpointIndex | None) -> Finding:
    """Shards that no index names, unfinished downloads, and numbering with holes."""
    files = sorted(p.name for p in folder.iterdir() if not p.is_dir())
    used = {t.file.name for t in index.tensors.values()} if index else set()
    stray = [n for n in files if n.endswith(".safetensors") and index is not None and n not in used]
    unfinished = [n for n in files if n.endswith(_UNFINISHED)]
    numbers = [found for n in files if (found := _NUMBERED.fullmatch(n))]
    totals = {(m["stem"], int(m["total"])) for m in numbers}
    holes = [
        f"{stem}-{i:05d}-of-{total:05d}.safetensors"
        for stem, total in sorted(totals)
        for i in range(1, min(total, 10_000) + 1)
        if f"{stem}-{i:05d}-of-{total:05d}.safetensors" not in files
    ]
    said = [
        f"{title}: {_some(names)}"
        for title, names in (
            ("shards that the index does not name", stray),
            ("unfinished files", unfinished),
            ("numbers missing among the shards", holes),
        )
        if names
    ]
    if len(totals) > 1:
        said.append(f"shards of {len(totals)} sets beside each other")
    figures = {"stray": stray, "unfinished": unfinished, "missing_numbers": holes[:100]}
    if said:
        detail = f"{'; '.join(said)}: remove what is left over, or download again what is missing"
        return Finding("files", "stray files", True, detail, figures, warns=True)
    return Finding("files", "stray files", True, f"{len(files)} files, none of them left over", figures)


def _sums(wanted: Wanted, folder: Path, index: CheckpointIndex | None) -> Iterator[Finding]:
    """SHA-256 of every shard, against a list where there is one; without a list only where time is no matter."""
    listed = wanted.checksums or folder / SUMS_NAME
    sums: dict[str, str] = {}
    if wanted.checksums or listed.exists():
        try:
            sums = read_sums(listed)
        except RequestError as error:
            yield Finding("files", "checksums", False, str(error))
            return
    shards = {t.file.name for t in index.tensors.values()} if index else set()
    shards |= {p.name for p in folder.glob("*.safetensors")}
    names = sorted(shards | sums.keys())
    if not sums:
        why = (
            f"no {SUMS_NAME} is beside the shards and --checksums names none, so nothing is compared: a changed byte "
            "that leaves values plausible would not be found"
        )
        yield Finding("files", "checksums", None, why)
        if wanted.quick:
            return
    total = sum((folder / n).stat().st_size for n in names if (folder / n).is_file())
    seen: dict[str, str] = {}
    done = 0
    for name in names:
        finding, size, digest = _sum(wanted, folder, name, sums.get(name), bool(sums), done, total)
        done += size
        yield finding
        if digest and digest in seen and name.endswith(".safetensors"):
            yield Finding("files", name, False, f"holds the same bytes as {seen[digest]}; download both again")
        seen.setdefault(digest, name)


def _sum(
    wanted: Wanted, folder: Path, name: str, expected: str | None, has_list: bool, done: int, total: int
) -> tuple[Finding, int, str]:
    """(what a file's SHA-256 says, bytes read, the SHA-256)"""
    digest, size = hashlib.sha256(), 0
    if (folder / name).exists() and not (folder / name).is_file():
        return Finding("files", name, False, "is not a file; remove it, and download the file of that name"), 0, ""
    try:
        with (folder / name).open("rb") as f:
            while piece := f.read(CHUNK_BYTES):
                digest.update(piece)
                size += len(piece)
                wanted.tell(done + size, total, name)
    except FileNotFoundError:
        return Finding("files", name, False, "is named by the checksums and is not there; download it"), 0, ""
    except OSError as error:
        return Finding("files", name, False, f"cannot be read after {size:,} bytes ({error})"), size, ""
    found = digest.hexdigest()
    figures: dict[str, Any] = {"sha256": found, "bytes": size}
    ok: bool | None = found == expected
    if expected is None:
        ok = False if has_list else None
        detail = f"{size:,} bytes, SHA-256 {found}, "
        detail += "and the checksums do not name it" if has_list else "compared with nothing"
    elif ok:
        detail = f"{size:,} bytes, SHA-256 as expected ({found[:16]}...)"
    else:
        detail = f"SHA-256 is {found} and {expected} was expected; download it again"
        figures |= {"expected": expected}
    return Finding("files", name, ok, detail, figures), size, found


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
