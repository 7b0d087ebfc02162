"""Training state on disk: exact, checked, and whole whenever the process is killed.

    state-00001234.safetensors   tensors, and in the metadata everything else; one file per save
    latest                       the name of the newest

Each file is written under a temporary name, synced and renamed, so that it is whole or not there.  Two saves are kept:
where the newest is damaged the one before is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pyrosome.checkpoint.headers import read_header
from pyrosome.checkpoint.save import container_head, dtype_name
from pyrosome.errors import CheckpointError, DoesNotFit, RequestError, UnsupportedFormat
from pyrosome.quant.formats import DTYPES
from pyrosome.train.recipe import Recipe, differences

log = logging.getLogger(__name__)

LATEST = "latest"
KEPT = 2  # saves; with one, damage to it would end the run
VERSION = "1"
_MARGIN_BYTES = 1 << 20  # left free beside a state: the curves and the pointer are written to the same disk


@dataclass(kw_only=True)
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Counts are since the run began.  Values of `extra` are what JSON holds: a tuple comes back as a list.
    """

    step: int
    tokens: int
    stage: int = 0  # which of the recipe's stages, from 0
    stage_tokens: int = 0  # trained in it
    samples: int = 0  # drawn: the next one's number
    curves_offset: int = 0  # bytes of the curves' file at this step
    lr_position: float = 0.0
    fingerprint: str = ""  # of the recipe
    recipe: dict[str, Any] = field(default_factory=dict)  # `Recipe.to_dict()`
    extra: dict[str, Any] = field(default_factory=dict)
    torch_rng: Tensor | None = None  # uint8, as `torch.Generator.get_state` gives it
    python_rng: tuple[Any, ...] | None = None  # as `random.Random.getstate` gives it
    tensors: dict[str, Tensor] = field(
        default_factory=dict
    )  # parameters, masters, momenta, biases; on the CPU if loaded


def save_state(directory: str | Path, state: TrainState) -> Path:
    """Write a state beside the ones before, make it the latest, delete all but the newest two; returns its file.

    Raises:
        DoesNotFit: the disk has not so many bytes free.  The states already there are as they were.
        CheckpointError: a tensor of a dtype without a name in the container, or the directory cannot be written to.
    """
    directory = Path(directory)
    path = directory / _file_name(state.step)
    tensors = {n: t.detach().cpu().contiguous() for n, t in state.tensors.items()}
    about = _described(state)
    head = container_head(tensors, {"version": VERSION, "state": about, "xxh3": _checksum(about, tensors)})
    parts = [memoryview(head), *map(_bytes_of, tensors.values())]
    needed = sum(p.nbytes for p in parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed + _MARGIN_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _replace(path, parts)
        _replace(directory / LATEST, [memoryview(f"{path.name}\n".encode())])
    except OSError as error:
        raise _refused(path, needed, error) from None
    _delete_old(directory, state.step)
    return path


def load_state(directory: str | Path, recipe: Recipe | None = None) -> TrainState | None:
    """The latest state that is whole; None where there is none at all.

    Args:
        recipe: what is to go on; a state that another one left is refused.

    Raises:
        RequestError: the state is of a recipe that trains something else; the message has the keys.
        CheckpointError: there are states and none of them is whole.
    """
    directory = Path(directory)
    faults: list[str] = []
    for path in _candidates(directory):
        try:
            state = _read(path)
        except (CheckpointError, OSError) as error:
            faults.append(f"{path.name}: {str(error).removesuffix('; download this file again')}")
            log.warning("a training state is passed over, and the one before it used: %s", faults[-1])
            continue
        if recipe is not None:
            _check_recipe(path, state, recipe)
        return state
    if faults:
        raise CheckpointError(
            f"{directory} holds no training state that is whole ({'; '.join(faults)}); remove the directory to begin "
            "anew"
        )
    return None


def has_state(directory: str | Path) -> bool:
    """Whether a run left a state in this directory, whole or not."""
    return bool(_states(Path(directory)))


def _file_name(step: int) -> str:
    return f"state-{step:08d}.safetensors"


def _states(directory: Path) -> list[Path]:
    """Every state there, the highest step first."""
    found = directory.glob("state-*.safetensors")
    return sorted((p for p in found if _step_of(p) is not None), key=lambda p: _step_of(p) or 0, reverse=True)


def _step_of(path: Path) -> int | None:
    digits = path.stem.removeprefix("state-")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _candidates(directory: Path) -> list[Path]:
    """States in the order in which to try them: the one pointed at, then the others from the newest."""
    states = _states(directory)
    try:
        name = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return states
    pointed = [p for p in states if p.name == name]
    if not pointed and states:
        log.warning("%s names %r, which is not there; the newest state there is used", directory / LATEST, name[:80])
    return pointed + [p for p in states if p.name != name]


def _described(state: TrainState) -> str:
    """All but the tensors, as JSON."""
    d = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "tensors"}
    if state.torch_rng is not None:
        d["torch_rng"] = state.torch_rng.cpu().numpy().tobytes().hex()
    return json.dumps(d, separators=(",", ":"))


