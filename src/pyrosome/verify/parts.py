"""Networks of which one part is filled: as its tensors lie in the files, and as the engine holds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from pyrosome.checkpoint.index import CheckpointIndex
from pyrosome.checkpoint.load import read_tensors
from pyrosome.checkpoint.names import IGNORED, scale_name
from pyrosome.model.build import UNPACK_BYTES, Network, fill
from pyrosome.model.layers import Weight
from pyrosome.model.numerics import Numerics
from pyrosome.ops import native
from pyrosome.ops.linear import dense
from pyrosome.quant import QuantTensor
from pyrosome.quant.tiles import TiledWeight, untile

_EXPERT = re.compile(r"(.+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")


def names_of(index: CheckpointIndex, *prefixes: str) -> list[str]:
    """Tensors whose names begin with one of the prefixes, scales included."""
    return [n for n in index.tensors if n.startswith(prefixes) and n not in IGNORED]


def bytes_of(index: CheckpointIndex, names: Collection[str]) -> int:
    """Payload bytes of tensors."""
    return sum(index.tensors[n].nbytes for n in names)


def as_stored(
    index: CheckpointIndex, names: Collection[str], numerics: Numerics, device: str, *, drafts: bool = False
) -> Network:
    """A network with these tensors in rows, as the files have them: what the definitions are run on.

    On the CPU quantised weights are views of the files, and take no memory of their own.
    """
    network = Network(index.config, numerics, drafts=drafts)
    for name, value in read_tensors(index, names):
        if not isinstance(value, QuantTensor) or torch.device(device).type != "cpu":
            fill(network, [(name, value)], device=device)
        elif found := _EXPERT.fullmatch(name):
            network.bank.keep(found[1], int(found[2]), found[3], value, numerics)
        else:
            _take(network, name, value)
    return network.eval()


def _take(network: Network, name: str, value: QuantTensor) -> None:
    module = network.get_submodule(name.removesuffix(".weight"))
    assert isinstance(module, Weight)  # the inventory lets nothing else be quantised
    module.prepare = network.numerics.activation
    del module.value  # a registered parameter cannot be replaced by anything else
    module.value = value


def as_held(
    index: CheckpointIndex, names: Collection[str], numerics: Numerics, device: str, *, drafts: bool = False
) -> Network:
    """A network with these tensors as the engine holds them: in tiles, where its kernels read tiles."""
    network = Network(index.config, numerics, drafts=drafts)
    on_cpu = torch.device(device).type == "cpu"
    unpack = 4 * index.num_weights <= UNPACK_BYTES and not (on_cpu and native.available())  # as `build` decides
    fill(network, read_tensors(index, names), device=device, unpack=unpack)
    return network.eval()


def altered(network: Network, index: CheckpointIndex, names: Collection[str]) -> Iterator[str]:
    """Weights that the network does not hold as the files have them."""
    scales = {scale_name(n) for n in names if n.endswith(".weight")}
    for name, value in read_tensors(index, names):
        if name in scales or not name.endswith(".weight"):
            continue
        if found := _EXPERT.fullmatch(name):
            stack = getattr(network.bank.weights(found[1]), found[3])
            number = torch.tensor([int(found[2])], device=stack.device)
            held = stack.index_select(number) if isinstance(stack, QuantTensor) else stack[int(found[2])]
        else:
            module = network.get_submodule(name.removesuffix(".weight"))
            if not isinstance(module, Weight):
                continue
            held = module.value
        if not _same(held, value):
            yield name


def _same(held: Tensor | QuantTensor, value: Tensor | QuantTensor) -> bool:
    if isinstance(held, TiledWeight):
        held = untile(held)
    if isinstance(held, QuantTensor) and isinstance(value, QuantTensor):
        held = held.to("cpu")
        return all(
            torch.equal(a.view(torch.uint8).flatten(), b.contiguous().view(torch.uint8).flatten())
            for a, b in ((held.data, value.data), (held.scale, value.scale))
        )
    return torch.equal(dense(held, torch.float32).cpu().reshape(value.shape), dense(value, torch.float32))
