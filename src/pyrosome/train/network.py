"""A network to be trained: its first values, its weights by name, and those weights in the official layout.

Masters are float32 and belong to the optimizer; the network reads copies.  A copy is the master itself, or in a run
that ends in quantised weights the value that its stored form will have: gradients then pass straight through.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.checkpoint.names import TensorSpec, expected_tensors
from pyrosome.checkpoint.save import save_checkpoint
from pyrosome.config import ModelConfig, QuantizationConfig
from pyrosome.errors import CheckpointError
from pyrosome.model.build import Network, fill
from pyrosome.model.numerics import EXACT, TRAINED
from pyrosome.quant import FORMATS, QuantTensor

Layout = Literal["bf16", "fp8fp4"]
# Weight of the norms of KV rows.  With normalised queries and keys no attention logit is above sqrt(head_dim) times
# this, and at 1 a small head is too soft to pick one row among many.
KV_NORM = 2.0
_ADAMW = re.compile(r"(embed|head)\.weight|.*norm\.weight|.*hc_\w+_(base|scale)|.*attn_sink")
_NOT_TRAINED = re.compile(r".*\.gate\.(bias|tid2eid)")


def initial_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """First value of every tensor the configuration implies; each depends on the seed and its name alone."""
    for name, spec in expected_tensors(config, config.num_nextn_predict_layers).items():
        g = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        yield name, _first_value(config, name, spec, g)


def _first_value(c: ModelConfig, name: str, spec: TensorSpec, g: torch.Generator) -> Tensor:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if spec.kind == "table":  # a hash: every token's experts are distinct, and all experts are as likely
        return torch.rand(spec.shape[0], c.n_routed_experts, generator=g).argsort(-1)[:, : spec.shape[1]].contiguous()
    if leaf.endswith("_base"):
        return (
            _mixing_base(c.hc_mult, zlib.crc32(name.encode())) if spec.shape[0] > c.hc_mult else torch.zeros(spec.shape)
        )
    if leaf.endswith("_scale"):
        return torch.full(spec.shape, 0.1)
    if leaf in ("attn_sink", "bias"):
        return torch.zeros(spec.shape)
    if spec.kind == "vector":
        return torch.full(
            spec.shape, KV_NORM if leaf == "kv_norm" or name.endswith("attn.compressor.norm.weight") else 1.0
        )
    noise = torch.randn(spec.shape, generator=g)
    if leaf == "embed":
        return noise
    if leaf == "head":
        return noise * 0.02
    if leaf == "ape":
        return noise * 0.1
    gain = 0.5 if leaf in ("wo_b", "w2") else 1.0  # what is added to the streams begins small
    return noise * gain * spec.shape[-1] ** -0.5


def _mixing_base(J: int, turn: int) -> Tensor:
    """Static part of a hyper-connection: it reads one stream more than the others, and leaves the streams apart."""
    base = torch.zeros((2 + J) * J)
    base[:J] = -1.0
    base[turn % J] = 1.0
    base[2 * J :].view(J, J).fill_diagonal_(4.0)
    return base


class Masters:
    """The float32 weights that are trained, by the official names; expert weights of a layer are one stack.

    Attributes:
        weights: name -> tensor; "layers.3.ffn.experts.w1" [E, I, D] for the experts of a layer.
        fixed: what is not trained by gradients: balancing biases and hash tables.
    """

    config: ModelConfig
    specs: dict[str, TensorSpec]
    weights: dict[str, Tensor]
    fixed: dict[str, Tensor]

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._of(config, {}, {})
        missing = self.specs.keys() - tensors.keys()
        if missing:
            raise CheckpointError(f"{min(missing)} is missing among the {len(tensors)} tensors given to be trained")
        for name, spec in self.specs.items():
            if tuple(tensors[name].shape) != spec.shape:
                raise CheckpointError(
                    f"{name} of the checkpoint has shape {tuple(tensors[name].shape)} and the recipe's model asks for "
                    f"{spec.shape}; train with the checkpoint's own configuration"
                )
        self.fixed = {n: tensors[n] for n in self.specs if _NOT_TRAINED.fullmatch(n)}
        for name in self.specs:
            stack = _stack_of(name)
            if name in self.fixed:
                continue
            if stack == name:
                self.weights[name] = tensors[name].float().clone()
            elif stack not in self.weights:
                each = [tensors[_expert(stack, e)].float() for e in range(config.n_routed_experts)]
                self.weights[stack] = torch.stack(each)

    def _of(self, config: ModelConfig, weights: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        self.config, self.weights, self.fixed = config, weights, fixed
        self.specs = expected_tensors(config, config.num_nextn_predict_layers)

    @property
    def adamw(self) -> list[str]:
        """Embedding, head, norms, static parts of hyper-connections and sinks (report, section 4.2.2)."""
        return [n for n in self.weights if _ADAMW.fullmatch(n)]

    @property
    def parts(self) -> dict[str, int]:
        """Matrices that are read as groups of rows."""
        return {n: self.config.o_groups for n in self.weights if n.endswith("wo_a.weight")}

    def named(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its official name, in the checkpoint's order."""
        weights = self.weights if weights is None else weights
        for name in self.specs:
            stack = _stack_of(name)
            if name in self.fixed:
                yield name, self.fixed[name]
            elif stack == name:
                yield name, weights[name]
            else:
                yield name, weights[stack][int(name.split(".experts.")[1].split(".")[0])]

    def stored(self, layout: Layout) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        """Every tensor as a checkpoint of that layout holds it."""
        for name, value in self.named():
            yield name, stored_form(value, self.specs[name], layout)


