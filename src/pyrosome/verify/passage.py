"""One sequence of ids, taken through a network part by part: a layer, the head, the draft stage.

Shape letters: T tokens, J residual streams, D model dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.streams import index_row_bytes, kv_row_bytes
from pyrosome.checkpoint.index import CheckpointIndex
from pyrosome.checkpoint.load import read_tensors
from pyrosome.config import CSA_RATIO, ModelConfig
from pyrosome.errors import CheckpointError
from pyrosome.model.build import Network
from pyrosome.model.numerics import EXACT, TRAINED, Numerics
from pyrosome.model.step import Span, Step
from pyrosome.verify.parts import names_of

MAX_TOKENS = 2304  # of the sequence: past what V4-Flash's indexer can keep (512 rows of 4 tokens)
LOGIT_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """What is loaded and run at once."""

    name: str
    kind: str
    names: tuple[str, ...]  # of its tensors
    run: Callable[[Network, Tensor, Numerics], Tensor]  # (network, streams [T, J, D]) -> streams or logits
    layer: int = -1  # its number, of a layer

    @property
    def is_draft(self) -> bool:
        """Whether it needs a network with a draft stage."""
        return self.name == "draft stage"


class Passage:
    """The ids, the spans they are computed in, and the parts of the network on their way."""

    def __init__(self, index: CheckpointIndex, device: str, *, quick: bool, seed: int) -> None:
        self.index, self.config, self.device, self.quick = index, index.config, device, quick
        self.ids = _ids(self.config, quick, seed)
        self.spans = _spans(len(self.ids))
        self.formats = {n.name: _row_format(self.config, n) for n in (EXACT, TRAINED)}

    def embedded(self) -> Tensor:
        """The streams before the first layer, float32 [T, J, D]."""
        ((_, table),) = read_tensors(self.index, ["embed.weight"])
        assert isinstance(table, Tensor)
        rows_TD = table[torch.tensor(self.ids)].float().to(self.device)
        return rows_TD[:, None].expand(-1, self.config.hc_mult, -1).contiguous()

    def parts(self) -> list[Part]:
        """All layers, or (quick) the first of each kind and the last; then the head, and the draft stage if it runs."""
        c, layers = self.config, list(range(self.config.num_hidden_layers))
        if self.quick:
            first = {(c.ratio_of(i), c.is_hash(i)): i for i in reversed(layers)}
            layers = sorted({*first.values(), layers[-1]})
        parts = [self._layer(i) for i in layers]
        head = ("norm.weight", "head.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
        parts.append(Part("head", "final norm and head", head, self._logits))
        if self.index.has_drafts and c.dspark is None:
            names = (*names_of(self.index, "mtp."), "embed.weight")
            parts.append(Part("draft stage", "MTP", names, self._draft))
        return parts

    def _layer(self, layer: int) -> Part:
        ratio = self.config.ratio_of(layer)
        kind = "window" if not ratio else "CSA" if ratio == CSA_RATIO else "HCA"

        def run(network: Network, streams_TJD: Tensor, numerics: Numerics) -> Tensor:
            pool, holding = self._pool(numerics, ratio)
            outs = []
            for first, last in self.spans:
                step = Step.of([Span(holding.slot, first, self.ids[first:last])], self.device)
                cache = {layer: pool.layer(0, step)}
                outs.append(network(step, streams_TJD[first:last], [layer], cache=cache).streams)
            return torch.cat(outs)

        return Part(f"layer {layer}", kind, tuple(names_of(self.index, f"layers.{layer}.")), run, layer)

    def _logits(self, network: Network, streams_TJD: Tensor, _: Numerics) -> Tensor:
        return network.logits(streams_TJD[-LOGIT_ROWS:]).float()

    def _draft(self, network: Network, streams_TJD: Tensor, numerics: Numerics) -> Tensor:
        """The MTP stage's streams: at each position it reads the id after it."""
        pool, holding = self._pool(numerics, 0, drafts=True)
        outs = []
        for first, last in self.spans:
            if ids := self.ids[first + 1 : last + 1]:
                step = Step.of([Span(holding.slot, first, ids)], self.device)
                before = streams_TJD[first : first + len(ids)]
                outs.append(network.draft_stage.streams(network, step, before, pool.draft_layer(step)))
        return torch.cat(outs)

    def _pool(self, numerics: Numerics, ratio: int, drafts: bool = False) -> tuple[CachePool, Holding]:
        """A cache of one layer of that ratio, and the sequence in it."""
        one = dataclasses.replace(
            self.config, num_hidden_layers=1, compress_ratios=(ratio,), num_nextn_predict_layers=0, num_hash_layers=0,
            dspark=None,
        )  # fmt: skip
        pool = CachePool(one, self.formats[numerics.name], 1, len(self.ids), drafts=drafts, device=self.device)
        holding = pool.open()
        pool.prepare(holding, 0, len(self.ids))
        return pool, holding


def _ids(config: ModelConfig, quick: bool, seed: int) -> list[int]:
    """Ids that fill windows, tails and pages, and of whose rows (not quick) an indexer must choose."""
    enough = 2 * max(config.sliding_window, 128) + 61
    if not quick and CSA_RATIO in config.layer_ratios:
        enough = max(enough, CSA_RATIO * config.index_topk + 165)
    enough = min(enough, MAX_TOKENS, config.max_position_embeddings)
    rng = random.Random(f"layers {seed}")
    return [config.bos_token_id, *(rng.randrange(config.vocab_size) for _ in range(enough - 1))]


def _spans(num_tokens: int) -> list[tuple[int, int]]:
    """A long span, one onto a filled history that ends off every boundary, a short one, a single token."""
    cuts = {0, num_tokens * 5 // 8 | 1, num_tokens - 6, num_tokens - 1, num_tokens}
    return list(pairwise(sorted(c for c in cuts if 0 <= c <= num_tokens)))


def _row_format(config: ModelConfig, numerics: Numerics) -> str:
    """The arithmetic's own format of rows, or bf16 where rows of this shape cannot be stored in it."""
    try:
        kv_row_bytes(config, numerics.default_kv_format)
        if CSA_RATIO in config.layer_ratios:
            index_row_bytes(config, numerics.default_kv_format)
    except CheckpointError:
        return "bf16"
    return numerics.default_kv_format
