"""Where routed experts live, and how a token reaches them.

The network calls `ExpertBank.run(layer, x, expert, weight)` and does not know whether the weights are
resident, in a mapped file or on another rank: only this file may.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrosome.dist import Mesh
from pyrosome.errors import EngineError, UnsupportedFormat
from pyrosome.model.numerics import Numerics, unchanged
from pyrosome.ops import native
from pyrosome.ops.experts import ExpertWeights, routed_experts
from pyrosome.quant import QuantTensor
from pyrosome.quant.mapped import MappedStack
from pyrosome.quant.tiles import TiledWeight, tiled_bytes


class ExpertBank(nn.Module):
    """A rank's routed experts: one stack [E, ...] per layer and matrix.

    Resident ones are copied to their places in stacks that are allocated once (`assign`), which keeps the peak of a
    load at the weights plus one shard.  Mapped ones stay in the checkpoint's files and are read from there (`keep`), so
    that memory may be smaller than they are; the files must not change as long as the bank lives (`quant.mapped`).
    One rank holds all experts; of several, each holds a run of them (`Mesh.part`).
    """

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, limit: float, mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self.num_experts, self.limit = num_experts, limit
        self.mesh = mesh or Mesh.single()
        self.shapes = {"w1": (intermediate, hidden), "w3": (intermediate, hidden), "w2": (hidden, intermediate)}
        self._stacks: dict[tuple[str, str], Tensor | QuantTensor] = {}
        self._prepare: dict[str, object] = {}
        self._kinds: dict[tuple[str, str], str] = {}
        self._kept: dict[tuple[str, str], dict[int, QuantTensor]] = {}

    @property
    def held(self) -> range:
        """The experts of each layer that this rank holds."""
        return self.mesh.part(self.num_experts)

    def share(self, mesh: Mesh) -> None:
        """Hold this rank's experts only, and sum with the other ranks.

        Raises:
            EngineError: experts were assigned already.
        """
        if filled := len(self._stacks) + len(self._kept):
            raise EngineError(
                f"{mesh.size} ranks were to share a bank of {filled} filled stacks; share it before weights are "
                "assigned"
            )
        self.mesh = mesh

    def assign(
        self,
        layer: str,
        expert: int,
        matrix: str,
        value: Tensor | QuantTensor,
        numerics: Numerics,
        *,
        unpack: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        """Copy one expert's matrix to its place in the stack of its layer; another rank's is checked and dropped.

        Raises:
            UnsupportedFormat: experts of one layer are stored in different ways.
        """
        self._check_alike(layer, expert, matrix, value, numerics)
        if unpack:
            value = value.dequantize(torch.float32) if isinstance(value, QuantTensor) else value.float()
        stack = self._stacks.get((layer, matrix))
        if stack is None:
            stack = self._stacks[layer, matrix] = _empty_stack(len(self.held), value, device)
            if isinstance(stack, Tensor):
                self.register_parameter(_parameter_name(layer, matrix), nn.Parameter(stack, requires_grad=False))
        if expert not in self.held:
            return
        expert -= self.held.start
        if isinstance(stack, TiledWeight) and isinstance(value, QuantTensor):
            native.tiled(value, out=stack.data[expert])
        elif isinstance(stack, QuantTensor) and isinstance(value, QuantTensor):
            stack.data[expert].copy_(value.data)
            stack.scale[expert].copy_(value.scale)
        elif isinstance(stack, Tensor) and isinstance(value, Tensor):
            with torch.no_grad():
                self.get_parameter(_parameter_name(layer, matrix))[expert].copy_(value)

    def keep(self, layer: str, expert: int, matrix: str, value: QuantTensor, numerics: Numerics) -> None:
        """Hold one expert's matrix where it is, in a mapped file; another rank's is checked and let go.

        Raises:
            UnsupportedFormat: experts of one layer are stored in different ways.
        """
        self._check_alike(layer, expert, matrix, value, numerics)
        kept = self._kept.setdefault((layer, matrix), {})
        if expert in self.held:
            kept[expert] = value

    def _check_alike(
        self, layer: str, expert: int, matrix: str, value: Tensor | QuantTensor, numerics: Numerics
    ) -> None:
        kind = value.format if isinstance(value, QuantTensor) else str(value.dtype).removeprefix("torch.")
        alike = self._kinds.setdefault((layer, matrix), kind)
        prepare = numerics.activation if isinstance(value, QuantTensor) else unchanged
        if kind != alike or self._prepare.setdefault(layer, prepare) is not prepare:
            raise UnsupportedFormat(
                f"{layer}.ffn.experts.{expert}.{matrix} is stored in {kind} and others of its layer in another way; a "
                "layer's experts are held in one stack, so store them alike"
            )

    def tiles(self) -> list[Tensor]:
        """What resident quantised experts take up."""
        return [s.data for s in self._stacks.values() if isinstance(s, QuantTensor) and not isinstance(s, MappedStack)]

    def weights(self, layer: str) -> ExpertWeights:
        """The stacks of one layer that this rank holds, as stored."""

        def stack(matrix: str) -> Tensor | QuantTensor:
            held = self._stacks.get((layer, matrix))
            if held is None:
                kept = self._kept[layer, matrix]
                in_order = tuple(kept[e] for e in self.held)
                held = MappedStack.of(self._kinds[layer, matrix], in_order, *self.shapes[matrix])
                self._stacks[layer, matrix] = held
            return held if isinstance(held, QuantTensor) else self.get_parameter(_parameter_name(layer, matrix))

        prepare = self._prepare[layer]
        return ExpertWeights(stack("w1"), stack("w3"), stack("w2"), prepare, self.held.start, self.num_experts)  # type: ignore[arg-type]

    def run(self, layer: str, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [T, D] in promote(x, float32), the same on every rank."""
        return self.mesh.sum(routed_experts(x_TD, self.weights(layer), expert_TK, weight_TK, self.limit))


def _parameter_name(layer: str, matrix: str) -> str:
    return f"{layer}.{matrix}".replace(".", "_")


def _empty_stack(num: int, like: Tensor | QuantTensor, device: torch.device | str) -> Tensor | QuantTensor:
    if isinstance(like, QuantTensor):
        if torch.device(device).type == "cpu" and native.available():
            N, K = like.shape
            data = native.empty_pages(num, tiled_bytes(like.format, N, K))
            return TiledWeight(like.format, data, data.new_empty(0), num_rows=N, num_inputs=K)
        return QuantTensor(like.format, _empty_stack(num, like.data, device), _empty_stack(num, like.scale, device))  # type: ignore[arg-type]
    if torch.device(device).type == "cpu":
        return native.empty_like_on_pages(like, num)
    return torch.empty(num, *like.shape, dtype=like.dtype, device=device)
