"""Where tracks live: in the cache, set aside with their state, or to be found again by their prefix."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

from torch import Tensor

from pyrosome.cache.pool import CachePool
from pyrosome.cache.prefix import Match, PrefixTree
from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.engine.request import Reuse
from pyrosome.engine.runner import Runner, Sequence
from pyrosome.engine.stats import Stats
from pyrosome.engine.track import Track

UNWANTED = "log probabilities of the prompt were asked for, so all of it is computed"


class Residency:
    """Brings tracks into the cache and sets them aside.

    Where memory is short and the prefix tree has no more to give, `set_aside` is called: it sets one track aside, and
    says whether there was one.
    """

    def __init__(self, runner: Runner, tree: PrefixTree, stats: Stats, step_tokens: int) -> None:
        self.runner, self.tree, self.stats, self.step_tokens = runner, tree, stats, step_tokens

    @property
    def pool(self) -> CachePool:
        """The runner's cache pool."""
        return self.runner.pool

    def new_track(self, ids: list[int], salt: str) -> Track:
        """A track of which nothing is computed yet."""
        return Track(ids, self.tree.cursor(salt), salt)

    def make_room(self, track: Track, stop: int, set_aside: Callable[[], bool], *, start: int | None = None) -> bool:
        """Make positions up to `stop` of a track in the cache writable, others making way; whether it could be done.

        Args:
            start: what is before it is only read; None: all that is computed.
        """
        sequence = track.sequence
        assert sequence is not None
        start = sequence.length if start is None else start
        while missing := self.pool.shortage(sequence.holding, start, stop):
            if (missing.slots or not self.tree.make_room(missing)) and not set_aside():
                return False
        self.pool.prepare(sequence.holding, start, stop)
        return True

    def bring_in(self, track: Track, set_aside: Callable[[], bool], most: int | None = None) -> Reuse | None:
        """Give a track its place in the cache, with whatever of its prefix is known; None where there is no room.

        A track that was set aside goes on where it was if its history is still there, and is computed again from its
        longest known prefix if not.

        Args:
            most: tokens that may be taken from what is known; None: any number.
        """
        if not self.pool.num_free_slots and not set_aside():
            return None
        parked = track.parked
        goal = parked.length // BLOCK_TOKENS * BLOCK_TOKENS if parked else len(track.ids) - 1
        goal = goal if most is None else min(goal, most)
        holding, match = self.tree.adopt(self.tree.match(track.ids, track.salt, goal))
        track.sequence, track.cursor = Sequence(holding), self.tree.cursor(track.salt, match)
        is_whole = parked is not None and match.length == goal
        stop = parked.length if parked and is_whole else match.length
        if not self.make_room(track, stop, set_aside, start=match.length):
            self.drop(track)
            return None
        track.parked = None
        if not is_whole:
            found = self._found(track, track.sequence, match)
            return found if most is None else dataclasses.replace(found, limit="not wanted", stream="", reason=UNWANTED)
        assert parked is not None
        self.runner.restore(track.sequence, parked)
        self.stats.resumes += 1
        return Reuse(len(track.ids), parked.length, parked.length, 0, "all")

    def _found(self, track: Track, sequence: Sequence, match: Match) -> Reuse:
        if match.snapshot is not None:
            self.runner.restore(sequence, match.snapshot)
        else:
            self.pool.prepare(sequence.holding, 0, 0)
        replayed = 0.0
        if match.length > sequence.length:
            replayed = self.runner.replay(sequence, track.ids, match.length, step_tokens=self.step_tokens)
            # Whoever leaves this prefix here again finds the state ready.
            self.tree.keep_snapshot(track.cursor, self.runner.snapshot(sequence), pinned=True)
        cost = round(replayed)
        self.stats.replayed_tokens += cost
        return Reuse(
            len(track.ids), match.length, max(0, match.length - cost), cost, match.limit, match.stream, match.reason
        )

    def settle(self, track: Track, start: int) -> None:
        """After a step that computed positions from `start` on: publish finished blocks, keep state at boundaries."""
        sequence = track.sequence
        assert sequence is not None
        self.tree.publish(track.cursor, track.ids, sequence.holding, sequence.length)
        boundary = sequence.length // BLOCK_TOKENS * BLOCK_TOKENS
        if boundary > start and self.runner.can_rewind(sequence, boundary):
            self.tree.keep_snapshot(track.cursor, self.runner.snapshot(sequence, boundary))

    def park(self, track: Track) -> None:
        """Set a track aside: its blocks stay in the prefix tree, the rest in a snapshot."""
        sequence = track.sequence
        assert sequence is not None
        if sequence.is_broken or sequence.length == 0:
            track.parked = None
        else:
            self.tree.publish(track.cursor, track.ids, sequence.holding, sequence.length)
            track.parked = self.runner.snapshot(sequence)
        self.drop(track)
        self.stats.parks += 1

    def drop(self, track: Track) -> None:
        """Give back what a track holds of the cache."""
        if track.sequence is not None:
            self.runner.close(track.sequence)
            track.sequence = None

    def fork(self, track: Track) -> Track:
        """A second track with the same past."""
        twin = dataclasses.replace(track, ids=list(track.ids), cursor=copy.copy(track.cursor), lookup=None)
        twin.sequence = self.runner.fork(track.sequence) if track.sequence and not track.sequence.is_broken else None
        return twin

    def rewind(self, track: Track, length: int) -> int:
        """Cut a track back to `length` ids; returns how many of them will be computed again."""
        del track.ids[length:]
        if track.lookup:
            track.lookup.truncate(length)
        # The last id is computed again in any case: what follows it is chosen from its logits.
        most, sequence = max(0, length - 1), track.sequence
        if track.parked and track.parked.length > most:
            track.parked = None
        if track.parked:
            return length - track.parked.length
        if sequence is not None:
            target = min(sequence.length, most)
            if target == sequence.length or self.runner.can_rewind(sequence, target):
                sequence.length = target
                sequence.draft_to = min(sequence.draft_to, target)
                return length - target
            self.drop(track)
        match = self.tree.match(track.ids, track.salt, most)
        track.cursor = self.tree.cursor(track.salt, match)
        return length - match.length

    def recompute(self, track: Track) -> tuple[Sequence, Tensor] | None:
        """A track's ids computed without reuse: (sequence, logits [V] after the last); None where there is no room."""
        sequence = Sequence(self.pool.open())
        missing = self.pool.shortage(sequence.holding, 0, track.length)
        if missing and (missing.slots or not self.tree.make_room(missing)):
            return None
        ids = track.ids[: track.length]
        for at in range(0, len(ids), self.step_tokens):
            (logits_V,) = self.runner.step([(sequence, ids[at : at + self.step_tokens])])
        return sequence, logits_V

    def replace(self, track: Track, sequence: Sequence) -> None:
        """Go on with a sequence that was computed anew; what the track's prefix held is forgotten."""
        self.tree.drop_path(track.ids[: track.length], track.salt)
        self.drop(track)
        track.sequence, track.cursor = sequence, self.tree.cursor(track.salt)
