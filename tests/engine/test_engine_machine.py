"""Requests and sessions at random, in a cache too small for them: each says what it says alone, and nothing is lost.

Every answer is checked against a fresh computation of its ids, by the same sampler.
`PYROSOME_FUZZ_STEPS=1000000 pytest tests/engine/test_engine_machine.py` goes on for as long as one likes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyrosome.cache.pool import Shortage
from pyrosome.engine.request import Ended, Request, TokenEvent
from pyrosome.engine.sampler import Row, SamplerState, choose_all
from pyrosome.errors import ContextTooLong, RequestError
from pyrosome.options import SamplingParams
from tests.engine.engines import Eager, bytes_for, engine_of, is_empty
from tests.machines import machine_test
from tests.networks import agreeing_network, run

MAX_CONTEXT = 512
MAX_SESSIONS = 4
WHO = st.integers(0, 7)
NETWORK = agreeing_network((4, 128))


def _books() -> list[list[int]]:
    """Texts that begin alike and part within a block and at the end of one."""
    chance = random.Random(5)

    def text(n: int) -> list[int]:
        return [chance.randrange(160) for _ in range(n)]

    first = text(600)
    return [first, *(first[:at] + text(600 - at) for at in (70, 128, 200))]


BOOKS = _books()


@dataclasses.dataclass
class Asked:
    """A request, the ids it goes on from, and what it has said."""

    request: Request
    ids: list[int]
    said: list[list[int]]
    open: set[int]
    may_fail: bool = False


@dataclasses.dataclass
class Known:
    """A session as it should be."""

    id: str
    ids: list[int]
    busy: str = ""


class Serving(RuleBasedStateMachine):
    @initialize(
        drafter=st.sampled_from(["off", "mtp", "lookup"]),
        slots=st.sampled_from([2, 3, 5]),
        step_tokens=st.sampled_from([24, 150, 512]),
        host=st.booleans(),
        states=st.sampled_from([0, 3, 100]),
    )
    def begin(self, drafter, slots, step_tokens, host, states):
        logging.disable(logging.CRITICAL)  # of the steps that are broken on purpose
        self.is_whole = True
        self.folder = Path(tempfile.mkdtemp())
        self.engine = engine_of(
            NETWORK, drafter=drafter, max_sequences=slots, step_tokens=step_tokens, max_context=MAX_CONTEXT,
            cache_bytes=bytes_for(NETWORK.config, 640, slots), host_bytes=host << 20, self_check=0.5,
            snapshot_bytes=states * 20_000,
        )  # fmt: skip
        self.asked: dict[str, Asked] = {}
        self.sessions: list[Known] = []
        self.saved: list[tuple[Path, list[int]]] = []
        self.number = 0
        self.breaks = 0
        drafts = self.engine.drafter
        drafts.depth = lambda: Eager(drafts.max_drafts, drafts.cost)  # how long steps take must not change a run
        forward = self.engine.runner.forward

        def breaking(spans, rows, **kwargs):
            if self.breaks and len(spans) >= 1:
                self.breaks -= 1
                for a in self.asked.values():
                    a.may_fail = True
                raise RuntimeError("a broken step")
            return forward(spans, rows, **kwargs)

        self.engine.runner.forward = breaking

    # What happens

    @rule(
        book=st.integers(0, 3), length=st.integers(1, 420), most=st.integers(1, 40), seed=st.none() | WHO,
        priority=st.sampled_from([0, 0, 0, 1]), n=st.sampled_from([1, 1, 1, 3]), salt=st.sampled_from(["", "", "b"]),
    )  # fmt: skip
    def ask(self, book, length, most, seed, priority, n, salt):
        self.add(Request(self.name(), tuple(BOOKS[book][:length]), params(most, seed, n), priority, salt), [])

    @precondition(lambda self: self.sessions)
    @rule(who=WHO, book=st.integers(0, 3), count=st.integers(0, 150), most=st.integers(1, 30), seed=st.none() | WHO)
    def go_on(self, who, book, count, most, seed):
        s = self.sessions[who % len(self.sessions)]
        at = len(s.ids)
        request = Request(self.name(), tuple(BOOKS[book][at : at + count]), params(most, seed), session=s.id)
        try:
            self.add(request, s.ids)
        except ContextTooLong:
            assert at + len(request.ids) > MAX_CONTEXT
        except RequestError:
            assert s.busy or not (s.ids or request.ids)
        else:
            s.busy, s.ids = request.id, s.ids + list(request.ids)

    def add(self, request, before):
        self.engine.add(request)
        ids = [*before, *request.ids]
        n = request.params.n
        self.asked[request.id] = Asked(request, ids, [[] for _ in range(n)], set(range(n)))

    def name(self):
        self.number += 1
        return str(self.number)

    @rule(times=st.sampled_from([1, 1, 2, 8, 40]))
    def step(self, times):
        for _ in range(times):
            self.take(self.engine.step())

    @rule(who=WHO)
    def abort(self, who):
        running = [a for a in self.asked.values() if a.open]
        if running:
            self.engine.abort(running[who % len(running)].request.id)

    @rule(book=st.integers(0, 3), length=st.integers(0, 300))
    def open(self, book, length):
        if len(self.sessions) < MAX_SESSIONS:
            ids = BOOKS[book][:length]
            self.sessions.append(Known(self.engine.call("session_open", ids=ids), ids))

    @precondition(lambda self: self.sessions)
    @rule(who=WHO)
    def fork(self, who):
        if (s := self.free(who)) and len(self.sessions) < MAX_SESSIONS:
            self.sessions.append(Known(self.engine.call("session_fork", session=s.id), list(s.ids)))

    @precondition(lambda self: self.sessions)
    @rule(who=WHO, count=st.integers(0, 9) | st.integers(0, 300))
    def rewind(self, who, count):
        if s := self.free(who):
            count = min(count, len(s.ids))
            again = self.engine.call("session_rewind", session=s.id, num_tokens=count)
            s.ids = s.ids[: len(s.ids) - count]
            assert min(1, len(s.ids)) <= again <= len(s.ids)

    @precondition(lambda self: self.sessions)
    @rule(who=WHO)
    def save(self, who):
        if s := self.free(who):
            path = self.folder / f"{self.name()}.session"
            with no_room_is_fine():
                self.engine.call("session_save", session=s.id, path=str(path))
                self.saved.append((path, list(s.ids)))

    @precondition(lambda self: self.saved)
    @rule(which=WHO)
    def restore(self, which):
        if len(self.sessions) < MAX_SESSIONS:
            path, ids = self.saved[which % len(self.saved)]
            with no_room_is_fine():
                self.sessions.append(Known(self.engine.call("session_restore", path=str(path)), list(ids)))

    @precondition(lambda self: self.sessions)
    @rule(who=WHO)
    def close(self, who):
        if s := self.free(who):
            self.engine.call("session_close", session=s.id)
            self.sessions.remove(s)

    @rule()
    def park(self):
        self.engine.park_idle()

    @rule(pages=st.integers(1, 6))
    def evict(self, pages):
        self.engine.tree.make_room(Shortage(0, {4: pages}))

    @rule()
    def spoil(self):
        """What nobody holds may hold anything."""
        pool = self.engine.runner.pool
        for (layer, name), planes in pool.planes.items():
            spec = pool.streams[layer][name]
            for plane in planes:
                if spec.is_history:
                    plane.view(-1, 64, plane.shape[-1])[pool._pages[spec.per_tokens].free] = float("nan")
                else:
                    plane[pool._free_slots] = float("nan")

    @rule(times=st.sampled_from([0, 0, 0, 1, 2]))
    def break_steps(self, times):
        self.breaks = times

    def free(self, who):
        s = self.sessions[who % len(self.sessions)]
        return None if s.busy else s

    # What must hold

    def take(self, events):
        self.is_whole = False  # until all have been looked at
        for e in events:
            a = self.asked[e.request]
            assert e.index in a.open, "nothing follows the end"
            if isinstance(e, TokenEvent):
                a.said[e.index].append(e.token)
                continue
            a.open.discard(e.index)
            self.check(a, e)
            for s in self.sessions:
                if s.busy == e.request:
                    s.busy = ""
                    before = len(a.request.ids)
                    s.ids = s.ids[: len(s.ids) - before] if e.reason == "error" else s.ids + a.said[0]
        self.is_whole = True

    def check(self, a: Asked, end: Ended):
        said, p = a.said[end.index], a.request.params
        assert end.output_tokens == len(said) <= p.max_tokens
        assert end.reason in ("length", "abort") or (end.reason == "error" and a.may_fail and "broken" in end.error)
        if end.reason == "length":
            assert len(said) == p.max_tokens or len(a.ids) + len(said) == MAX_CONTEXT + 1
        assert said == expected(a.ids, said, p, end.index)

    @invariant()
    def sessions_hold_what_was_said(self):
        for s in getattr(self, "sessions", []):
            if not s.busy:
                assert self.engine.call("session_ids", session=s.id) == s.ids
                track = self.engine.sessions[s.id].track
                assert track.num_pending > 0 or not s.ids, "what follows the last id is chosen from its logits"

    @invariant()
    def holders_add_up(self):
        if not hasattr(self, "engine"):
            return
        pool, engine = self.engine.runner.pool, self.engine
        tracks = [c.track for c in engine.completions] + [s.track for s in engine.sessions.values() if not s.is_busy]
        present = [t.sequence for t in tracks if t.sequence]
        for ratio in pool.ratios:
            held = {p for s in present for p in s.holding.pages[ratio]} | {
                p for r, p in engine.tree._held if r == ratio
            }
            assert pool.num_free_pages(ratio) + len(held) == pool.plan.num_pages[ratio] - 1
        assert pool.num_free_slots + len({s.slot for s in present} - {0}) == pool.plan.num_slots - 1

    def teardown(self):
        logging.disable(logging.NOTSET)
        if not getattr(self, "is_whole", False):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert not any(a.open for a in self.asked.values()), "everybody comes to an end"
        stats = self.engine.current_stats()
        assert stats.self_check_failures == 0 and sum(stats.ended_by_reason.values()) == sum(
            len(a.said) for a in self.asked.values()
        )
        for s in self.sessions:
            self.engine.call("session_close", session=s.id)
        assert is_empty(self.engine)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def no_room_is_fine():
    """Beside what is running there may be no room: nothing happens then."""
    try:
        yield
    except RequestError as error:
        if "no room" not in str(error):
            raise


def params(most, seed, n=1):
    # Without a seed the best token; what is random must not depend on the company either.
    return SamplingParams(max_tokens=most, temperature=0 if seed is None else 0.9, seed=seed, n=n, ignore_eos=True)


def expected(ids: list[int], said: list[int], p: SamplingParams, index: int) -> list[int]:
    """What the sampler says to a fresh computation, token by token."""
    if not said:
        return []
    logits = run(NETWORK, [*ids, *said[:-1]], poison=False)[len(ids) - 1 :]
    state = SamplerState(p, ids, p.seed or 0, index)
    rows = [Row(row, state, None, len(ids) + i) for i, row in enumerate(torch.unbind(logits))]
    return [choice.token for choice in choose_all(rows)]


TestServing = machine_test(Serving)
