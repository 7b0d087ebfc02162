"""A checkpoint as its headers tell it: configuration, tensors, and a strict report before anything is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from pyrosome.checkpoint.headers import TensorInfo, read_header
from pyrosome.checkpoint.names import ALLOWED_DTYPES, IGNORED, TensorSpec, expected_tensors, scale_name
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, MissingTensor, UnsupportedFormat, WrongShape
from pyrosome.folders import models_home

INDEX_NAME = "model.safetensors.index.json"
BUILTIN = "builtin:"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name, as a hub calls repositories
RECORD_NAME = ".pull.json"  # beside what `pyrosome pull` fetches
SUMS_NAME = "SHA256SUMS"  # there once everything is
_LISTED = 8  # names of each sort in a message


@dataclasses.dataclass(frozen=True)
class Report:
    """What is wrong between a configuration and the tensors at hand.  Empty lists: nothing."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()  # "name: found ..., expected ..."
    wrong_dtype: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # known copies that nothing reads

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def raise_if_bad(self) -> None:
        """Raise the most telling error, with every other finding in its message.

        Raises:
            MissingTensor, WrongShape, UnsupportedFormat, CheckpointError
        """
        if self.ok:
            return
        parts = [
            f"{len(names)} {title}: {'; '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
            for title, names in (
                ("missing", self.missing),
                ("of a wrong shape", self.wrong_shape),
                ("of a dtype not supported there", self.wrong_dtype),
                ("unexpected", self.unexpected),
            )
            if names
        ]
        message = (
            f"the tensors do not fit config.json ({'. '.join(parts)}); check that config.json and all shards come "
            "from the same checkpoint, and download again what is missing"
        )
        kinds: list[tuple[tuple[str, ...], type[CheckpointError]]] = [
            (self.missing, MissingTensor),
            (self.wrong_shape, WrongShape),
            (self.wrong_dtype, UnsupportedFormat),
        ]
        raise next((error for names, error in kinds if names), CheckpointError)(message)


@dataclasses.dataclass(frozen=True)
class CheckpointIndex:
    """Configuration and tensor places of one checkpoint.  No tensor data was read."""

    path: Path  # the directory
    config: ModelConfig
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Payload bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @functools.cached_property
    def num_stages(self) -> int:
        """Draft stages, counted from the tensors `mtp.{i}.`: configurations of 0731 say 1 and have 3."""
        # How many there are, not the highest number: a stray mtp.99999 must not ask for an inventory of so many stages.
        return len({m[1] for n in self.tensors if (m := re.match(r"mtp\.(\d+)\.", n)) and n not in IGNORED})

    @property
    def has_drafts(self) -> bool:
        return self.num_stages > 0

    @functools.cached_property
    def expected(self) -> dict[str, TensorSpec]:
        """The inventory this checkpoint should have."""
        if not self.config.dspark and self.num_stages > 1:
            raise CheckpointError(
                f"{self.path} has {self.num_stages} draft stages (mtp.0 to mtp.{self.num_stages - 1}) and config.json "
                "has no dspark_* keys; take config.json from the same release as the shards"
            )
        return expected_tensors(self.config, self.num_stages)

    @property
    def num_weights(self) -> int:
        """Weights, scales not counted and packed ones counted singly."""
        return sum(math.prod(spec.shape) for name, spec in self.expected.items() if name in self.tensors)

    def check(self) -> Report:
        """Hold the headers against the inventory the configuration implies."""
        missing, shapes, dtypes = [], [], []
        known = set(IGNORED)
        for name, spec in self.expected.items():
            known.add(name)
            info = self.tensors.get(name)
            if info is None:
                missing.append(name)
                continue
            if info.dtype not in ALLOWED_DTYPES[spec.kind]:
                dtypes.append(f"{name}: {info.dtype}, expected one of {', '.join(sorted(ALLOWED_DTYPES[spec.kind]))}")
                continue
            stored = _stored_shape(spec.shape, info.dtype)
            if info.shape != stored:
                shapes.append(f"{name}: found {list(info.shape)}, expected {list(stored)}")
            if (scale := _scale_shape(spec.shape, info.dtype)) is not None:
                known.add(scale_name(name))
                self._check_scale(name, scale, missing, shapes, dtypes)
        unexpected = [n for n in self.tensors if n not in known]
        ignored = [n for n in IGNORED if n in self.tensors]
        return Report(tuple(missing), tuple(unexpected), tuple(shapes), tuple(dtypes), tuple(ignored))

    def _check_scale(
        self, name: str, shape: tuple[int, ...], missing: list[str], shapes: list[str], dtypes: list[str]
    ) -> None:
        info = self.tensors.get(scale_name(name))
        if info is None:
            missing.append(f"{scale_name(name)} (the scale of {name})")
        elif info.dtype not in ("F8_E8M0", "U8"):
            dtypes.append(f"{scale_name(name)}: {info.dtype}, expected F8_E8M0")
        elif info.shape != shape:
            shapes.append(f"{scale_name(name)}: found {list(info.shape)}, expected {list(shape)}")


