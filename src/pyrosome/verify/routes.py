"""Routes that must give the same answer: however a sequence is cut, shared, set aside or drafted, bit for bit.

What is promised where is `docs/numerics.md`, "The bit contract".  Every route is held to the plain one: the prompt in
one span through a fresh cache, then the most probable token, one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from pyrosome.cache.streams import BLOCK_TOKENS
from pyrosome.config import CSA_RATIO
from pyrosome.engine.loaded import LoadedModel, load_model
from pyrosome.errors import DoesNotFit, PyrosomeError, UnsupportedFormat
from pyrosome.ops import native
from pyrosome.verify.finding import Finding, Wanted
from pyrosome.verify.subject import Subject, asked, free_memory, why_no_bits
from pyrosome.verify.texts import texts
from pyrosome.verify.watched import TOLERANCE, Said, Watched, compare, greedy, in_spans, request

CHECK = "routes"
ANSWER = 8  # tokens of an answer
TAIL = 9  # tokens that a turn adds
_SHOWN = 3  # faults in a finding's detail
_AT_ONCE = 8  # sequences of an engine
_KEPT = 4  # plain answers that are kept beside those of the prompts
_SINGLE, _SINGLE_QUICK = 140, 40  # tokens of the longest prompt that is computed token by token
_CROWD_STEP = 160  # tokens of a step that many share: prompts are cut where it is full
_TEXTS = 3  # prompts in the model's own language
_PATTERN = 24  # tokens that repeat in a prompt whose continuation can be guessed


class Bench:
    """One model's prompts, and what it plainly says to each.

    Args:
        source: what the model was loaded from, for routes that load it in another way.
        texts: prompts in its own language, where it has one: what goes on from them can be guessed.
    """

    def __init__(
        self, model: LoadedModel, seed: int, quick: bool, *, source: str = "", texts: Sequence[Sequence[int]] = ()
    ) -> None:
        self.model, self.quick, self.rng = model, quick, random.Random(f"routes/{seed}")
        self.source, self.texts = source or str(model.path), [tuple(ids) for ids in texts]
        self.longest = model.config.max_position_embeddings - 2 * (ANSWER + TAIL)
        self.prompts = [self.ids(n) for n in self._lengths()]
        self.plain = functools.lru_cache(len(self.prompts) + _KEPT)(self._plain)

    def ids(self, count: int) -> tuple[int, ...]:
        """So many ids of the vocabulary, all alike likely."""
        return tuple(self.rng.randrange(self.model.config.vocab_size) for _ in range(count))

    def _lengths(self) -> list[int]:
        """Around 4, 128, the window, and where the indexer begins to choose; others at any residue."""
        c = self.model.config
        edges = [CSA_RATIO, BLOCK_TOKENS, c.sliding_window]
        edges += [c.index_topk * CSA_RATIO] if CSA_RATIO in c.layer_ratios else []
        near = (-1, 0, 1) if not self.quick else (-1, 1)
        drawn = [self.rng.randrange(BLOCK_TOKENS, 5 * BLOCK_TOKENS) for _ in range(2 if self.quick else 6)]
        found = {e + d for e in edges for d in near} | {1, CSA_RATIO + 3, 2 * BLOCK_TOKENS} | set(drawn)
        return sorted(n for n in found if 0 < n <= self.longest)

    def places(self, most: int) -> list[int]:
        """Lengths of a shared past: one block and two, beside them, and at any residue; up to `most`."""
        near = [BLOCK_TOKENS, BLOCK_TOKENS + 3, 2 * BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS]
        if not self.quick:
            near += [BLOCK_TOKENS - 1, BLOCK_TOKENS + 1, BLOCK_TOKENS + 2, 2 * BLOCK_TOKENS + 1]
            near += [self.rng.randrange(5, 3 * BLOCK_TOKENS) for _ in range(4)]
        return sorted({n for n in near if n <= most})

    def past(self) -> tuple[int, ...]:
        """A prompt of some three blocks, or as long as the model allows."""
        return self.ids(min(3 * BLOCK_TOKENS + 10, self.longest))

    def _plain(self, ids: tuple[int, ...]) -> Said:
        return greedy(self.model, ids, ANSWER)

    def watched(self, sequences: int = _AT_ONCE, **options: object) -> Watched:
        """An engine with room for the longest prompt and two turns more."""
        longest = max(map(len, (*self.prompts, *self.texts)), default=1)
        return Watched(self.model, max(longest, 4 * BLOCK_TOKENS) + 2 * (ANSWER + TAIL), sequences, **options)


class NothingTried(Exception):
    """A route that cannot be taken with this model; the argument says why."""


Route = Callable[[Bench], Iterator[Said]]


def check(wanted: Wanted) -> Iterator[Finding]:
    """A finding for each route.

    Raises:
        RequestError: no such numerics.
    """
    yield from asked(wanted, CHECK, functools.partial(_found, wanted))


def _found(wanted: Wanted, subject: Subject) -> Iterator[Finding]:
    why_not = why_no_bits(wanted.device)
    if why_not and wanted.numerics != "exact":
        detail = f"{why_not}, and by the definitions nothing is promised of numerics {wanted.numerics}; ask for exact"
        yield Finding(CHECK, "all routes", None, detail)
        return
    rng = random.Random(f"routes/{wanted.seed}/texts")
    spoken = texts(subject, rng, _TEXTS, 2 * BLOCK_TOKENS) if subject.has_tokenizer else []
    bench = Bench(subject.model, wanted.seed, wanted.quick, source=wanted.model, texts=spoken)
    for number, (what, route) in enumerate(ROUTES.items()):
        wanted.tell(number, len(ROUTES), f"routes: {what}")
        if why_not and route is threads:
            yield Finding(CHECK, what, None, f"{why_not}: threads are torch's own, and nothing is promised of them")
        elif route is drafts_of_the_head and not subject.model.has_drafts:
            yield Finding(CHECK, what, None, "no draft stage was loaded with this model")
        else:
            yield _tried(bench, what, route, bits=not why_not)


def _tried(bench: Bench, what: str, route: Route, *, bits: bool) -> Finding:
    """As `held`; a route that breaks is a finding, and the next one is tried."""
    try:
        return held(bench, what, route, bits=bits)
    except (DoesNotFit, UnsupportedFormat) as error:  # of the ways of loading, some are for quantised experts alone
        return Finding(CHECK, what, None, f"left out: {error}")
    except NothingTried as error:
        return Finding(CHECK, what, None, f"nothing was tried: {error}")
    except PyrosomeError as error:
        return Finding(CHECK, what, False, f"{type(error).__name__}: {error}")


def held(bench: Bench, what: str, route: Route, *, bits: bool) -> Finding:
    """One route over all its cases, against the plain one.

    Raises:
        NothingTried: it cannot be taken.
    """
    faults, rows, tokens, cases, differing, worst, about, warns = [], 0, 0, 0, 0, 0.0, "", False
    for said in route(bench):
        found = compare(said, bench.plain(said.ids), bits=bits)
        cases, rows, tokens = cases + 1, rows + found.rows, tokens + len(said.tokens)
        differing, worst = differing + found.differing, max(worst, found.worst)
        about, warns = said.about or about, warns or said.warns
        if found.fault:
            faults.append(f"{said.label}: {found.fault}")
    promise = "the same to the last bit" if bits else f"within {TOLERANCE:.0e}"
    detail = f"{cases} cases, {rows:,} rows of logits and {tokens} tokens held to the plain route, {promise}"
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        detail = f"{len(faults)} of {detail}: {'; '.join(faults[:_SHOWN])}{more}"
    figures = {
        "cases": cases, "rows": rows, "tokens": tokens, "differing_rows": differing, "worst": worst, "bits": bits,
        "lengths": [len(p) for p in bench.prompts], "faults": faults,
    }  # fmt: skip
    if not cases:
        raise NothingTried(f"the model has {bench.model.config.max_position_embeddings} positions, and it needs more")
    return Finding(CHECK, what, not faults, f"{detail}; {about}" if about else detail, figures, warns)


def cut(bench: Bench) -> Iterator[Said]:
    """Prompts in several spans."""
    for ids in bench.prompts:
        drawn = sorted(bench.rng.sample(range(1, len(ids)), min(3, len(ids) - 1)))
        near = [[CSA_RATIO], [BLOCK_TOKENS], [len(ids) - 1]]
        if not bench.quick:
            near += [[1], [BLOCK_TOKENS - 1], [BLOCK_TOKENS + 1], list(range(31, len(ids), 31))]
        by_size = list(range(BLOCK_TOKENS + 1, len(ids), BLOCK_TOKENS + 1))
        for cuts in _distinct([*near, drawn, by_size], len(ids)):
            tokens = bench.plain(ids).tokens
            shown = ", ".join(map(str, cuts[:3])) + (" ..." if len(cuts) > 3 else "")
            yield Said(f"{len(ids)} tokens cut at {shown}", ids, in_spans(bench.model, ids, cuts, tokens[:1]), ())


def _distinct(all_cuts: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    kept = ([c for c in cuts if 0 < c < length] for cuts in all_cuts)
    return [list(c) for c in dict.fromkeys(tuple(c) for c in kept if c)]


def single(bench: Bench) -> Iterator[Said]:
    """Prompts token by token."""
    most = _SINGLE_QUICK if bench.quick else _SINGLE
    for ids in (p for p in bench.prompts if 1 < len(p) <= most):
        yield Said(f"{len(ids)} tokens one by one", ids, in_spans(bench.model, ids, range(1, len(ids))), ())


def alone(bench: Bench) -> Iterator[Said]:
    """Each prompt by itself through an engine."""
    for number, ids in enumerate(bench.prompts):
        yield from _asked(bench.watched(1), {f"{number}": ids})


def together(bench: Bench) -> Iterator[Said]:
    """All prompts at once: steps in which some decode beside parts of others' prompts."""
    engine = bench.watched(step_tokens=_CROWD_STEP)
    yield from _asked(engine, {f"{n}": ids for n, ids in enumerate(bench.prompts)})


