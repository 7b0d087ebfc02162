"""Network and cache together: sequences that grow, a step at a time.

Shape letters: T tokens in step, B spans, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.errors import CacheInvariantBroken, RequestError
from pyrosome.model.build import Network
from pyrosome.model.mtp import keep_streams, streams_at
from pyrosome.model.step import Span, Step
from pyrosome.ops import native
from pyrosome.ops.linear import linear
from pyrosome.ops.seam import Place


@dataclasses.dataclass(eq=False)
class Sequence:
    """Tokens being grown: a slot of the cache, and how many positions it holds."""

    slot: int  # 0 once it is closed
    length: int = 0
    is_broken: bool = False  # a step failed after some layers had overwritten rows that earlier positions need


class Runner:
    """Runs steps of ragged spans through one network and one cache pool.

    Every forward of this package goes through here or through `DeepseekV4.forward` itself: prompt parts,
    single tokens and draft verifications are the same call.
    """

    def __init__(
        self, model: Network, kv_format: str, max_sequences: int, max_context: int, *, num_drafts: int = 0
    ) -> None:
        self.model = model
        self.device = model.embed.device
        self.has_drafts = len(model.mtp) > 0
        self.num_drafts = num_drafts
        # Elsewhere (a GPU, the definitions asked for, no compiler) torch keeps its threads, and nothing is built.
        is_native = linear.pick(Place(self.device.type, (0, 0), "", False)).name == "cpu"
        self._one_pool = native.one_pool if is_native else contextlib.nullcontext
        self.pool = CachePool(
            model.config,
            kv_format,
            max_sequences,
            max_context,
            num_drafts=num_drafts,
            drafts=self.has_drafts,
            device=self.device,
        )

    def open(self) -> Sequence:
        """Start an empty sequence."""
        return Sequence(self.pool.open())

    def close(self, sequence: Sequence) -> None:
        """End a sequence and free what it holds."""
        self.pool.close(sequence.slot)
        sequence.slot = 0  # another sequence may have it next

    @torch.inference_mode()
    def step(self, spans: Items[tuple[Sequence, Items[int]]], *, every_row: bool = False) -> list[Tensor]:
        """Append ids to each sequence in one forward.

        Returns: per span, float32 logits [V] after its last token, or [len, V] after each with `every_row`.

        Raises:
            RequestError: an empty span, an id outside the vocabulary, or one sequence twice.
            ContextTooLong: a sequence would outgrow the pool.
            CacheInvariantBroken: a sequence was closed, or a step of it failed half-way.
        """
        step = self._admit(spans)
        with self._one_pool(), self._whole_or_broken(spans):
            streams = self.model(step, cache=self.pool.layers(step)).streams
            logits = self.model.logits(streams if every_row else streams[step.last_token_B()])
            if self.has_drafts:  # last: where the head fails, the streams of the position before are still there
                keep_streams(step, streams, self.pool.draft_hidden)
        self._commit(spans)
        return list(logits.split([len(ids) for _, ids in spans]) if every_row else logits)

    @torch.inference_mode()
    def step_with_drafts(self, sequence: Sequence, ids: Items[int]) -> Tensor:
        """Append `ids` to a sequence and run its MTP stage over every position whose next id is known.

        Returns: float32 [n, V], the stage's logits at positions start - 1 (0 at the beginning) to the last but one.
        """
        spans = [(sequence, ids)]
        step = self._admit(spans)
        with self._one_pool(), self._whole_or_broken(spans):
            logits = self._drafted(step, sequence, ids)
        self._commit(spans)
        return logits

    def _drafted(self, step: Step, sequence: Sequence, ids: Items[int]) -> Tensor:
        start = sequence.length
        streams = self.model(step, cache=self.pool.layers(step)).streams
        ring = self.pool.draft_hidden
        first = max(start - 1, 0)
        known = list(ids) if start else list(ids)[1:]
        logits = torch.empty(0, self.model.config.vocab_size, device=self.device)
        if known:
            draft_step = Step.of([Span(sequence.slot, first, known)], self.device)
            hidden = streams_at(draft_step, step, streams, ring)
            logits, _ = self.model.draft_stage.draft(self.model, draft_step, hidden, self.pool.draft_layer(draft_step))
        keep_streams(step, streams, ring)
        return logits

    def _admit(self, spans: Items[tuple[Sequence, Items[int]]]) -> Step:
        if len({id(s) for s, _ in spans}) != len(spans) or not spans:
            raise RequestError(f"a step takes each sequence once, and at least one; {len(spans)} spans were given")
        vocabulary = self.model.config.vocab_size
        for sequence, ids in spans:
            if sequence.slot == 0 or sequence.is_broken:
                state = "has been closed" if sequence.slot == 0 else "broke when a step of it failed half-way"
                raise CacheInvariantBroken(
                    f"a sequence of {sequence.length} tokens {state} and cannot go on; open another"
                )
            check_ids(ids, vocabulary)
            self.pool.grow(sequence.slot, sequence.length + len(ids))
        return Step.of([Span(s.slot, s.length, ids) for s, ids in spans], self.device)

    @contextlib.contextmanager
    def _whole_or_broken(self, spans: Items[tuple[Sequence, Items[int]]]) -> Iterator[None]:
        """Where the forward fails, sequences whose rings it may have spoilt must not go on.

        A ring has room for the tokens of a draft check beside the rows that earlier positions need; a longer span
        overwrites those, unless it is the first.
        """
        try:
            yield
        except BaseException:
            for sequence, ids in spans:
                sequence.is_broken = sequence.length > 0 and len(ids) > max(1, self.num_drafts)
            raise

    @staticmethod
    def _commit(spans: Items[tuple[Sequence, Items[int]]]) -> None:
        for sequence, ids in spans:
            sequence.length += len(ids)


def check_ids(ids: Items[int], vocab_size: int) -> None:
    """Refuse what no embedding has a row for.

    Raises:
        RequestError: no ids at all, or one outside 0..vocab_size - 1.
    """
    if len(ids) == 0:
        raise RequestError("an empty prompt was given; pass at least one token id (beginning-of-sentence will do)")
    for at, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"token {token!r} at position {at} is not an id of this model's vocabulary (integers 0 to "
                f"{vocab_size - 1}); encode the text with this checkpoint's own tokenizer"
            )
