"""A checkpoint ready to run: its network, its logits, and engines on it.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pyrosome.cache.streams import check_kv_format
from pyrosome.checkpoint.fingerprint import fingerprint
from pyrosome.checkpoint.index import CheckpointIndex, open_checkpoint
from pyrosome.config import ModelConfig
from pyrosome.engine.engine import Engine
from pyrosome.engine.runner import Runner, check_ids
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.model.build import Network, build
from pyrosome.model.numerics import numerics_named
from pyrosome.options import EngineOptions, LoadOptions


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """A network with its weights, and the row format its caches are opened in."""

    network: Network
    config: ModelConfig
    numerics: str
    kv_format: str
    path: Path
    index: CheckpointIndex

    @property
    def has_drafts(self) -> bool:
        """Whether an MTP stage was loaded with the trunk."""
        return len(self.network.mtp) > 0

    def runner(self, max_sequences: int = 4, max_context: int = 4096, *, num_drafts: int = 0) -> Runner:
        """Open a cache for up to `max_sequences` sequences of up to `max_context` tokens each."""
        return Runner(self.network, self.kv_format, max_sequences, max_context, num_drafts=num_drafts)

    def engine(self, options: EngineOptions | None = None, tokenizer_path: str | Path | None = None) -> Engine:
        """An engine with a cache of its own; see `engine.worker` for where to run it.

        Args:
            tokenizer_path: the tokenizer.json that grammars are of; None: the checkpoint's own.

        Raises:
            DoesNotFit: the cache would not hold one block.
            RequestError: a drafter was asked for that this checkpoint does not have.
        """
        tokenizer = Path(tokenizer_path or self.path / "tokenizer.json")
        return Engine(
            self.network,
            self.kv_format,
            options,
            fingerprint=fingerprint(self.index, self.numerics, self.kv_format),
            tokenizer_path=tokenizer if tokenizer.exists() else None,
        )

    def logits(self, ids: Sequence[int], cuts: Iterable[int] | None = None) -> Tensor:
        """Logits after each token, float32 [T, V], computed through the cache.

        Args:
            cuts: positions where a span ends and the next begins, ascending, each in 1..T-1;
                `range(1, len(ids))` is token by token, None is one span.

        Raises:
            RequestError: no ids, an id outside the vocabulary, cuts out of order.
            ContextTooLong: more ids than the model has positions for.
        """
        ids = self._checked(ids)
        runner = self.runner(1, len(ids))
        sequence = runner.open()
        rows = [runner.step([(sequence, ids[a:b])], every_row=True)[0] for a, b in _pieces(len(ids), cuts)]
        return torch.cat(rows).float()

    def draft_logits(self, ids: Sequence[int], cuts: Iterable[int] | None = None) -> Tensor:
        """Logits of the MTP stage, float32 [T - 1, V]: row t reads token t + 1 and is about token t + 2.

        Raises:
            RequestError: as `logits`; or this checkpoint has no MTP stage.
        """
        if not self.has_drafts:
            release = "a DSpark head, which this version does not run yet" if self.config.dspark else "no MTP tensors"
            raise RequestError(f"draft logits were asked for and {self.path} has {release}; use `logits`")
        ids = self._checked(ids)
        runner = self.runner(1, len(ids))
        sequence = runner.open()
        rows = [runner.step_with_drafts(sequence, ids[a:b]) for a, b in _pieces(len(ids), cuts)]
        return torch.cat(rows).float()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        check_ids(ids, self.config.vocab_size)
        check_length(len(ids), self.config)
        return ids


def check_length(num_tokens: int, config: ModelConfig) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ContextTooLong
    """
    if num_tokens > config.max_position_embeddings:
        raise ContextTooLong(
            num_tokens, config.max_position_embeddings, "shorten the prompt (max_position_embeddings is the limit)"
        )


def _pieces(length: int, cuts: Iterable[int] | None) -> list[tuple[int, int]]:
    cuts = list(cuts) if cuts is not None else []
    if cuts != sorted(set(cuts)) or any(not 0 < c < length for c in cuts):
        raise RequestError(f"cuts must ascend within 1..{length - 1} for {length} tokens; {cuts} were given")
    edges = [0, *cuts, length]
    return list(pairwise(edges))


def load_model(
    path_or_name: str | Path,
    device: str = "cpu",
    numerics: str = "exact",
    kv_format: str | None = None,
    *,
    unpack: bool | None = None,
    experts: str = "resident",
    lock_memory: bool = False,
    numa: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint in the official layout: a directory, a single file, or a built-in name.

    Args:
        numerics: "exact" (no rounding simulated) or "trained" (every rounding the weights were trained with).
        kv_format: stored cache rows: "f32", "bf16" or "fp8"; None takes the numerics' own (exact f32, trained fp8).
        unpack: hold float32 copies of the weights (True), hold them as stored (False), or decide by size (None).
        experts: "resident" (in memory) or "mapped" (routed experts stay in the checkpoint's files and are read from
            there: slower, for less memory than they take; the files must not change while the model lives).
        lock_memory: never swap out quantised weights that are in memory; where that is not allowed, a warning says so.
        numa: "auto" (weights are spread over the machine's memory nodes, where there are several) or "off".
        progress: called with (bytes read, bytes in all, shard name).

    Raises:
        CheckpointError: the files are not what they claim to be, or the shape cannot be stored in `kv_format`.
        RequestError: an option out of its range, unknown numerics, or a device that is not there.
    """
    options = LoadOptions(experts, lock_memory, numa)
    arithmetic = numerics_named(numerics)
    _check_device(device)
    kv_format = kv_format or arithmetic.default_kv_format
    index = open_checkpoint(path_or_name)
    check_kv_format(index.config, kv_format)  # before the load
    network = build(index, arithmetic, device=device, unpack=unpack, options=options, progress=progress)
    return LoadedModel(network, index.config, numerics, kv_format, index.path, index)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {device!r} was asked for and torch cannot use it ({str(error).splitlines()[0]}); "
            "'cpu' always works"
        ) from None


def open_engine(
    path: str,
    numerics: str = "trained",
    kv_format: str | None = None,
    device: str = "cpu",
    *,
    experts: str = "resident",
    lock_memory: bool = False,
    numa: str = "auto",
    tokenizer_path: str | None = None,
    **options: object,
) -> Engine:
    """Load a checkpoint and make an engine on it, from plain data: what a process of its own begins with."""
    model = load_model(path, device, numerics, kv_format, experts=experts, lock_memory=lock_memory, numa=numa)
    return model.engine(EngineOptions(**options), tokenizer_path)  # type: ignore[arg-type]
