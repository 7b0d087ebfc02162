"""Drafts for many sequences at once: by the checkpoint's own head, or from what a sequence has said before.

What is proposed never changes an answer, only how many steps it takes.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from pyrosome.engine.runner import Forward, Runner, Sequence
from pyrosome.engine.sampler import draw_drafts
from pyrosome.engine.speculate import Depth, PromptLookup, StepCost, resolve_drafter
from pyrosome.engine.track import Completion
from pyrosome.options import EngineOptions

Served = tuple[Completion, int]  # and the position its span began at


class Drafter:
    """Proposes the next ids of sequences after a step; this one none."""

    def __init__(self, max_drafts: int = 0) -> None:
        self.max_drafts, self.cost = max_drafts, StepCost()

    def depth(self) -> Depth:
        """How deep to draft for a completion that begins."""
        return Depth(self.max_drafts, self.cost)

    def propose(self, served: Items[Served], forward: Forward) -> None:
        """Set `drafts` of the completions served by a step, the forward's own spans first and in its order."""


class LookupDrafter(Drafter):
    """What followed a sequence's last ids the last time they were there: documents quote themselves."""

    def propose(self, served: Items[Served], forward: Forward) -> None:
        for c, _ in served:
            if not _goes_on(c):
                continue
            if c.track.lookup is None:
                c.track.lookup = PromptLookup()
                c.track.lookup.extend(c.track.ids)
            c.drafts = c.track.lookup.propose(c.depth.choose())


class HeadDrafter(Drafter):
    """The checkpoint's MTP stage; deeper drafts feed its own streams back."""

    def __init__(self, runner: Runner, max_drafts: int) -> None:
        super().__init__(max_drafts)
        self.runner = runner

    def propose(self, served: Items[Served], forward: Forward) -> None:
        served = served[: len(forward.step.layout)]  # a twin drafts from its next step on
        depths = [c.depth.choose() if _goes_on(c) else 0 for c, _ in served]
        spans = [self._span(c, start, depth) for (c, start), depth in zip(served, depths, strict=True)]
        if not any(ids for _, _, ids in spans):
            return
        logits_BV, streams_BJD = self.runner.draft(forward, spans)
        going = [b for b, depth in enumerate(depths) if depth]
        logits_BV, streams_BJD = logits_BV[going], streams_BJD[going]
        for depth in range(max(depths)):
            if depth:
                stay = [i for i, b in enumerate(going) if depths[b] > depth]
                going = [going[i] for i in stay]
                at = [(served[b][0], served[b][0].track.length + depth - 1) for b in going]
                deeper = [(c.sequence, position, c.drafts[-1]) for c, position in at]
                logits_BV, streams_BJD = self.runner.draft_deeper(deeper, streams_BJD[stay])
            drafting = [served[b][0] for b in going]
            ahead = [len(c.track.ids) + depth for c in drafting]
            drafts = draw_drafts(logits_BV, [c.sampler for c in drafting], ahead)
            for c, draft in zip(drafting, drafts, strict=True):
                c.drafts.append(draft)

    @staticmethod
    def _span(c: Completion, start: int, depth: int) -> tuple[Sequence | None, int, list[int]]:
        """The positions whose next id is known now, from where the stage's window ends or the step began.

        Where no draft is wanted nothing is run: the window then has a gap, and begins anew after it.
        """
        sequence = c.track.sequence
        if sequence is None or (c.is_decoding and not depth):
            return None, 0, []
        first = start - 1 if start and sequence.draft_to == start - 1 else start
        return sequence, first, c.track.ids[first + 1 : sequence.length + 1]


def drafter_for(options: EngineOptions, runner: Runner) -> Drafter:
    """The drafter asked for.

    Raises:
        RequestError: this checkpoint does not have it; the message names the one it has.
    """
    kind = resolve_drafter(options.drafter, runner.has_drafts, runner.model.config.dspark is not None)
    if kind == "off" or not options.max_drafts:
        return Drafter()
    return LookupDrafter(options.max_drafts) if kind == "lookup" else HeadDrafter(runner, options.max_drafts)


def _goes_on(c: Completion) -> bool:
    """Whether a completion has its next id and may generate more than that."""
    return c.track.sequence is not None and c.is_decoding and c.num_pending == 1