def _asked(engine: Watched, prompts: dict[str, tuple[int, ...]]) -> Iterator[Said]:
    found = engine.ask([request(name, ids, ANSWER) for name, ids in prompts.items()])
    for name, (tokens, rows, _) in found.items():
        ids = prompts[name]
        yield Said(f"{len(ids)} tokens", ids, rows, tokens)


def prefix_hit(bench: Bench) -> Iterator[Said]:
    """Prompts that begin as an earlier one did, twice: the second time their own state is there too."""
    engine, base = bench.watched(), bench.past()
    engine.ask([request("base", base, ANSWER)])
    vocabulary, asked, matched = bench.model.config.vocab_size, 0, 0
    for turn in range(2):
        for shared in bench.places(len(base) - 1):
            ids = (*base[:shared], (base[shared] + 1 + turn) % vocabulary, *bench.ids(TAIL))
            before = engine.engine.stats.computed_tokens
            ((tokens, rows, reuse),) = engine.ask([request(f"{shared} {turn}", ids, ANSWER)]).values()
            computed = engine.engine.stats.computed_tokens - before
            asked, matched = asked + len(ids), matched + reuse.matched_tokens
            whole = shared // BLOCK_TOKENS * BLOCK_TOKENS
            fault = _not_as("tokens found", reuse.matched_tokens, whole)
            fault = fault or _not_as("tokens through the network", computed, len(ids) - whole + ANSWER - 1)
            label = f"{len(ids)} tokens, {shared} of them known"
            yield Said(label, ids, rows, tokens, fault, f"{matched:,} of {asked:,} prompt tokens were found computed")