def _stored_shape(logical: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    return (*logical[:-1], logical[-1] // 2) if dtype == "I8" else logical


def _scale_shape(logical: tuple[int, ...], dtype: str) -> tuple[int, ...] | None:
    if dtype == "I8":
        return logical[0], -(-logical[1] // 32)
    return (-(-logical[0] // 128), -(-logical[1] // 128)) if dtype == "F8_E4M3" else None


def open_checkpoint(path_or_name: str | Path) -> CheckpointIndex:
    """Read configuration and headers of a directory, a single .safetensors file, or a built-in ("builtin:nano").

    Raises:
        CheckpointError: and its kinds; each says what was looked for, what was found, what to do.
    """
    path = locate(path_or_name)
    directory = path if path.is_dir() else path.parent
    config = ModelConfig.from_json(directory / "config.json")
    shards = _shards(directory) if path.is_dir() else {path: None}
    return gathered(directory, config, shards, read_header)


def gathered(
    directory: Path,
    config: ModelConfig,
    shards: Mapping[Path, set[str] | None],
    header_of: Callable[[Path], dict[str, TensorInfo]],
) -> CheckpointIndex:
    """One index of several shards, each with the tensors it should hold (None: whatever it holds).

    Raises:
        MissingTensor, CheckpointError: a tensor is not in its shard, or is in two.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard, listed in shards.items():
        header = header_of(shard)
        if listed is not None and (absent := listed - header.keys()):
            raise MissingTensor(
                f"{INDEX_NAME} places {_some(absent)} in {shard.name}, which does not hold them; download both again"
            )
        if twice := tensors.keys() & header.keys():
            raise CheckpointError(f"{_some(twice)} are in two shards, the second {shard.name}; remove the stray one")
        tensors |= header
    return CheckpointIndex(directory, config, tensors)


def locate(path_or_name: str | Path) -> Path:
    """The directory or file of a checkpoint, by its path, a built-in's name, or a repository that was pulled.

    Raises:
        CheckpointError: there is none, or it is not a checkpoint's.
    """
    name = str(path_or_name)
    if name.startswith(BUILTIN):
        root = Path(str(resources.files("pyrosome"))) / "builtin"
        known = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        if name == f"{BUILTIN}tiny" and "tiny" not in known:
            raise CheckpointError(
                f"{name} is not trained yet; its recipe is there: `pyrosome train tiny --device cuda`, and then name "
                "runs/tiny/fp8fp4"
            )
        if name.removeprefix(BUILTIN) not in known:
            there = ", ".join(BUILTIN + k for k in known) or "none"
            raise CheckpointError(f"{name} was asked for; built in are {there}")
        return root / name.removeprefix(BUILTIN)
    path = Path(path_or_name).expanduser()
    if not path.exists():
        return _pulled(name)
    if path.is_file() and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; give that file, or its directory")
    return path


def _pulled(name: str) -> Path:
    """Where `pyrosome pull` puts a repository by default, if it has been pulled whole."""
    if not REPO.fullmatch(name):
        raise CheckpointError(
            f"{name} does not exist; give the directory of a checkpoint, a single .safetensors file, or builtin:nano"
        )
    path = models_home() / name
    if (path / SUMS_NAME).exists():
        return path
    if (path / RECORD_NAME).exists():
        raise CheckpointError(f"{name} was pulled in part to {path}; `pyrosome pull {name}` goes on where it ended")
    raise CheckpointError(
        f"{name} does not exist here and was not pulled to {path}; `pyrosome pull {name}` fetches a repository of "
        "that name; else give the directory of a checkpoint, a single .safetensors file, or builtin:nano"
    )


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """Each shard, with the tensors the index places in it (None without an index)."""
    index = directory / INDEX_NAME
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if len(files) == 1:
            return {files[0]: None}
        raise MissingTensor(
            f"{directory} has no {INDEX_NAME} and {len(files)} .safetensors files; with more than one shard the index "
            "is needed: download it"
        )
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} has no usable weight_map ({error}); download it again") from None
    # A path is resolved once per file, not once per tensor: V4-Flash-0731 has 72,317 of them.
    return {_inside(directory, file): names for file, names in parse_weight_map(text, str(index)).items()}


def parse_weight_map(text: str, source: str) -> dict[str, set[str]]:
    """The tensors of each shard, from the text of an index; `source` begins messages.

    Raises:
        CheckpointError: it is no index, or names as a shard what is not a .safetensors file right beside it.
    """
    try:
        listing = json.loads(text)
        weight_map = listing["weight_map"]
        entries = {str(k): str(v) for k, v in weight_map.items() if isinstance(v, str)}
        if len(entries) != len(weight_map) or not entries:
            raise TypeError("weight_map must name a file for every tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} has no usable weight_map ({error}); download it again") from None
    listed: dict[str, set[str]] = {}
    for name, file in entries.items():
        listed.setdefault(file, set()).add(name)
    for file in listed:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{source} names {file!r} as a shard; shards are .safetensors files beside it, so this index is broken "
                "(one that points at itself, elsewhere or nowhere); download it again"
            )
    return listed


def _inside(directory: Path, file: str) -> Path:
    """A shard's path, which must be a file inside the checkpoint."""
    path = directory / file
    try:
        regular = path.resolve(strict=True).is_file()
    except FileNotFoundError:
        raise MissingTensor(f"shard {file} is not in {directory}; download it") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"shard {file!r} in {directory} leads nowhere ({error}); download it again") from None
    if not regular:
        raise CheckpointError(f"shard {file} in {directory} is not a file; download it again")
    return path


def _some(names: set[str]) -> str:
    first = sorted(names)[:_LISTED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
