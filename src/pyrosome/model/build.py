"""A checkpoint's tensors, put where the network keeps them."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pyrosome.checkpoint.headers import TensorInfo
from pyrosome.checkpoint.index import CheckpointIndex
from pyrosome.checkpoint.load import check_scale, read_tensors
from pyrosome.checkpoint.names import scale_name
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, RequestError, TruncatedFile, UnsupportedFormat
from pyrosome.model.deepseek_v4 import DeepseekV4
from pyrosome.model.layers import Weight
from pyrosome.model.mtp import MTPStage
from pyrosome.model.numerics import Numerics
from pyrosome.ops import native
from pyrosome.options import LoadOptions
from pyrosome.quant import QuantTensor, format_of
from pyrosome.quant.formats import DTYPES
from pyrosome.quant.mapped import map_file

log = logging.getLogger(__name__)

# A model whose weights take no more than this in float32 is unpacked at load where torch's products run: same values,
# fewer conversions.  The native kernels are fastest with weights as stored.
UNPACK_BYTES = 2 << 30

Progress = Callable[[int, int, str], None]
_EXPERT = re.compile(r"(.+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")
_HYPER_CONNECTION = re.compile(r"hc_(attn|ffn|head)_(fn|base|scale)$")


class Network(DeepseekV4):
    """The trunk with the draft stages that stand beside it."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, drafts: bool) -> None:
        super().__init__(config, numerics)
        self.mtp = nn.ModuleList([MTPStage(config, 0, numerics)] if drafts else [])

    @property
    def draft_stage(self) -> MTPStage:
        """The MTP stage; a network without one has none to give."""
        stage = self.mtp[0]
        assert isinstance(stage, MTPStage)
        return stage