def _not_as(what: str, found: int, expected: int) -> str:
    return "" if found == expected else f"{found} {what}, {expected} expected"


def forked(bench: Bench) -> Iterator[Said]:
    """Sessions forked after a turn, and both gone on with, each its own way."""
    engine, past = bench.watched(), bench.past()
    for length in bench.places(len(past)):
        session, known = yield from _first_turn(engine, past[:length], "before the fork")
        twin = engine.engine.call("session_fork", session=session)
        for one, name in ((twin, "the fork"), (session, "the one that was forked")):
            yield _turn(engine, one, known, bench.ids(TAIL), f"{name} at {len(known)} tokens")
            engine.engine.call("session_close", session=one)


def rewound(bench: Bench) -> Iterator[Said]:
    """Sessions of which the last tokens were taken back: a few, a block, more."""
    engine, past = bench.watched(), bench.past()
    for count in (1, 2, 3, 5, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 2):
        if count < len(past):
            session, known = yield from _first_turn(engine, past, "before it was cut back")
            engine.engine.call("session_rewind", session=session, num_tokens=count)
            label = f"{count} of {len(known)} tokens taken back"
            yield _turn(engine, session, known[:-count], bench.ids(TAIL), label)
            engine.engine.call("session_close", session=session)


def restored(bench: Bench) -> Iterator[Said]:
    """Sessions written to a file, and gone on with by another engine."""
    past = bench.past()
    with tempfile.TemporaryDirectory(prefix="pyrosome-verify-") as folder:
        for length in bench.places(len(past)):
            one, other, path = bench.watched(1), bench.watched(1), str(Path(folder) / "saved.session")
            session, known = yield from _first_turn(one, past[:length], "before it was saved")
            num_bytes = one.engine.call("session_save", session=session, path=path)
            found = other.engine.call("session_restore", path=path)
            label = f"{len(known)} tokens restored from {num_bytes:,} bytes"
            yield _turn(other, found, known, bench.ids(TAIL), label, most_computed=TAIL + ANSWER)


def parked(bench: Bench) -> Iterator[Said]:
    """Sessions set aside for want of memory, and resumed."""
    engine, past = bench.watched(), bench.past()
    for length in bench.places(len(past)):
        session, known = yield from _first_turn(engine, past[:length], "before it was set aside")
        engine.engine.park_idle()
        before = engine.engine.stats.resumes
        said = _turn(engine, session, known, bench.ids(TAIL), f"{len(known)} tokens set aside and resumed",
                     most_computed=TAIL + ANSWER)  # fmt: skip
        fault = said.fault or _not_as("sessions resumed", engine.engine.stats.resumes - before, 1)
        yield dataclasses.replace(said, fault=fault)
        engine.engine.call("session_close", session=session)