def stored_form(value: Tensor, spec: TensorSpec, layout: Layout) -> Tensor | QuantTensor:
    """A tensor as a checkpoint holds it: experts FP4 and projections FP8, or all matrices bfloat16."""
    if spec.kind == "table":
        return value
    if spec.kind == "f32":
        return value.float()
    if layout == "fp8fp4" and spec.kind in ("matrix", "expert"):
        name = "fp4" if spec.kind == "expert" else "fp8"
        return QuantTensor(name, *FORMATS[name].quantize(value.float()))
    return value.bfloat16()


def _stack_of(name: str) -> str:
    """The name under which a tensor is trained: its own, or its layer's stack of experts."""
    return re.sub(r"\.experts\.\d+\.(w\d)\.weight$", r".experts.\1", name)


def _expert(stack: str, number: int) -> str:
    return re.sub(r"\.experts\.(w\d)$", rf".experts.{number}.\1.weight", stack)


def trainable_network(masters: Masters, *, quantized: bool, device: torch.device | str = "cpu") -> Network:
    """A network that reads copies of the masters and takes gradients.

    Args:
        quantized: with the roundings that official weights are served with: of activations, cache rows and index rows.
            The copies then hold what the stored form will (`refresh` keeps them so).
    """
    numerics = TRAINED if quantized else EXACT
    model = Network(masters.config, numerics, drafts=bool(masters.config.num_nextn_predict_layers))
    fill(model, masters.stored("fp8fp4") if quantized else masters.named(), unpack=True, device=device)
    for parameter in parameters_of(model, masters).values():
        parameter.requires_grad_(True)
    for indexer in (block.attn.indexer for block in model.layers if hasattr(block.attn, "indexer")):  # type: ignore[union-attr]
        for weight in (indexer.wq_b, indexer.weights_proj, indexer.compressor.wkv, indexer.compressor.wgate):  # type: ignore[union-attr]
            weight.prepare = _apart(weight.prepare)  # type: ignore[union-attr, arg-type]
    return model.train()


def _apart(prepare):  # type: ignore[no-untyped-def]
    """What an indexer reads, cut off: it learns from its own loss, and its loss teaches nobody else."""
    return lambda x: prepare(x.detach())


def parameters_of(model: Network, masters: Masters) -> dict[str, Tensor]:
    """The network's parameter for each master."""
    held = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name in masters.weights:
        layer, _, matrix = name.partition(".ffn.experts.")
        if matrix:
            found[name] = held[f"bank.{layer.replace('.', '_')}_{matrix}"]
        else:
            path = re.sub(r"hc_(attn|ffn|head)_(fn|base|scale)$", r"hc_\1.\2", name)
            as_value = re.sub(r"\.weight$", ".value", path)
            found[name] = held[as_value] if as_value in held else held[path]
    return found


@torch.no_grad()
def refresh(parameters: Mapping[str, Tensor], masters: Masters, *, quantized: bool) -> None:
    """Copy the masters to where the network reads them; `quantized`: the values their stored form will have."""
    for name, parameter in parameters.items():
        value = masters.weights[name]
        kind = masters.specs[name if name in masters.specs else _expert(name, 0)].kind
        if quantized and kind != "f32":
            form = stored_form(value, TensorSpec(tuple(value.shape), kind), "fp8fp4")
            value = form.dequantize(torch.float32) if isinstance(form, QuantTensor) else form.float()
        parameter.copy_(value)


def load_masters(path: str | Path, config: ModelConfig) -> Masters:
    """Masters from a checkpoint, to train on from there.

    Raises:
        CheckpointError: it cannot be read, or is of another shape than `config`.
    """
    index = open_checkpoint(path)
    index.check().raise_if_bad()
    found = {
        name: value.dequantize(torch.float32) if isinstance(value, QuantTensor) else value.clone()
        for name, value in read_tensors(index, list(index.tensors))
    }
    return Masters(config, found)


def export(path: Path, masters: Masters, layout: Layout, tokenizer_files: list[Path]) -> None:
    """Write the masters as a checkpoint of the official layout, with the tokenizer beside it."""
    values = dataclasses.replace(masters.config, expert_dtype=None, quantization=None).to_dict()
    if layout == "fp8fp4":
        values = dataclasses.replace(masters.config, expert_dtype="fp4", quantization=QuantizationConfig()).to_dict()
    values = {"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": "bfloat16"} | values
    save_checkpoint(path, values, masters.stored(layout), copy_files=tokenizer_files)
