"""One inventory of every tensor: what a checkpoint stores, and what a device holds of it once loaded.

The loader checks a checkpoint against it (`checkpoint.names`), the planner adds it up, and a test holds what is
allocated to it (`model.build` puts each tensor where `held_bytes` says).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from pyrosome.checkpoint.index import BUILTIN, REPO, CheckpointIndex, open_checkpoint
from pyrosome.checkpoint.names import DTYPE_BYTES, IGNORED, Kind, expected_tensors, official_storage, scale_name
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, PlanError, RequestError
from pyrosome.tiling import tiled_bytes

Form = Literal["stored", "tiles", "float32"]  # as a GPU, as the native CPU kernels, or as torch on a small CPU holds it
Weights = Literal["native", "fp8", "w4a16", "bf16"]  # what is stored, where there is no checkpoint to look at

PARTS = (
    "routed experts", "shared experts", "attention", "indexer", "compressors", "routers", "hyper-connections",
    "norms", "embedding", "head", "draft head",
)  # fmt: skip
PRESET_STAGES = {"flash": 1, "flash-0731": 3, "pro": 1}  # draft stages that the published checkpoints store
INT4_GROUP = 128  # inputs that share a bfloat16 scale
_QUANTISED = {"F8_E4M3": "fp8", "I8": "fp4"}  # by dtype of the data
_FLOAT32_ONCE_LOADED: tuple[Kind, ...] = ("router", "vector", "f32")  # their maths is float32 whatever is stored
_MATCH = {
    "draft head": r"mtp\.",
    "routed experts": r".*\.ffn\.experts\.",
    "shared experts": r".*\.ffn\.shared_experts\.",
    "routers": r".*\.ffn\.gate\.",
    "indexer": r".*\.attn\.indexer\.",
    "compressors": r".*\.attn\.compressor\.",
    "attention": r".*\.attn\.",
    "hyper-connections": r"(.*\.)?hc_",
    "norms": r"(.*\.)?(norm|attn_norm|ffn_norm)\.",
    "embedding": r"embed\.",
    "head": r"head\.",
}
_PART = [(part, re.compile(pattern)) for part, pattern in _MATCH.items()]
_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.")
_EXPERT = re.compile(r".*\.ffn\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One weight with its scale, if it has one."""

    name: str
    part: str  # one of PARTS
    layer: int  # -1: of no layer (embedding, head, last norm); the draft stages come after the last
    expert: int  # -1: not of a routed expert
    shape: tuple[int, ...]  # logical
    dtype: str  # as the container names it; "I4" for INT4 in groups of 128
    stored_bytes: int  # scale included
    kind: Kind = "matrix"
    groups: int = 1  # of rows, each read by inputs of its own (wo_a) and tiled apart

    @property
    def numel(self) -> int:
        """Weights, packed ones counted singly."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is planned for."""

    name: str
    config: ModelConfig
    num_stages: int  # draft stages that are loaded
    tensors: tuple[StoredTensor, ...]  # all that is stored, the stages that are left out too
    ignored_bytes: int = 0  # stored copies that nothing reads

    @classmethod
    def of(cls, config: ModelConfig, num_stages: int, weights: str = "native", name: str = "") -> Model:
        """From a configuration alone.

        Args:
            num_stages: draft stages that are stored; those of a DSpark head are not loaded.
            weights: "native" as the official checkpoints of this configuration, "fp8" with experts in FP8 as well,
                "w4a16" with experts in INT4, "bf16" with nothing quantised.

        Raises:
            RequestError: unknown weights, or a number of stages that no checkpoint has.
        """
        if weights not in get_args(Weights):
            raise RequestError(f"weights are {weights!r}; they are one of {', '.join(get_args(Weights))}")
        most = max(len(config.draft_ratios), config.num_nextn_predict_layers)
        if isinstance(num_stages, bool) or not isinstance(num_stages, int) or not 0 <= num_stages <= most:
            raise RequestError(f"{num_stages!r} draft stages were asked for; this configuration has 0 to {most}")
        found = {name: (dtype, num_bytes) for name, dtype, num_bytes in _stored(config, num_stages, weights)}
        tensors = tuple(_tensors(config, num_stages, found))
        return cls(name or "DeepSeek-V4", config, _loaded(config, num_stages), tensors)

    @classmethod
    def open(cls, path_or_name: str | Path, weights: str = "native") -> Model:
        """A preset ("flash", "flash-0731", "pro"), or what a checkpoint's headers say (directory, file, built-in).

        Raises:
            CheckpointError: there is neither, or the headers are not those of a whole checkpoint.
            RequestError: unknown weights, or other weights than a checkpoint's own.
        """
        known = ", ".join(PRESET_STAGES)
        if not isinstance(path_or_name, str | Path) or not str(path_or_name):
            raise CheckpointError(
                f"a model was asked for as {path_or_name!r}; give {known}, or the path of a checkpoint"
            )
        name = str(path_or_name)
        if name in PRESET_STAGES:
            return _preset(name, weights)
        if weights != "native":
            raise RequestError(
                f"weights {weights!r} were asked for with {name}, whose headers say what it stores; leave them "
                f"out, or name one of {known}"
            )
        if not name.startswith(BUILTIN) and not REPO.fullmatch(name) and not Path(name).expanduser().exists():
            raise CheckpointError(
                f"{name} is neither a file nor a known model; give {known}, the directory of a checkpoint, a single "
                ".safetensors file, or builtin:nano"
            )
        return from_headers(open_checkpoint(name), name)

    @property
    def num_stored_stages(self) -> int:
        """Draft stages in the checkpoint, loaded or not."""
        return len({t.layer for t in self.tensors if t.part == "draft head"})

    @functools.cached_property
    def held(self) -> tuple[StoredTensor, ...]:
        """What a device is given: everything stored but the draft stages that are not loaded."""
        return tuple(t for t in self.tensors if self.num_stages or t.part != "draft head")

    @property
    def left_out(self) -> str:
        """What is stored and not loaded, in words; "" for nothing."""
        stages = self.num_stored_stages - self.num_stages
        if not stages:
            return ""
        num_bytes = sum(t.stored_bytes for t in self.tensors) - sum(t.stored_bytes for t in self.held)
        return f"{stages} DSpark draft stages ({num_bytes:,} bytes) are stored and not loaded by this version"

    @property
    def stored_bytes(self) -> int:
        """Payload of the checkpoint; its shards' headers and other files come on top."""
        return sum(t.stored_bytes for t in self.tensors) + self.ignored_bytes

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Weights of the "trunk", "active" in it for one token, and of the "draft" stages stored."""
        return count_parameters(self.config, self.num_stored_stages)

    def held_bytes(self, form: Form) -> int:
        """Bytes of all that a device holds of this model, buffers included.

        Raises:
            PlanError: as `held_bytes`.
        """
        return sum(held_bytes(t, form) for t in self.held) + buffer_bytes(self.config)


def held_bytes(tensor: StoredTensor, form: Form) -> int:
    """Bytes a device takes for a tensor once it is loaded, exactly.

    Small vectors, hyper-connections and routers are float32 everywhere, tables 64-bit integers.

    Raises:
        PlanError: the native CPU kernels were meant, and do not read such a weight.
    """
    if tensor.kind == "table":
        return 8 * tensor.numel
    if form == "float32" or tensor.kind in _FLOAT32_ONCE_LOADED:
        return 4 * tensor.numel
    if form == "stored" or (tensor.dtype in DTYPE_BYTES and tensor.dtype not in _QUANTISED):
        return tensor.stored_bytes
    if form != "tiles":
        raise PlanError(f"form {form!r} was asked for; weights are held as one of {', '.join(get_args(Form))}")
    if tensor.dtype not in _QUANTISED:
        raise PlanError(
            f"{tensor.name} is {tensor.dtype} and the CPU kernels read FP4, FP8, BF16 and F32; take native weights"
        )
    rows, inputs = tensor.shape
    return tensor.groups * tiled_bytes(_QUANTISED[tensor.dtype], rows // tensor.groups, inputs)


def buffer_bytes(config: ModelConfig) -> int:
    """Bytes of the two rotations' angles, float32, which no checkpoint stores."""
    return 2 * (config.qk_rope_head_dim // 2) * 4


def add_up(
    tensors: Iterable[StoredTensor], key: Callable[[StoredTensor], object], form: Form | None = None
) -> dict[object, int]:
    """Bytes by what `key` says of each tensor (its part, layer, expert, dtype): held in `form`, or stored for None.

    Raises:
        PlanError: as `held_bytes`.
    """
    totals: dict[object, int] = {}
    for t in tensors:
        totals[key(t)] = totals.get(key(t), 0) + (t.stored_bytes if form is None else held_bytes(t, form))
    return totals


def part_of(name: str) -> str:
    """Which of PARTS a tensor of this name belongs to; "" for a name of no network like this."""
    return next((part for part, pattern in _PART if pattern.match(name)), "")


def count_parameters(config: ModelConfig, num_stages: int) -> dict[str, int]:
    """Weights the configuration implies, scales and routing tables not counted, packed ones counted singly.

    `active` is what one token goes through in the trunk: its experts, everything that is shared, the head, and of the
    embedding nothing, since one row is looked up.
    """
    totals = {"trunk": 0, "draft": 0, "active": 0}
    for name, spec in expected_tensors(config, num_stages).items():
        if spec.kind == "table":
            continue
        count = math.prod(spec.shape)
        if name.startswith("mtp."):
            totals["draft"] += count
            continue
        totals["trunk"] += count
        if spec.kind == "expert":  # every expert is as large as another
            totals["active"] += count * config.num_experts_per_tok
        elif name != "embed.weight":
            totals["active"] += count * config.n_routed_experts
    totals["active"] //= config.n_routed_experts
    return totals


@functools.lru_cache(maxsize=8)
def _preset(name: str, weights: str) -> Model:
    return Model.of(ModelConfig.preset(name), PRESET_STAGES[name], weights, name)


def from_headers(index: CheckpointIndex, name: str) -> Model:
    """What is planned for, of headers that need not lie on this machine.

    Raises:
        CheckpointError: they are not those of a whole checkpoint.
    """
    index.check().raise_if_bad()
    found = {}
    for stored, info in index.tensors.items():
        scale = index.tensors.get(scale_name(stored)) if stored.endswith(".weight") else None
        found[stored] = info.dtype, info.nbytes + (scale.nbytes if scale else 0)
    ignored = sum(index.tensors[n].nbytes for n in IGNORED if n in index.tensors)
    tensors = tuple(_tensors(index.config, index.num_stages, found))
    return Model(name, index.config, _loaded(index.config, index.num_stages), tensors, ignored)


def _loaded(config: ModelConfig, num_stages: int) -> int:
    """An MTP stage is loaded; a DSpark head is left out (`model.build`)."""
    return 0 if config.dspark else num_stages


def _tensors(config: ModelConfig, num_stages: int, found: dict[str, tuple[str, int]]) -> Iterator[StoredTensor]:
    for name, spec in expected_tensors(config, num_stages).items():
        dtype, num_bytes = found[name]
        layer, expert = _LAYER.match(name), _EXPERT.match(name)
        number = -1 if layer is None else int(layer[2]) + (config.num_hidden_layers if layer[1] == "mtp" else 0)
        yield StoredTensor(
            name, part_of(name), number, int(expert[1]) if expert else -1, spec.shape, dtype, num_bytes, spec.kind,
            config.o_groups if name.endswith(".attn.wo_a.weight") else 1,
        )  # fmt: skip


def _stored(config: ModelConfig, num_stages: int, weights: str) -> Iterator[tuple[str, str, int]]:
    """(name, dtype, bytes with the scale) of every weight."""
    if weights == "w4a16":
        yield from _w4a16(config, num_stages)
        return
    if weights == "fp8":
        config = dataclasses.replace(config, expert_dtype="fp8")
    elif weights == "bf16":
        config = dataclasses.replace(config, expert_dtype=None, quantization=None)
    sizes = {n: (d, math.prod(shape) * DTYPE_BYTES[d]) for n, d, shape in official_storage(config, num_stages)}
    for name, (dtype, num_bytes) in sizes.items():
        scale = sizes.get(scale_name(name), ("", 0))[1] if dtype in _QUANTISED else 0
        if not name.endswith(".scale"):
            yield name, dtype, num_bytes + scale


def _w4a16(config: ModelConfig, num_stages: int) -> Iterator[tuple[str, str, int]]:
    """Routed experts in INT4, with a bfloat16 scale per 128 inputs; shared experts and the indexer's wq_b in BF16.

    The published 152.945 GB of such a checkpoint do not tell what is in it.  This reading gives them without MTP to
    1 MB; INT4 zero points beside the scales in place of BF16 shared experts would as well.
    """
    specs = expected_tensors(config, num_stages)
    for name, dtype, num_bytes in _stored(config, num_stages, "native"):
        if specs[name].kind == "expert":
            rows, inputs = specs[name].shape
            yield name, "I4", rows * (-(-inputs // 2) + 2 * -(-inputs // INT4_GROUP))
        elif ".shared_experts." in name or name.endswith(".indexer.wq_b.weight"):
            yield name, "BF16", 2 * math.prod(specs[name].shape)
        else:
            yield name, dtype, num_bytes