def _first_turn(engine: Watched, ids: tuple[int, ...], name: str) -> Generator[Said, None, tuple[str, tuple[int, ...]]]:
    """A session that said one answer; returns it with all its ids."""
    session = engine.engine.call("session_open", ids=ids)
    said = _turn(engine, session, (), ids, f"{len(ids)} tokens {name}", is_open=True)
    yield said
    return session, (*ids, *said.tokens)


def _turn(
    engine: Watched,
    session: str,
    known: tuple[int, ...],
    more: tuple[int, ...],
    label: str,
    *,
    is_open: bool = False,
    most_computed: int | None = None,
) -> Said:
    """A turn that adds ids to a session's and answers.

    Args:
        is_open: the session was opened with `more`.
        most_computed: tokens that may go through the network; None: any number.
    """
    before = engine.engine.stats.computed_tokens
    asked = request(label, () if is_open else more, ANSWER, session)
    ((tokens, rows, _),) = engine.ask([asked]).values()
    computed = engine.engine.stats.computed_tokens - before
    too_many = most_computed is not None and computed > most_computed
    fault = f"{computed} tokens went through the network, {most_computed} expected at most" if too_many else ""
    return Said(label, (*known, *more), rows, tokens, fault)


def drafts_of_the_head(bench: Bench) -> Iterator[Said]:
    """Prompts answered with drafts of the checkpoint's own head."""
    yield from _drafted(bench, "mtp")


def drafts_of_the_prompt(bench: Bench) -> Iterator[Said]:
    """Prompts answered with drafts looked up in what was said before."""
    yield from _drafted(bench, "lookup")


def _drafted(bench: Bench, drafter: str) -> Iterator[Said]:
    # A passage over and over can be guessed; ids at random hardly, so there most drafts are refused.
    again = [(bench.ids(_PATTERN) * 12)[:n] for n in bench.places(min(12 * _PATTERN, bench.longest))]
    prompts = [*(t for t in bench.texts if len(t) <= bench.longest), *again]
    prompts += bench.prompts[:: 3 if bench.quick else 1]
    engine = bench.watched(drafter=drafter, max_drafts=3)
    said = list(_asked(engine, {f"{n}": ids for n, ids in enumerate(prompts)}))
    drafted, accepted = sum(engine.engine.stats.drafted), sum(engine.engine.stats.accepted)
    if not drafted:
        raise NothingTried("no draft was made")
    about = f"{accepted} of {drafted} drafts were accepted" + ("" if accepted else ": only refusals were tried")
    warns = drafter == "mtp" and not accepted and bool(bench.texts)  # a head that knows the language guesses some
    for one in said:
        yield dataclasses.replace(one, about=about, warns=warns)


def mapped(bench: Bench) -> Iterator[Said]:
    """Prompts computed with routed experts read in the checkpoint's files."""
    m = bench.model
    needed, free = sum(t.nbytes for n, t in m.index.tensors.items() if ".ffn.experts." not in n), free_memory()
    if free and needed > free:
        raise NothingTried(f"a second copy of all but the experts takes {needed:,} bytes, and {free:,} are free")
    other = load_model(bench.source, numerics=m.numerics, kv_format=m.kv_format, experts="mapped")
    for ids in bench.prompts[:: 3 if bench.quick else 1]:
        tokens = bench.plain(ids).tokens
        yield Said(f"{len(ids)} tokens with mapped experts", ids, in_spans(other, ids, (), tokens[:1]), ())


def threads(bench: Bench) -> Iterator[Said]:
    """Prompts computed by one thread, and by two."""
    for count in (1, 2):
        with _threads(count):
            for ids in bench.prompts[:: 3 if bench.quick else 1]:
                tokens = bench.plain(ids).tokens
                rows = in_spans(bench.model, ids, (), tokens[:1])
                yield Said(f"{len(ids)} tokens by {count} thread{'s' * (count > 1)}", ids, rows, ())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads within, for however small a product."""
    before, library = torch.get_num_threads(), native.library()
    torch.set_num_threads(count)
    library.pyrosome_set_grain(ctypes.c_int64(1))
    try:
        yield
    finally:
        library.pyrosome_set_grain(ctypes.c_int64(0))
        torch.set_num_threads(before)


ROUTES: dict[str, Route] = {
    "cut into spans": cut,
    "token by token": single,
    "through the engine, alone": alone,
    "in company": together,
    "after a prefix hit": prefix_hit,
    "forked": forked,
    "rewound": rewound,
    "restored from a file": restored,
    "set aside and resumed": parked,
    "with drafts of the head": drafts_of_the_head,
    "with drafts of the prompt": drafts_of_the_prompt,
    "experts in memory and in the file": mapped,
    "one thread and two": threads,
}
