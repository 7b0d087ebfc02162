"""A checkpoint's tensors, put where the network keeps them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pyrosome.checkpoint.index import CheckpointIndex
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError
from pyrosome.model.deepseek_v4 import DeepseekV4
from pyrosome.model.layers import Weight
from pyrosome.model.mtp import MTPStage
from pyrosome.model.numerics import Numerics
from pyrosome.quant import QuantTensor

log = logging.getLogger(__name__)

# A model whose weights take no more than this in float32 is unpacked at load: same values, fewer conversions.
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
    progress: Progress | None = None,
) -> Network:
    """Check a checkpoint and load it, shard by shard.

    Args:
        unpack: hold float32 copies of all weights (True), hold them as stored (False), or decide by size (None).
            The arithmetic is the same; memory and speed differ.
        progress: called with (bytes read, bytes in all, shard name).

    Raises:
        CheckpointError: a tensor is missing, unexpected, truncated, or not of the shape the configuration implies.
    """
    index.check().raise_if_bad()
    if unpack is None:
        unpack = 4 * index.num_weights <= UNPACK_BYTES
    drafts = index.has_drafts and index.config.dspark is None
    if index.has_drafts and not drafts:
        log.warning("%s has a DSpark head of %d stages, which this version leaves out", index.path, index.num_stages)
    if index.config.unknown_keys:
        unknown = ", ".join(index.config.unknown_keys)
        log.warning("%s: config.json has keys unknown here, kept and without effect: %s", index.path, unknown)
    model = Network(index.config, numerics, drafts=drafts)
    names = None if drafts else [n for n in index.tensors if not n.startswith("mtp.")]
    fill(model, read_tensors(index, names, progress), device=device, unpack=unpack)
    model.eval()
    return model


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
        _place(model, name, _own(value, torch.device(device)), unpack)


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


def _own(value: Tensor | QuantTensor, device: torch.device) -> Tensor | QuantTensor:
    if isinstance(value, QuantTensor):
        return QuantTensor(value.format, _own(value.data, device), _own(value.scale, device))  # type: ignore[arg-type]
    return value.to(device, copy=True)


def _place(model: DeepseekV4, name: str, value: Tensor | QuantTensor, unpack: bool) -> None:
    if expert := _EXPERT.fullmatch(name):
        layer, number, matrix = expert.groups()
        model.bank.assign(layer, int(number), matrix, value, model.numerics, unpack=unpack)
        return
    path, _, leaf = _HYPER_CONNECTION.sub(r"hc_\1.\2", name).rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Weight):
        module.assign(value, model.numerics, unpack=unpack)
    elif leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, _table(name, value, model.config.n_routed_experts))
    else:  # small vectors and float32 matrices: their maths is float32 whatever they are stored in
        small = value.dequantize(torch.float32) if isinstance(value, QuantTensor) else value.float()
        setattr(module, leaf, nn.Parameter(small, requires_grad=False))