def _checksum(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(about.encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, dtype_name(name, tensors[name]), *tensors[name].shape]).encode())
        digest.update(_bytes_of(tensors[name]))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read(path: Path) -> TrainState:
    places = read_header(path)
    with open(path, "rb") as f:
        metadata = _metadata(f.read(8), f.read, path)
        tensors = {}
        for name, place in places.items():
            if place.dtype not in DTYPES:
                raise UnsupportedFormat(f"{name} has dtype {place.dtype}, which no state of this package has")
            data = torch.empty(place.nbytes, dtype=torch.uint8)
            f.seek(place.begin)
            if f.readinto(_bytes_of(data)) != place.nbytes:
                raise CheckpointError(f"it ends within {name}")
            tensors[name] = data.view(DTYPES[place.dtype]).view(place.shape)
    about, checksum = metadata.get("state", ""), metadata.get("xxh3")
    if not isinstance(about, str) or _checksum(about, tensors) != checksum:
        raise CheckpointError("its checksum is another: the file is damaged")
    d = json.loads(about)
    if d["torch_rng"] is not None:
        d["torch_rng"] = torch.frombuffer(bytearray.fromhex(d["torch_rng"]), dtype=torch.uint8)
    if d["python_rng"] is not None:
        version, words, gauss = d["python_rng"]
        d["python_rng"] = (version, tuple(words), gauss)
    return TrainState(**d, tensors=tensors)


def _metadata(prefix: bytes, read: Any, path: Path) -> dict[str, Any]:
    found = json.loads(read(int.from_bytes(prefix, "little"))).get("__metadata__")
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise UnsupportedFormat(f"{path} is no training state of version {VERSION}")
    return found


def _check_recipe(path: Path, state: TrainState, recipe: Recipe) -> None:
    if state.fingerprint == recipe.fingerprint():
        return
    changed = differences(state.recipe, recipe.to_dict()) or ["this version of the package reads it differently"]
    raise RequestError(
        f"{path} was left by another recipe ({'; '.join(changed)}); go on with the recipe it was started with, or give "
        "another directory"
    )


def _replace(path: Path, parts: Sequence[memoryview]) -> None:
    """Write a file that is whole, or leave what was there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in parts:
                _write_all(handle, part)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_all(handle: int, part: memoryview) -> None:
    while part.nbytes:
        written = os.write(handle, part)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = part[written:]


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _delete_old(directory: Path, step: int) -> None:
    """Keep the newest two.  A state of a later step was given up when an earlier one was gone on from."""
    states = _states(directory)
    given_up = [p for p in states if (_step_of(p) or 0) > step]
    for path in [*given_up, *states[len(given_up) + KEPT :], *_partials(directory)]:
        with contextlib.suppress(OSError):  # a file that stays costs room, and no more
            path.unlink(missing_ok=True)


def _partials(directory: Path) -> Iterator[Path]:
    """What a killed process left."""
    return directory.glob(".state-*.partial")


def _refused(path: Path, needed: int, error: OSError) -> DoesNotFit | CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            room = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
            hint = f"{room}: free some and resume; the states already there are as they were"
            return DoesNotFit(f"the training state {path.name}", needed, free, f"the disk of {path.parent}", hint)
    return CheckpointError(f"{path} could not be written: {error}; the states already there are as they were")