def build(
    index: CheckpointIndex,
    numerics: Numerics,
    *,
    device: torch.device | str = "cpu",
    unpack: bool | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Network:
    """Check a checkpoint and load it, shard by shard.

    With `options.experts` "mapped" the routed experts are not loaded: the network reads them in the files, which must
    not change as long as it lives.

    Args:
        unpack: hold float32 copies of all weights (True), hold them as stored (False), or decide by size (None).
            The arithmetic is the same; memory and speed differ.
        options: where weights are held; None: all of them in memory.
        progress: called with (bytes read, bytes in all, shard name).

    Raises:
        CheckpointError: a tensor is missing, unexpected, truncated, or not of the shape the configuration implies; or
            experts that are not quantised were to be mapped.
        RequestError: experts were to be mapped and unpacked, or mapped on another device.
    """
    options = options or LoadOptions()
    index.check().raise_if_bad()
    if options.experts == "mapped":
        options.check_device(str(device))
        if unpack:
            raise RequestError(
                "mapped experts were asked for with unpack, which makes float32 copies; leave out one of the two"
            )
        unpack = False  # float32 copies of what surrounds the experts would change nothing but memory
    if unpack is None:
        is_native = torch.device(device).type == "cpu" and native.available()
        unpack = 4 * index.num_weights <= UNPACK_BYTES and not is_native
    drafts = index.has_drafts and index.config.dspark is None
    if index.has_drafts and not drafts:
        log.warning("%s has a DSpark head of %d stages, which this version leaves out", index.path, index.num_stages)
    if index.config.unknown_keys:
        unknown = ", ".join(index.config.unknown_keys)
        log.warning("%s: config.json has keys unknown here, kept and without effect: %s", index.path, unknown)
    model = Network(index.config, numerics, drafts=drafts)
    names = [n for n in index.tensors if drafts or not n.startswith("mtp.")]
    mapped = [n for n in names if _EXPERT.fullmatch(n)] if options.experts == "mapped" else []
    apart = {*mapped, *map(scale_name, mapped)}
    with native.spread() if options.numa == "auto" else contextlib.nullcontext():
        fill(model, read_tensors(index, [n for n in names if n not in apart], progress), device=device, unpack=unpack)
    for name, value in _in_place(index, mapped):
        layer, number, matrix = _expert(name)
        model.bank.keep(layer, number, matrix, value, numerics)
    model.eval()
    if options.lock_memory and (why_not := native.lock(_tiles(model))):
        log.warning("lock_memory: the weights may be swapped out: %s", why_not)
    return model


def _in_place(index: CheckpointIndex, names: Collection[str]) -> Iterator[tuple[str, QuantTensor]]:
    """(name, value) of quantised weights as views of their shards, which stay mapped; of each only the scale is read.

    Raises:
        CheckpointError: a weight is not quantised, a scale holds a NaN byte, or a shard was cut or cannot be mapped.
    """
    if plain := [n for n in names if scale_name(n) not in index.tensors]:
        raise UnsupportedFormat(
            f"mapped experts were asked for and {plain[0]} of {index.path} is {index.tensors[plain[0]].dtype} without "
            'a scale; only quantised experts are read in place: load these with experts="resident"'
        )
    # Checked through a mapping that goes when it is done, or what was read here would count as held by this process.
    for name, scale in read_tensors(index, [scale_name(n) for n in names]):
        assert isinstance(scale, Tensor)
        check_scale(index.tensors[name], name, scale)
    files: dict[Path, Tensor] = {}
    for name in names:
        data, scale = (_view(index.tensors[n], files) for n in (name, scale_name(name)))
        yield name, QuantTensor(format_of(data, scale).name, data, scale)


def _view(info: TensorInfo, files: dict[Path, Tensor]) -> Tensor:
    """A tensor's bytes in its file."""
    if info.file not in files:
        try:
            files[info.file] = map_file(info.file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"shard {info.file} cannot be mapped ({error}); download it again") from None
    whole = files[info.file]
    if info.end > len(whole):
        raise TruncatedFile(
            f"shard {info.file} has {len(whole)} bytes and needs at least {info.end}: it was cut after it was opened; "
            "download it again"
        )
    return whole[info.begin : info.end].view(DTYPES[info.dtype]).view(info.shape)


def _tiles(model: Network) -> list[Tensor]:
    """Memory of the weights that are held quantised, mapped ones aside."""
    alone = [m.value.data for m in model.modules() if isinstance(m, Weight) and isinstance(m.value, QuantTensor)]
    return [*alone, *model.bank.tiles()]


def fill(
    model: DeepseekV4,
    tensors: Iterable[tuple[str, Tensor | QuantTensor]],
    *,
    device: torch.device | str = "cpu",
    unpack: bool = False,
) -> None:
    """Give every named tensor to the module that keeps it.  Values are copied: no file stays mapped."""
    model.rotary.to(device)
    for name, value in tensors:
        _place(model, name, value, unpack, torch.device(device))


def _table(name: str, value: Tensor | QuantTensor, num_experts: int) -> Tensor:
    """A hash layer's table of experts by token id, held to the experts there are."""
    assert isinstance(value, Tensor)  # the inventory allows integers only
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= num_experts:
        raise CheckpointError(
            f"{name} names experts {low} to {high}, and there are experts 0 to {num_experts - 1}; download its shard "
            "again"
        )
    return value.long()


def _expert(name: str) -> tuple[str, int, str]:
    """(layer, number, matrix) of the name of a routed expert's weight."""
    found = _EXPERT.fullmatch(name)
    assert found
    layer, number, matrix = found.groups()
    return layer, int(number), matrix


def _place(model: DeepseekV4, name: str, value: Tensor | QuantTensor, unpack: bool, device: torch.device) -> None:
    """Each holder takes a copy: `value` may be a view of a mapped file."""
    if _EXPERT.fullmatch(name):
        layer, number, matrix = _expert(name)
        model.bank.assign(layer, number, matrix, value, model.numerics, unpack=unpack, device=device)
        return
    path, _, leaf = _HYPER_CONNECTION.sub(r"hc_\1.\2", name).rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Weight):
        module.assign(value, model.numerics, unpack=unpack, device=device)
    elif leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, _table(name, value, model.config.n_routed_experts).to(device, copy=True))
    else:  # small vectors and float32 matrices: their maths is float32 whatever they are stored in
        small = value.dequantize(torch.float32) if isinstance(value, QuantTensor) else value.float()
        setattr(module, leaf, nn.Parameter(small.to(device, copy=True), requires_grad=False))
