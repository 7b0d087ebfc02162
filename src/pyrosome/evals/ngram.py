"""What counting gives: n-gram models of token ids, to measure a network against.

Interpolated Kneser-Ney: counts of the longest context less a discount, what that leaves given to the next shorter one,
whose counts are of the different tokens a passage was met after; at the end all tokens alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Numbers = NDArray[np.float64]
_FACTOR, _SPREAD = np.uint64(0xD6E8FEB86659FD93), np.uint64(0x9E3779B97F4A7C15)  # odd
_MOST = 0.9  # of a count, that is given away: of few counts, all are one


class _Level(NamedTuple):
    """Counts of one order: of passages (context and token), and of their contexts."""

    passages: Keys
    counts: Numbers
    contexts: Keys
    totals: Numbers
    followers: Numbers  # different tokens after each context
    discount: float


class NGram:
    """A proper distribution of the next token after up to `order` - 1 before it.

    Args:
        texts: ids of each passage to learn from; nothing reaches over the end of one.
        vocab_size: ids there are; those never seen have their share too.
    """

    def __init__(self, order: int, vocab_size: int, texts: Iterable[Sequence[int]]) -> None:
        self.order, self.vocab_size = order, vocab_size
        ids, place = _joined(texts)
        keys = _keys(ids, order + 1)
        self._levels = []
        for n in range(1, order + 1):
            # What a text begins with is given, and never counted as what follows.
            at = np.flatnonzero(place >= max(n - 1, 1))
            # The longest passages are counted as they come; of shorter ones, the different ones a token longer,
            # and those that begin a text.
            if n < order:
                longer = np.flatnonzero(place >= n)
                _, first = np.unique(keys[n + 1][longer], return_index=True)
                at = np.concatenate([longer[first], at[place[at] == n - 1]])
            self._levels.append(_level(keys[n][at], _contexts(keys, n, len(ids))[at]))

    def nats(self, ids: Sequence[int]) -> Numbers:
        """What each id after the first costs given those before it, float64 [len(ids) - 1]."""
        array = np.asarray(ids, dtype=np.uint64)
        place, keys = np.arange(len(array)), _keys(array, self.order)
        p = np.full(len(array), 1.0 / self.vocab_size)
        for n, level in enumerate(self._levels, 1):
            context = _contexts(keys, n, len(array))
            total = np.where(place >= n - 1, _looked_up(level.contexts, level.totals, context), 0)
            count = _looked_up(level.passages, level.counts, keys[n])
            followers = _looked_up(level.contexts, level.followers, context)
            kept = np.maximum(count - level.discount, 0) + level.discount * followers * p
            p = np.where(total > 0, kept / np.maximum(total, 1), p)
        return -np.log(p[1:])


def _joined(texts: Iterable[Sequence[int]]) -> tuple[Keys, NDArray[np.int64]]:
    """All ids one after the other, and the place of each in its text."""
    arrays = [np.asarray(t, dtype=np.uint64) for t in texts]
    places = [np.arange(len(a)) for a in arrays]
    if not arrays:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    return np.concatenate(arrays), np.concatenate(places)


def _keys(ids: Keys, longest: int) -> list[Keys]:
    """keys[n][i]: a 64-bit name of the n ids that end with i; of those that reach over the beginning, of no use."""
    token = (ids + np.uint64(1)) * _SPREAD
    token ^= token >> np.uint64(29)
    keys = [np.zeros(len(ids), np.uint64)]
    for n in range(1, longest + 1):
        before = np.concatenate([np.zeros(1, np.uint64), keys[n - 1][:-1]]) if len(ids) else keys[n - 1]
        keys.append((before * _FACTOR + token) * _SPREAD + np.uint64(n))
    return keys


def _contexts(keys: list[Keys], n: int, size: int) -> Keys:
    """Of each place, the name of the n - 1 ids before it."""
    return np.concatenate([np.zeros(1, np.uint64), keys[n - 1][:-1]]) if size else keys[n - 1]


def _level(passages: Keys, contexts: Keys) -> _Level:
    known, first, counts = np.unique(passages, return_index=True, return_counts=True)
    held, totals = np.unique(contexts, return_counts=True)
    _, followers = np.unique(contexts[first], return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = min(once / (once + 2 * twice), _MOST) if once else 0.5
    return _Level(known, counts.astype(float), held, totals.astype(float), followers.astype(float), discount)


def _looked_up(known: Keys, values: Numbers, keys: Keys) -> Numbers:
    if not len(known):
        return np.zeros(len(keys))
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], 0.0)
