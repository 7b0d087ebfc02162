"""The hosting vendor's sizing convention, reproduced so that it can be explained, not trusted.

    sessions = (0.90 M - W / n - 2.5 GiB) / K

M is the GB in a GPU's name read as GiB, n the number of GPUs, W the bytes of the checkpoint's files, and K what vLLM
0.20 counts for one request: pages of FP8 rows for its history, and for each stream of state the pages that a prefill of
`max_num_batched_tokens` would go through.  All of it is charged to every session, and nothing is split by layers.

Source: planner.md section 1.  The arithmetic of pages is that of vLLM's `KVCacheSpec.max_memory_usage_bytes`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from importlib import resources
from typing import Any

from pyrosome.checkpoint.names import DTYPE_BYTES, official_storage
from pyrosome.config import ModelConfig
from pyrosome.errors import RequestError
from pyrosome.plan.fitting import most_sessions
from pyrosome.plan.hardware import Machine
from pyrosome.plan.inventory import Model
from pyrosome.plan.layout import MODES, Layout, Placement
from pyrosome.plan.plan import Asked
from pyrosome.plan.prices import configurations

GIB = 1 << 30
MEMORY_SHARE = 0.90  # of a GPU that the vendor gives to weights and rows
RESERVE_BYTES = 5 * GIB // 2  # and takes off again, for everything else
CONTEXT, BATCHED_TOKENS = 1_048_576, 8192  # of the tables, and what vLLM prefills at once
STEP_TOKENS = 2048  # of a prompt that this engine computes at once
STAGES = {"native": 1, "w4a16": 0, "bf16": 0}  # draft stages in the checkpoints of the tables

PAGE_UNIT = 576  # bytes that every page is rounded up to
KV_ROW_BYTES, INDEX_ROW_BYTES = 584, 132  # FP8 rows of 512 channels and index keys of 128, with their scales
CSA_ROWS, HCA_ROWS = 64, 2  # rows of one block: 256 tokens at ratios 4 and 128
BLOCK_TOKENS = 256  # of history
WINDOW_PAGE, CSA_STATE_PAGE, HCA_STATE_PAGE = 64, 4, 8  # tokens of one block of each stream of state
CSA_STATE, HCA_STATE = 8, 128  # tokens that the compressors look back on
WINDOW_GROUPS = 2  # that the windows of all layers are put into, so that a block has a page for each layer of a group

BASIS = (
    "ours: FP8 rows and FP4 index keys in whole pages, memory as the driver reports it, one prompt computed at a time "
    "in steps of 2,048 tokens, all experts on the GPUs; what `pyrosome plan --mode` says of a mode and such steps "
    "holds here too"
)


@dataclasses.dataclass(frozen=True)
class VendorCell:
    """One cell: as listed, reproduced, and what this engine holds."""

    table: str
    name: str
    weights: str
    gpus: int
    mode: str
    usd_hour: float
    predicted: float  # sessions of 1,048,576 tokens, by the convention
    listed: float
    ours: dict[str, int]  # sessions that are held at once, by mode; 0: it does not fit
    why: str  # why the listed number is not what such machines hold


def block_bytes(config: ModelConfig) -> int:
    """Bytes of one block: a page of CSA rows, of HCA rows and of index keys for each layer of a group."""
    pages = ((CSA_ROWS, KV_ROW_BYTES), (HCA_ROWS, KV_ROW_BYTES), (CSA_ROWS, INDEX_ROW_BYTES))
    layers = -(-config.num_hidden_layers // WINDOW_GROUPS)
    return layers * sum(-(-rows * row // PAGE_UNIT) * PAGE_UNIT for rows, row in pages)


def num_blocks(config: ModelConfig, context: int, batched_tokens: int) -> int:
    """Blocks that one request is counted to need, with `batched_tokens` of it computed at once."""

    def state(look_back: int, page: int) -> int:
        return -(-min(look_back - 1 + batched_tokens, context) // page) + 1

    windows = WINDOW_GROUPS * state(config.sliding_window, WINDOW_PAGE)
    tails = state(CSA_STATE, CSA_STATE_PAGE) + state(HCA_STATE, HCA_STATE_PAGE)
    return -(-context // BLOCK_TOKENS) + windows + tails


def request_bytes(config: ModelConfig, context: int = CONTEXT, batched_tokens: int = BATCHED_TOKENS) -> int:
    """K: bytes that one request is counted to need."""
    return num_blocks(config, context, batched_tokens) * block_bytes(config)


def stored(weights: str) -> Model:
    """The checkpoint of the tables in which weights are stored so.

    Raises:
        RequestError: there is none.
    """
    if weights not in STAGES:
        raise RequestError(f"weights are {weights!r}; the vendor's tables have {', '.join(STAGES)}")
    return Model.of(ModelConfig.preset("flash"), STAGES[weights], weights)


def file_bytes(model: Model, weights: str) -> int:
    """W: bytes of a checkpoint's files.

    Of official ones the tensors and, in a file for each layer, embedding and head, their headers.  What the INT4
    checkpoint has beside experts is not published: its reading in `inventory` is that of the whole, headers included.
    """
    if weights == "w4a16":
        return model.stored_bytes
    config = model.config
    if weights == "bf16":
        config = dataclasses.replace(config, expert_dtype=None, quantization=None)
    return model.stored_bytes + _header_bytes(config, model.num_stored_stages)


def sessions(memory_bytes: float, gpus: int, weight_bytes: int, each_bytes: int, share: float = MEMORY_SHARE) -> float:
    """Sessions by the convention."""
    return (share * memory_bytes - weight_bytes / gpus - RESERVE_BYTES) / each_bytes


def cells() -> list[VendorCell]:
    """Every cell of the tables."""
    models = {w: stored(w) for w in STAGES}
    weights = {w: file_bytes(model, w) for w, model in models.items()}
    rented = {c.name: c for c in configurations()}
    text = (resources.files("pyrosome.plan") / "vendor_cells.toml").read_text(encoding="utf-8")
    held: dict[tuple[int, int, str], dict[str, int]] = {}  # the same wherever as many GPUs have as much memory
    found = []
    for cell in tomllib.loads(text)["cell"]:
        name, form = cell["name"], cell["weights"]
        config, there = models[form].config, rented[name].machine()
        if (key := (there.device.memory_bytes, there.count, form)) not in held:
            held[key] = _ours(models[form], there)
        found.append(
            VendorCell(
                table=cell["table"],
                name=name,
                weights=form,
                gpus=cell["gpus"],
                mode=cell["mode"],
                usd_hour=rented[name].usd_hour,
                predicted=sessions(cell["gb"] * GIB, cell["gpus"], weights[form], request_bytes(config)),
                listed=cell["listed"],
                ours=held[key],
                why=_why(config, cell["mode"]),
            )
        )
    return found


def report() -> dict[str, Any]:
    """The cells as plain data, with predictions to three decimals as the tables have them."""
    found = [dataclasses.asdict(c) | {"predicted": round(c.predicted, 3)} for c in cells()]
    return {"cells": found, "basis": BASIS}


def _ours(model: Model, there: Machine) -> dict[str, int]:
    """Sessions of the tables' context that the engine's own inventory finds room for, one of them prefilling."""
    asked = Asked(model, there, context=CONTEXT, step_tokens=STEP_TOKENS)
    layouts = (Layout.of(mode, there.count) for mode in MODES)
    return {x.mode: most_sessions(asked, x, Placement()) for x in layouts if not x.why_not(model.config)}


def _why(config: ModelConfig, mode: str) -> str:
    """Why a cell of this mode is not what its machine holds."""
    each, decoding = request_bytes(config), request_bytes(config, batched_tokens=1)
    allowance = (
        f"every session is charged {each / GIB:.2f} GiB, of which {1 - decoding / each:.0%} are room for a prefill "
        f"that one session at a time runs; one that decodes takes {decoding / GIB:.2f} GiB there"
    )
    if mode == "pp":
        return (
            f"pp: too low: the formula gives every GPU the rows of all {config.num_hidden_layers} layers, and a stage "
            f"of a pipeline keeps those of its own layers alone; and {allowance}"
        )
    return (
        f"tp: every GPU keeps the one latent head's rows whole, so that GPUs are paid for and add no rows; {allowance}"
    )


def _header_bytes(config: ModelConfig, num_stages: int) -> int:
    """Bytes of the headers of an official checkpoint's files."""
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for tensor in official_storage(config, num_stages):
        first, _, rest = tensor[0].partition(".")
        if first in ("layers", "mtp"):
            first = f"{first}.{rest.partition('.')[0]}"
        files.setdefault(first if first.startswith(("layers", "mtp", "embed")) else "head", []).append(tensor)
    return sum(_header(tensors) for tensors in files.values())


def _header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes of one file's header and of its length before it, filled up to eight as the container does."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        begin = end
    return 8 + -(-len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()) // 8) * 8
