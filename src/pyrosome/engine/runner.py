"""Network and cache together: sequences that grow, a step at a time.

Shape letters: T tokens in step, B spans, V vocabulary, J residual streams, D model dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from pyrosome.cache.pool import CachePool, Holding
from pyrosome.cache.state import Snapshot, put_snapshot, take_snapshot
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.engine.graphs import StepGraphs
from pyrosome.errors import CacheInvariantBroken, RequestError
from pyrosome.model.build import Network
from pyrosome.model.mtp import keep_streams, streams_at
from pyrosome.model.step import Span, Step
from pyrosome.ops import native, workspace
from pyrosome.ops.linear import linear
from pyrosome.ops.seam import Place


@dataclasses.dataclass(eq=False)
class Sequence:
    """Tokens being grown: what it holds of the cache, and how many positions are there."""

    holding: Holding
    length: int = 0
    draft_from: int = 0  # the draft stage's window holds positions draft_from..draft_to
    draft_to: int = 0
    written: int = 0  # rows were written up to here, those of rejected drafts included
    state_from: int = 0  # where state was put or rebuilt: nothing is kept that only a shorter length needs
    is_broken: bool = False  # a step failed after some layers had overwritten rows that earlier positions need

    @property
    def slot(self) -> int:
        """Its place in the state tensors; 0 where it has none."""
        return self.holding.slot


class Runner:
    """Runs steps of ragged spans through one network and one cache pool.

    Every forward of this package goes through here or through `DeepseekV4.forward` itself: prompt parts,
    single tokens and draft verifications are the same call.
    """

    def __init__(
        self,
        model: Network,
        kv_format: str,
        max_sequences: int,
        max_context: int,
        *,
        num_drafts: int = 0,
        cache_tokens: int | None = None,
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
            cache_tokens=cache_tokens,
            device=self.device,
        )
        self.graphs = StepGraphs(model, self.pool) if is_native else None

    def open(self) -> Sequence:
        """Start an empty sequence.

        Raises:
            DoesNotFit: all slots are taken.
        """
        sequence = Sequence(self.pool.open())
        self.pool.prepare(sequence.holding, 0, 0)
        return sequence

    def close(self, sequence: Sequence) -> None:
        """End a sequence and free what it holds."""
        self.pool.release(sequence.holding)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same past: everything shared, nothing copied before one of them goes on."""
        self._check(sequence)
        return dataclasses.replace(sequence, holding=self.pool.fork(sequence.holding, sequence.length))

    def can_rewind(self, sequence: Sequence, length: int) -> bool:
        """Whether the rings still hold what a sequence cut back to `length` tokens needs."""
        least = max(0, sequence.state_from, sequence.written - self.num_drafts)
        return least <= length <= sequence.length

    def snapshot(self, sequence: Sequence, length: int | None = None) -> Snapshot:
        """The state of a sequence, copied to the host; after `length` tokens, where `can_rewind` says so."""
        self._check(sequence)
        length = sequence.length if length is None else length
        draft_from = sequence.draft_from if sequence.draft_to >= length - 1 else length
        return take_snapshot(self.pool, sequence.holding, length, min(draft_from, length))

    def restore(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Give a sequence the state of `snapshot`; its pages hold the history before it.

        Raises:
            DoesNotFit: no slot or page is free.
        """
        # Rows since the last block are in the snapshot, and are written with it.
        self.pool.prepare(sequence.holding, snapshot.length // BLOCK_TOKENS * BLOCK_TOKENS, snapshot.length)
        put_snapshot(self.pool, sequence.holding, snapshot)
        sequence.length = sequence.written = sequence.state_from = snapshot.length
        sequence.draft_to = max(0, snapshot.length - 1)
        sequence.draft_from = min(snapshot.draft_from, sequence.draft_to)
        sequence.is_broken = False

    @torch.inference_mode()
    def step(self, spans: Items[tuple[Sequence, Items[int]]], *, every_row: bool = False) -> list[Tensor]:
        """Append ids to each sequence in one forward.

        Returns: per span, float32 logits [V] after its last token, or [len, V] after each with `every_row`.

        Raises:
            RequestError: an empty span, an id outside the vocabulary, or one sequence twice.
            ContextTooLong: a sequence would outgrow the pool.
            DoesNotFit: no slot or page is free.
            CacheInvariantBroken: a sequence was closed, or a step of it failed half-way.
        """
        return self.forward(spans, [len(ids) if every_row else 1 for _, ids in spans], last_alone=not every_row)[0]

    @torch.inference_mode()
    def forward(
        self, spans: Items[tuple[Sequence, Items[int]]], rows: Items[int], *, last_alone: bool = False
    ) -> tuple[list[Tensor], list[bool], Forward]:
        """As `step`, with logits after the last `rows[b]` tokens of each span: [rows, V] ([V] with `last_alone`).

        Returns: (logits, whether all of a span's streams are numbers, what the draft stage starts from).
        """
        step = self._admit(spans)
        workspace.give_back(workspace.KEPT_S)
        with self._one_pool(), self._whole_or_broken(spans):
            wanted = [t for (_, last), n in zip(step.layout, rows, strict=True) for t in range(last - n, last)]
            captured = self.graphs.run(step) if self.graphs else None
            if captured is not None:
                streams, logits = captured
                logits = logits if len(wanted) == len(logits) else logits[wanted]
            else:
                streams = self.model(step, cache=self.pool.layers(step)).streams
                logits = streams.new_empty(0, self.model.config.vocab_size)
                if wanted:
                    at = torch.tensor(wanted, device=self.device)
                    logits = self.model.logits(streams if len(wanted) == streams.shape[0] else streams[at])
            if self.has_drafts:  # last: where the head fails, the streams of the position before are still there
                before = self.pool.draft_hidden[step.slot_B]
                keep_streams(step, streams, self.pool.draft_hidden)
            finite_T = torch.cat([torch.isfinite(part.abs().amax(1)) for part in streams.flatten(1).split(256)])
        forward = Forward(step, streams, before if self.has_drafts else None)
        for sequence, ids in spans:
            sequence.length += len(ids)
            sequence.written = sequence.length
        finite_T = finite_T.cpu()  # one wait for the device, not one a span
        is_finite = [bool(finite_T[first:last].all()) for first, last in step.layout]
        return list(logits if last_alone else logits.split(list(rows))), is_finite, forward

    @torch.inference_mode()
    def logits(self, forward: Forward, first: int, last: int) -> Tensor:
        """Float32 logits [last - first, V] after tokens first..last - 1 of a forward's step."""
        with self._one_pool():
            return self.model.logits(forward.streams[first:last]).float()

    @torch.inference_mode()
    def step_with_drafts(self, sequence: Sequence, ids: Items[int]) -> Tensor:
        """Append `ids` to a sequence and run its MTP stage over every position whose next id is known.

        Returns: float32 [n, V], the stage's logits at positions start - 1 (0 at the beginning) to the last but one.
        """
        start = sequence.length
        _, _, forward = self.forward([(sequence, ids)], [1])
        known = list(ids) if start else list(ids)[1:]
        if not known:
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        return self.draft(forward, [(sequence, max(start - 1, 0), known)], every_row=True)[0]

    @torch.inference_mode()
    def draft(
        self, forward: Forward, spans: Items[tuple[Sequence | None, int, Items[int]]], *, every_row: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the draft stage over (sequence, first position, the ids *after* its positions), one per forward's span.

        The first position is the forward's own, or the last before it.  An empty list of ids leaves a sequence out.

        Returns: (float32 logits [B, V] after each span's last position, or [T, V]; what a deeper draft starts from).
        """
        assert forward.before is not None
        for sequence, first, ids in spans:
            if sequence and ids and sequence.draft_to != first:  # rows of positions that were skipped are not there
                sequence.draft_from = first
        step = Step.of(
            [Span(s.slot, first, ids, s.draft_from) if s else Span(0, 0, ()) for s, first, ids in spans],
            self.device,
            pad_lengths_to=1,
        )
        with self._one_pool():
            streams = streams_at(step, forward.step, forward.streams, forward.before)
            streams = self.model.draft_stage.streams(self.model, step, streams, self.pool.draft_layer(step))
            last = streams if every_row else streams[step.last_token_B()]
            logits = self.model.draft_stage.logits(self.model, last)
        for sequence, first, ids in spans:
            if sequence and ids:
                sequence.draft_to = first + len(ids)
        return logits, last

    @torch.inference_mode()
    def draft_deeper(self, spans: Items[tuple[Sequence, int, int]], streams_BJD: Tensor) -> tuple[Tensor, Tensor]:
        """One more draft per sequence, from the stage's own streams: (sequence, position, the id after it).

        Rows of guessed positions stand in the ring's spare places until true ones are written over them.

        Returns: (float32 logits [B, V], streams [B, J, D]).
        """
        step = Step.of([Span(s.slot, position, [token], s.draft_from) for s, position, token in spans], self.device)
        with self._one_pool():
            return self.model.draft_stage.draft(self.model, step, streams_BJD, self.pool.draft_layer(step))

    @torch.inference_mode()
    def replay(self, sequence: Sequence, ids: Items[int], stop: int, *, step_tokens: int = 2048) -> float:
        """Rebuild the state after `stop` tokens from the history that the sequence's pages hold, writing none of it.

        Each layer needs the last window of the layer below: so a layer begins one window later than the one before
        it.  A sequence that has state of an earlier position (`length`) goes on from there where that is nearer.

        Args:
            ids: the sequence's ids, from position 0 to at least `stop`.

        Returns: tokens computed, in tokens through the whole network.
        """
        config = self.model.config
        num_layers, reach = config.num_hidden_layers, config.sliding_window - 1
        starts = [stop - reach * (num_layers + self.has_drafts - layer) for layer in range(num_layers)]
        floors = [start if start > sequence.length else 0 for start in starts]
        starts = [max(start, sequence.length) for start in starts]
        self.pool.prepare(sequence.holding, stop, stop)
        before, sequence.is_broken = max(sequence.length, stop - reach), sequence.length > 0  # until it is through
        with self._one_pool():
            for low in range(starts[0], stop, step_tokens):
                high = min(low + step_tokens, stop)
                step, streams = self._replay_trunk(sequence, ids, low, high, starts, floors, stop)
                if self.has_drafts and streams is not None:
                    self._replay_draft(sequence, ids, step, streams, before)
        sequence.length = sequence.written = sequence.state_from = stop
        sequence.is_broken = False
        sequence.draft_from, sequence.draft_to = min(before, stop - 1), stop - 1
        return sum(stop - start for start in starts) / num_layers

    def _replay_trunk(
        self,
        sequence: Sequence,
        ids: Items[int],
        low: int,
        high: int,
        starts: list[int],
        floors: list[int],
        context: int,
    ) -> tuple[Step, Tensor | None]:
        """(the last layer's step, its streams), None where positions low..high end before it begins."""
        streams, step = None, None
        for layer, (start, floor) in enumerate(zip(starts, floors, strict=True)):
            first = max(low, start)
            if first >= high:
                streams = None
                break
            if step is None or int(high - first) != step.ids_T.shape[0] or floor != floors[layer - 1]:
                span = Span(sequence.slot, first, ids[first:high], floor)
                step = Step.of([span], self.device, context=context, is_replay=True)
            if streams is not None:
                streams = streams[-(high - first) :]
            streams = self.model(step, streams, [layer], cache={layer: self.pool.layer(layer, step)}).streams
        assert step is not None
        return step, streams

    def _replay_draft(self, sequence: Sequence, ids: Items[int], step: Step, streams: Tensor, before: int) -> None:
        """The draft stage's window over the last positions, whose streams are true ones from `before` on."""
        keep_streams(step, streams, self.pool.draft_hidden)
        stop = int(step.mirror[0][1])  # type: ignore[index]
        first, last = max(before, stop - streams.shape[0]), min(stop, step.context - 1)
        if first < last:
            span = Span(sequence.slot, first, ids[first + 1 : last + 1], before)
            draft_step = Step.of([span], self.device)
            at = streams.shape[0] - (stop - first)
            self.model.draft_stage.streams(
                self.model, draft_step, streams[at : at + last - first], self.pool.draft_layer(draft_step)
            )

    def _check(self, sequence: Sequence) -> None:
        if not sequence.holding.is_open or sequence.is_broken:
            state = "broke when a step of it failed half-way" if sequence.is_broken else "has been closed"
            raise CacheInvariantBroken(f"a sequence of {sequence.length} tokens {state} and cannot go on; open another")

    def _admit(self, spans: Items[tuple[Sequence, Items[int]]]) -> Step:
        if len({id(s) for s, _ in spans}) != len(spans) or not spans:
            raise RequestError(f"a step takes each sequence once, and at least one; {len(spans)} spans were given")
        vocabulary = self.model.config.vocab_size
        for sequence, ids in spans:
            self._check(sequence)
            check_ids(ids, vocabulary)
            self.pool.prepare(sequence.holding, sequence.length, sequence.length + len(ids))
        context = 0
        if self.graphs and all(len(ids) == 1 for _, ids in spans):
            context = self.graphs.context_of(max(s.length + 1 for s, _ in spans))
        return Step.of([Span(s.slot, s.length, ids) for s, ids in spans], self.device, context=context)

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
                sequence.written = max(sequence.written, sequence.length + len(ids))
                spoilt = sequence.written - sequence.length > max(1, self.num_drafts)
                sequence.is_broken = sequence.length > 0 and spoilt
            raise


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """What a forward leaves for the draft stage: its step, its last streams, and those of the position before it."""

    step: Step
    streams: Tensor  # [T, J, D]
    before: Tensor | None  # [B, R, J D], the ring as it was


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
