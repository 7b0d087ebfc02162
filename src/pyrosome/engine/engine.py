"""The engine: many requests at once, nothing computed twice, the same answer whatever else is going on.

One step: end what was cancelled, admit what waits, plan spans under one token budget, one forward over all of them,
choose tokens, check drafts, publish what was computed, draft.  A fault in one request ends that request alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrosome.cache.blocks import block_bytes
from pyrosome.cache.prefix import PrefixTree
from pyrosome.cache.streams import BLOCK_TOKENS, cache_tokens_in
from pyrosome.cache.tiers import Tiers
from pyrosome.engine import news, sessions
from pyrosome.engine.constrain import Grammars, Guide
from pyrosome.engine.decoding import Decoding
from pyrosome.engine.drafting import Drafter, drafter_for
from pyrosome.engine.request import Ended, Event, News, Request, Reuse
from pyrosome.engine.residency import Residency
from pyrosome.engine.runner import Forward, Runner, check_ids
from pyrosome.engine.sampler import SamplerState
from pyrosome.engine.scheduler import plan_step
from pyrosome.engine.stats import LogLine, Stats
from pyrosome.engine.trace import Trace
from pyrosome.engine.track import Completion, Span, Track
from pyrosome.engine.warm import warm_up
from pyrosome.errors import ContextTooLong, DoesNotFit, EngineError, PyrosomeError, RequestError
from pyrosome.model.build import Network
from pyrosome.options import EngineOptions

log = logging.getLogger(__name__)

LOOK_BACK = 64  # ids of a session that a grammar may look at to see what is open


class Engine:
    """Requests in, events out, one step at a time.  Not for several threads: `engine.worker` gives it one of its own.

    Args:
        fingerprint: what the rows of its cache depend on; names them on disk.
        tokenizer_path: the checkpoint's tokenizer.json, which grammars are made with; None: no grammars.

    Raises:
        DoesNotFit: the cache holds not even one block of 128 tokens.
        RequestError: a drafter was asked for that this checkpoint does not have.
    """

    def __init__(
        self,
        network: Network,
        kv_format: str,
        options: EngineOptions | None = None,
        *,
        fingerprint: str = "",
        tokenizer_path: Path | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.options, self.config = options, network.config
        cache_tokens = cache_tokens_in(network.config, kv_format, options.cache_bytes, options.max_sequences)
        if cache_tokens < BLOCK_TOKENS:
            raise DoesNotFit(
                f"a cache of one block of {BLOCK_TOKENS} tokens", options.cache_bytes + 1, options.cache_bytes,
                "cache_bytes", "raise cache_bytes",
            )  # fmt: skip
        most = min(network.config.max_position_embeddings, cache_tokens)
        self.max_context = min(options.max_context or most, most)
        self.runner = Runner(
            network,
            kv_format,
            options.max_sequences,
            self.max_context,
            num_drafts=options.max_drafts,
            cache_tokens=cache_tokens,
        )
        if self.runner.device.type == "cuda":
            warm_up(self.runner, options.step_tokens)
        self.fingerprint, self.stats = fingerprint, Stats()
        tiers = None
        if options.host_bytes or options.disk_path:
            tiers = Tiers(
                options.host_bytes, options.disk_path, options.disk_bytes, fingerprint, block_bytes(self.runner.pool),
                kv_format=kv_format,
            )  # fmt: skip
        self.tree = PrefixTree(self.runner.pool, snapshot_bytes=options.snapshot_bytes, tiers=tiers)
        self.home = Residency(self.runner, self.tree, self.stats, options.step_tokens)
        self.grammars = Grammars(tokenizer_path, network.config.vocab_size, network.config.eos_token_id)
        self.drafter: Drafter = drafter_for(options, self.runner)
        self.decoding = Decoding(network.config.eos_token_id, self.max_context, self.stats, self._end, self._fail)
        self.trace = Trace(options.trace_path) if options.trace_path else None
        self.sessions: dict[str, sessions.Session] = {}
        self.completions: list[Completion] = []  # in order of arrival
        self._order, self._turns = itertools.count(), itertools.count(1)
        self._aborted: set[str] = set()
        self._step = self._departures = 0
        self._log_line = LogLine()
        self._hits = 0

    # What callers do

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.completions)

    def add(self, request: Request) -> None:
        """Take a request; its events come from `step`.

        Raises:
            RequestError: an id in use, ids outside the vocabulary, a constraint that is no grammar, a session there
                is not or that is generating already, log probabilities of what a session holds.
            ContextTooLong: more ids than the cache, or the model, has positions for.
        """
        if any(c.request.id == request.id for c in self.completions):
            raise RequestError(f"request id {request.id!r} is in use; give each request an id of its own")
        session = sessions.find(self, request.session) if request.session else None
        if session and request.params.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs was asked for in a session, whose tokens are not computed again; send its ids as a "
                "prompt of their own"
            )
        before = len(session.track.ids) if session else 0
        if request.ids or not before:
            check_ids(list(request.ids), self.config.vocab_size)
        if before + len(request.ids) > self.max_context:
            raise ContextTooLong(
                before + len(request.ids), self.max_context,
                "shorten the prompt, or give the engine a larger max_context or more cache_bytes",
            )  # fmt: skip
        prompt = [*(session.track.ids[-LOOK_BACK:] if session else ()), *request.ids]
        guide = self.grammars.compile(
            request.constraint, request.think_end, request.params, prompt, request.never_empty or None
        )
        track = session.begin(request) if session else self.home.new_track(list(request.ids), request.salt)
        c = self._completion(request, 0, track, guide)
        if track.sequence is not None:  # a session that was not set aside: there is nothing to look up
            asked, known = len(track.ids), track.length
            reason = f"the session holds {known} of {asked} tokens computed"
            c.is_admitted, c.admitted = True, c.arrived
            c.reuse = Reuse(asked, known, known, 0, "all", "", reason)
        self.completions.append(c)
        self.stats.requests += 1

    def _completion(
        self, request: Request, index: int, track: Track, guide: Guide, seed: int | None = None
    ) -> Completion:
        # Without a seed a request draws its own: its tokens still do not depend on what else is in a step.
        if seed is None:
            seed = request.params.seed if request.params.seed is not None else random.getrandbits(63)
        prompt = len(track.ids)
        sampler = SamplerState(request.params, track.ids[:prompt], seed, index)
        boundary = prompt if request.stable is None else prompt - len(request.ids) + request.stable
        boundary = boundary // BLOCK_TOKENS * BLOCK_TOKENS
        return Completion(
            request, index, next(self._order), track, sampler, guide, seed, prompt, boundary, self.drafter.depth(),
            arrived=time.monotonic(),
        )  # fmt: skip

    def abort(self, request_id: str) -> None:
        """End a request before the next step; one that is not there is no error: it may just have ended."""
        if any(c.request.id == request_id for c in self.completions):  # else it would hit the next of that name
            self._aborted.add(request_id)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Session operations by name, plain data in and out: `session_open`, `session_fork`, ...

        Raises:
            RequestError: there is no such operation, session or file.
        """
        self._departures += 1  # it may have made room
        return sessions.call(self, name, arguments)

    def close(self) -> None:
        """End everything; a trace is written out, and what is known to disk, where there is one."""
        for c in list(self.completions):
            self._end(c, "abort", [])
        for session in list(self.sessions.values()):
            self.home.drop(session.track)
        self.sessions.clear()
        self.tree.store()
        if self.trace:
            self.trace.close()

    # One step

    def step(self) -> list[Event | News]:
        """Compute one step; the events it gave, `Ended` last for each completion that ended."""
        events: list[Event | News] = []
        began = time.monotonic()
        self._step += 1
        self._reap(events)
        with self._phase("admit"):
            self._admit(events)
        with self._phase("plan"):
            spans = self._plan(events)
        if spans:
            self._run(spans, events)
            ended = time.monotonic()
            num_tokens = sum(len(s.ids) for s in spans)
            self.stats.step_done(ended - began, num_tokens)
            self.stats.step_computed(ended - began, [(s.start, len(s.ids), len(s.drafts)) for s in spans])
            if self.trace:
                self.trace.span("step", began, ended, spans=len(spans), tokens=num_tokens, events=len(events))
        if self.options.log_every and self._step % self.options.log_every == 0:
            log.info("%s", self._log_line.take(self.current_stats()))
        return events

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.trace.phase(name) if self.trace else contextlib.nullcontext()

    def current_stats(self) -> Stats:
        """Counters, and gauges as they are now."""
        s, pool, tiers = self.stats, self.runner.pool, self.tree.tiers
        s.running = sum(c.track.sequence is not None for c in self.completions)
        s.waiting, s.sessions = len(self.completions) - s.running, len(self.sessions)
        s.num_slots, s.free_slots = pool.plan.num_slots - 1, pool.num_free_slots
        s.num_pages = {r: n - 1 for r, n in pool.plan.num_pages.items()}
        s.free_pages = {r: pool.num_free_pages(r) for r in pool.ratios}
        s.pool_bytes, s.tree_pages = pool.stream_bytes(), self.tree.num_pages
        s.tree_blocks, s.snapshot_bytes = self.tree.num_blocks, self.tree.snapshot_bytes
        counters = self.tree.counters
        s.evicted_blocks, s.spilled_blocks = counters.evicted_blocks, counters.spilled_blocks
        s.restored_blocks = counters.restored_blocks
        s.host_bytes, s.disk_bytes = (tiers.host_bytes, tiers.disk_bytes) if tiers else (0, 0)
        return dataclasses.replace(s)

    def _reap(self, events: list[Event | News]) -> None:
        if self._aborted:
            for c in [c for c in self.completions if c.request.id in self._aborted]:
                self._end(c, "abort", events)
            self._aborted.clear()

    def _admit(self, events: list[Event | News]) -> None:
        """Bring into the cache who waits, best rank first, while there is room or somebody lower to set aside."""
        waiting = [c for c in self.completions if c.track.sequence is None]
        lowest = min((c.rank[0] for c in self.completions if c.track.sequence is not None), default=None)
        for c in sorted(waiting, key=lambda c: c.rank, reverse=True):
            if c.blocked_at == self._departures and lowest is not None and c.rank[0] <= lowest:
                break  # nobody has left since: to be brought in and set aside again would be all that it got
            try:
                set_aside = functools.partial(self._set_aside, c, is_waiting=True)
                reuse = self.home.bring_in(c.track, set_aside, c.most_reused)
            except Exception as error:
                self._fail(c, error, events)
                continue
            if reuse is None:
                c.blocked_at = self._departures
                break  # those behind it wait too, or a small one would always pass a large one
            if not c.is_admitted:
                c.is_admitted, c.admitted = True, time.monotonic()
                c.reuse = dataclasses.replace(reuse, waited_s=c.admitted - c.arrived)
                self._looked_up(c)
            events += news.progress(c)

    def _looked_up(self, c: Completion) -> None:
        self.stats.looked_up(c.reuse)
        if c.reuse.reused_tokens and self.options.self_check:
            self._hits += 1
            # Every so many hits, counted, so that a run can be repeated.
            c.is_checked = int(self._hits * self.options.self_check) > int((self._hits - 1) * self.options.self_check)

    def _set_aside(self, for_whom: Completion, *, is_waiting: bool = False) -> bool:
        """Set one track aside: an idle session, or the completion of the lowest rank below `for_whom`'s."""
        if self.park_idle():
            return True
        others = [c for c in self.completions if c.track.sequence is not None and c is not for_whom]
        # Who comes later by arrival alone does not make anybody stop who has begun.
        lower = [c for c in others if (c.rank[0] < for_whom.rank[0] if is_waiting else c.rank < for_whom.rank)]
        if not lower:
            return False
        victim = min(lower, key=lambda c: c.rank)
        self.home.park(victim.track)
        victim.drafts, victim.num_parks, victim.blocked_at = [], victim.num_parks + 1, self._departures
        return True

    def park_idle(self, but: Track | None = None) -> bool:
        """Set the session aside that was idle longest, never the track `but`; whether there was one."""
        tracks = [s.track for s in self.sessions.values() if not s.is_busy and s.track is not but]
        idle = [t for t in tracks if t.sequence is not None]
        if idle:
            self.home.park(min(idle, key=lambda t: t.last_served))
        return bool(idle)

    def _plan(self, events: list[Event | News]) -> list[Span]:
        """The next step's spans, room made for each."""
        present = [c for c in self.completions if c.track.sequence is not None]
        if suspects := [c for c in present if c.is_suspect]:
            present = suspects[:1]  # alone: if the step fails again, it is known whose fault it is
        spans: list[Span] = []
        for c, count, num_drafts in plan_step(present, self.options.step_tokens):
            track = c.track
            if track.sequence is None:  # set aside for one that came before it in this step
                continue
            try:
                drafts = c.drafts[: min(num_drafts, self.max_context - track.length - count)]
                drafts = drafts[: c.guide.usable(drafts)] if drafts else drafts
                stop = track.length + count + len(drafts)
                if self.home.make_room(track, stop, functools.partial(self._set_aside, c)):
                    is_last = count == track.num_pending
                    if is_last:
                        c.guide.prepare(drafts)
                    ids = track.ids[track.length : track.length + count]
                    spans.append(Span(c, track.length, ids + drafts, drafts, is_last))
            except Exception as error:
                self._fail(c, error, events)
        for c in self.completions:
            c.waited += 1
        return [s for s in spans if s.completion.track.sequence is not None]

    def _run(self, spans: list[Span], events: list[Event | News]) -> None:
        """Compute spans, and make of that what follows: tokens, known blocks, drafts."""
        rows = [(1 + len(s.drafts)) if s.is_last else 0 for s in spans]
        num_tokens, began = sum(len(s.ids) for s in spans), time.monotonic()
        try:
            given = [(s.completion.sequence, s.ids) for s in spans]
            with self._phase("forward"):
                logits, is_finite, forward = self.runner.forward(given, rows)
        except Exception as error:
            self._isolate(spans, error, events)
            return
        self.stats.computed_tokens += num_tokens
        active: list[tuple[Completion, Span, Tensor]] = []
        for s, rows_RV, finite, (first, _) in zip(spans, logits, is_finite, forward.step.layout, strict=True):
            with self._guarded(s.completion, events):
                if not finite:
                    raise EngineError("the network gave values that are no numbers; send the request again")
                events += news.prompt_logprobs(self.runner, forward, first, s)
                active += self._computed(s, rows_RV)
                events += news.progress(s.completion)
        served = [(s.completion, s.start) for s in spans]
        served += [(c, s.start) for c, s, _ in active if c is not s.completion]
        with self._phase("choose"):
            self.decoding.choose(active, events)
        if all(s.start >= s.completion.prompt_length for s in spans):
            self.drafter.cost.observe(num_tokens, time.monotonic() - began, len(spans))
        with self._phase("draft"):
            self._propose(served, forward)
        with self._phase("settle"):
            for c, start in served:
                if c.track.sequence is not None:
                    with self._guarded(c, events):
                        self.home.settle(c.track, start)

    def _computed(self, s: Span, rows_RV: Tensor) -> list[tuple[Completion, Span, Tensor]]:
        """Those that choose tokens after a span: its completion, and the others of its request where they begin."""
        c = s.completion
        c.waited, c.turn, c.num_steps, c.is_suspect = 0, next(self._turns), c.num_steps + 1, False
        c.track.last_served = self._step
        if not s.is_last:
            return []
        # What the drafts will turn out to be is not known yet: the sequence grows by those accepted.
        c.sequence.length -= len(s.drafts)
        rows_RV = self._checked(c, rows_RV)
        return [(c, s, rows_RV), *((twin, s, rows_RV) for twin in self._twins(c))]

    @contextlib.contextmanager
    def _guarded(self, c: Completion, events: list[Event | News]) -> Iterator[None]:
        """What goes wrong with a completion ends that one alone."""
        try:
            yield
        except Exception as error:
            if c in self.completions:
                self._fail(c, error, events)
            elif not isinstance(error, PyrosomeError):  # it had ended: its session has to go on
                log.exception("request %s had ended, and what follows an end failed", c.request.id)

    def _twins(self, c: Completion) -> list[Completion]:
        """The other completions of a request whose prompt has just been computed: they share it."""
        if c.index or c.output_tokens or c.has_twins:
            return []
        twins: list[Completion] = []
        try:
            for index in range(1, c.request.params.n):
                guide = c.guide.fork()
                twins.append(self._completion(c.request, index, self.home.fork(c.track), guide, c.seed))
        except BaseException:
            for twin in twins:
                self.home.drop(twin.track)
            raise
        for twin in twins:
            twin.reuse, twin.is_admitted, twin.arrived, twin.admitted = c.reuse, True, c.arrived, c.admitted
        self.completions += twins
        c.has_twins = True
        return twins

    def _propose(self, served: list[tuple[Completion, int]], forward: Forward) -> None:
        began = time.monotonic()
        for c, _ in served:
            c.drafts = []
        try:
            self.drafter.propose(served, forward)
            self.drafter.cost.observe_drafting(sum(len(c.drafts) for c, _ in served), time.monotonic() - began)
        except Exception:  # a draft is a guess: without it the answer is the same
            log.exception("drafting failed; this step goes on without drafts")
            self.stats.failed("drafter")
            for c, _ in served:
                c.drafts = []

    def _checked(self, c: Completion, rows_RV: Tensor) -> Tensor:
        """The same rows; recomputed without reuse and compared, where this prefix hit was chosen for a self-check."""
        if not c.is_checked:
            return rows_RV
        c.is_checked = False
        fresh = self.home.recompute(c.track)
        if fresh is None:
            return rows_RV
        sequence, fresh_V = fresh
        self.stats.self_checks += 1
        if torch.equal(fresh_V, rows_RV[-1]):
            self.runner.close(sequence)
            return rows_RV
        self.stats.self_check_failures += 1
        log.error("request %s: a prefix hit of %d tokens differs from its recomputation; the prefix is dropped",
                  c.request.id, c.reuse.matched_tokens)  # fmt: skip
        self.home.replace(c.track, sequence)
        return fresh_V[None]

    # Ends and faults

    def _isolate(self, spans: list[Span], error: Exception, events: list[Event | News]) -> None:
        """A step failed: run its spans one by one, so that only whose fault it is ends."""
        if len(spans) == 1:
            self._fail(spans[0].completion, error, events)
            return
        log.warning("a step of %d spans failed (%s); they are run one by one", len(spans), error)
        for s in spans:
            if s.completion.sequence.is_broken:  # found again by its prefix, and run alone
                s.completion.is_suspect = True
                self.home.drop(s.completion.track)
            else:
                self._run([s], events)

    def _fail(self, c: Completion, error: Exception, events: list[Event | News]) -> None:
        expected = isinstance(error, PyrosomeError)
        kind = type(error).__name__ if expected else "EngineError"
        log.error("request %s: %s: %s", c.request.id, type(error).__name__, error, exc_info=not expected)
        self.stats.failed(kind)
        self._end(c, "error", events, str(error) if expected else f"{type(error).__name__}: {error}", kind)

    def _end(
        self, c: Completion, reason: str, events: list[Event | News], error: str = "", error_type: str = ""
    ) -> None:
        self.completions.remove(c)
        self._departures += 1
        output_tokens = c.output_tokens  # a session's ids are cut back where it failed
        session = self.sessions.get(c.request.session)
        if session and session.track is c.track:
            session.finish(self, failed=reason == "error")
        else:
            self.home.drop(c.track)
        self._trace_request(c, reason, output_tokens)
        text, now = f"request {c.request.id}: {error}" if error else "", time.monotonic()
        never_begun = range(1, c.request.params.n) if not (c.index or c.has_twins) else ()
        for index in (c.index, *never_begun):
            self.stats.ended(reason)
            events.append(Ended(c.request.id, index, reason, output_tokens, c.reuse, c.timeline(now), text, error_type))

    def _trace_request(self, c: Completion, reason: str, output_tokens: int) -> None:
        if self.trace:
            now, name = time.monotonic(), f"{c.request.id}.{c.index}"
            begun, first = c.admitted or now, c.first_token or now
            self.trace.span("queued", c.arrived, begun, name, prompt_tokens=c.prompt_length)
            self.trace.span("prompt", begun, first, name, reused_tokens=c.reuse.reused_tokens)
            self.trace.span("output", first, now, name, tokens=output_tokens, reason=reason, parks=c.num_parks)
