"""Routes of the built-in model are the same to the last bit, and each check finds the fault that it is there for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyrosome.cache.pool import CachePool
from pyrosome.cache.streams import StreamSpec
from pyrosome.cache.views import PooledLayer
from pyrosome.engine import runner as running
from pyrosome.engine.loaded import load_model
from pyrosome.engine.residency import Residency
from pyrosome.engine.runner import Runner
from pyrosome.errors import CacheInvariantBroken, DoesNotFit, EngineError, RequestError
from pyrosome.ops import native
from pyrosome.ops.seam import OPS, use
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import tiny
from pyrosome.verify import routes, subject, watched
from pyrosome.verify.finding import Wanted

NANO = Wanted("builtin:nano", quick=True)
needs_kernels = pytest.mark.skipif(not native.available(), reason="no native library here")


@pytest.fixture(autouse=True)
def _nothing_is_held():
    yield
    subject.release()


def found(what: str, *, bits: bool = True):
    bench = routes.Bench(subject.subject(NANO).model, 0, quick=True)
    if "drafts" not in what:
        bench.prompts = [p for p in bench.prompts if 30 < len(p) < 40 or 120 < len(p) < 140]
    return routes.held(bench, what, routes.ROUTES[what], bits=bits)


@needs_kernels
def test_every_route_of_the_built_in_model_is_the_same_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(routes, "ANSWER", 4)
    monkeypatch.setattr(routes.Bench, "_lengths", lambda self: [1, 7, 127, 129, 257])  # others: the test after this one
    findings = {f.what: f for f in routes.check(NANO)}
    assert list(findings) == list(routes.ROUTES)
    for f in findings.values():
        assert f.ok is True and f.figures["bits"] and f.figures["differing_rows"] == 0, f.detail
        assert f.figures["cases"] > 0 and f.figures["rows"] >= f.figures["cases"]
    assert "1,280 of 1,620 prompt tokens were found computed" in findings["after a prefix hit"].detail
    assert not findings["with drafts of the head"].warns
    accepted, drafted = findings["with drafts of the head"].detail.split("; ")[-1].split(" of ")
    assert int(accepted) > 0 and int(drafted.split()[0]) > int(accepted)


@needs_kernels
def test_lengths_stand_around_every_border():
    bench = routes.Bench(subject.subject(NANO).model, 0, quick=False)
    c = bench.model.config
    for edge in (4, 128, c.sliding_window, 4 * c.index_topk):
        assert {edge - 1, edge, edge + 1} <= {len(p) for p in bench.prompts}
    assert {len(p) % 4 for p in bench.prompts} == {0, 1, 2, 3}
    assert routes.Bench(bench.model, 0, quick=False).prompts == bench.prompts
    assert routes.Bench(bench.model, 1, quick=False).prompts != bench.prompts


def no_tail(layer, name, like_TE):
    kv, gate = layer._tails[name]
    return torch.zeros_like(kv), gate


def shared_slot(pool, holding):
    return holding.slot != 0


def one_bit_by_length(network, streams_NJD, logits=running.Network.logits):
    rows_NV = logits(network, streams_NJD)
    if len(streams_NJD) % 3 == 2:  # as a library's product whose order depends on how many rows it is given
        rows_NV.view(torch.int32)[:, 7] ^= 1
    return rows_NV


def stale_snapshot(pool, holding, snapshot, put=running.put_snapshot):
    put(pool, holding, snapshot)
    for (layer, name), planes in pool.planes.items():
        if name == "tail" and pool.streams[layer][name].per_tokens == 1:
            planes[0][holding.slot] = 0


def rings_hold_all(runner, sequence, length):
    return length <= sequence.length


def ring_too_small(spec, num_drafts=0, ring_rows=StreamSpec.ring_rows):
    return ring_rows(spec, 0)


def nothing_found(home, track, set_aside, most=None, bring_in=Residency.bring_in):
    return bring_in(home, track, set_aside, 0)


FAULTS = [
    ("cut into spans", PooledLayer, "tail", no_tail),
    ("token by token", PooledLayer, "tail", no_tail),
    ("cut into spans", running.Network, "logits", one_bit_by_length),
    ("in company", running.Network, "logits", one_bit_by_length),
    ("forked", CachePool, "_owns_slot", shared_slot),
    ("restored from a file", running, "put_snapshot", stale_snapshot),
    ("set aside and resumed", running, "put_snapshot", stale_snapshot),
    ("rewound", Runner, "can_rewind", rings_hold_all),
    ("after a prefix hit", Residency, "bring_in", nothing_found),
    ("with drafts of the head", StreamSpec, "ring_rows", ring_too_small),
    ("with drafts of the prompt", StreamSpec, "ring_rows", ring_too_small),
]


@needs_kernels
@pytest.mark.parametrize(("what", "owner", "name", "fault"), FAULTS, ids=[f"{f[0]}-{f[3].__name__}" for f in FAULTS])
def test_a_planted_fault_is_found(monkeypatch, what, owner, name, fault):
    subject.subject(NANO)
    monkeypatch.setattr(owner, name, fault)
    finding = found(what)
    assert finding.ok is False and finding.figures["faults"], finding.detail
    assert finding.detail.startswith(f"{len(finding.figures['faults'])} of {finding.figures['cases']} cases")
    assert finding.figures["faults"][0] in finding.detail


@needs_kernels
def test_drafts_that_are_all_refused_are_to_be_looked_at_where_the_language_is_known(monkeypatch):
    draft = Runner.draft
    monkeypatch.setattr(Runner, "draft", lambda runner, *given, **more: upside_down(*draft(runner, *given, **more)))
    for texts in ((), [(0, *range(40, 60))]):  # of ids at random nobody guesses the next
        bench = routes.Bench(subject.subject(NANO).model, 0, quick=True, texts=texts)
        bench.prompts = bench.prompts[3:4]
        finding = routes.held(bench, "drafts", routes.drafts_of_the_head, bits=True)
        assert finding.ok is True and finding.warns == bool(texts)
        assert "only refusals were tried" in finding.detail


@needs_kernels
def test_an_answer_that_ends_early_is_found():
    engine = routes.Bench(subject.subject(NANO).model, 0, quick=True).watched(1)
    step = engine.engine.step
    engine.engine.step = lambda: [e for e in step() if not isinstance(e, watched.TokenEvent)]
    with pytest.raises(EngineError, match="request x ended after 0 of 3 tokens"):
        engine.ask([watched.request("x", (0, 5, 6), 3)])


def upside_down(logits_BV, streams):
    return -logits_BV, streams


@needs_kernels
def test_where_no_draft_is_made_nothing_was_tried(monkeypatch):
    monkeypatch.setattr("pyrosome.engine.speculate.PromptLookup.propose", lambda lookup, count: [])
    monkeypatch.setattr(routes, "ROUTES", {"drafts": routes.drafts_of_the_prompt})
    (only,) = routes.check(NANO)
    assert only.ok is None and "no draft was made" in only.detail


@needs_kernels
def test_experts_that_are_not_quantised_are_not_mapped_and_wrong_ones_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(routes, "ROUTES", {"mapped": routes.mapped})
    path = random_checkpoint(tmp_path / "tiny", tiny((0, 4, 128)), 0, "bf16")
    (only,) = routes.check(Wanted(str(path), quick=True))
    assert only.ok is None and "only quantised experts" in only.detail
    subject.subject(NANO)
    with monkeypatch.context() as patch:
        patch.setattr(routes, "free_memory", lambda: 1000)
        (only,) = routes.check(NANO)
    assert only.ok is None and "bytes, and 1,000 are free" in only.detail
    load = load_model

    def swapped(*given, **named):
        other = load(*given, **named)
        other.network.layers[2].ffn.gate.bias.data.neg_()
        return other

    monkeypatch.setattr(routes, "load_model", swapped)
    (only,) = routes.check(NANO)
    assert only.ok is False and "with mapped experts" in only.detail


@needs_kernels
def test_threads_that_share_a_sum_are_found(monkeypatch):
    monkeypatch.setattr(running.Network, "logits", by_threads)
    finding = found("one thread and two")
    assert finding.ok is False and "by 2 threads" in finding.detail


def by_threads(network, streams_NJD, logits=running.Network.logits):
    rows_NV = logits(network, streams_NJD)
    return torch.nextafter(rows_NV, rows_NV + 1) if native.threads() > 1 else rows_NV


@needs_kernels
def test_a_route_that_breaks_is_a_finding_and_the_others_are_tried(monkeypatch):
    monkeypatch.setattr(Runner, "fork", broken)
    monkeypatch.setattr(routes, "ROUTES", {w: routes.ROUTES[w] for w in ("forked", "token by token", "in company")})
    by_what = {f.what: f for f in routes.check(NANO)}
    assert by_what["forked"].ok is False and "CacheInvariantBroken: no fork" in by_what["forked"].detail
    assert by_what["token by token"].ok and by_what["in company"].ok


def broken(runner, sequence):
    raise CacheInvariantBroken("no fork")


def test_by_the_definitions_exact_is_held_to_a_tolerance_and_trained_to_nothing(tmp_path):
    path = random_checkpoint(tmp_path / "tiny", tiny((0, 4, 128)), 0, "bf16")
    with use(OPS["linear"], "torch"):
        (only,) = routes.check(Wanted(str(path), quick=True))
        assert only.ok is None and "linear run by their definitions" in only.detail
        bench = routes.Bench(load_model(path), 0, quick=True)
        held = routes.held(bench, "cut into spans", routes.cut, bits=False)
    assert held.ok is True and not held.figures["bits"] and "within 1e-04" in held.detail


def test_answers_may_part_where_two_tokens_are_as_good_and_nowhere_else():
    sure, unsure = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1.0, 1.0 - 1e-5, 0.0])
    plain = watched.Said("", (5, 6), {1: sure, 2: unsure, 3: sure}, (0, 0, 0))
    said = dataclasses.replace(plain, rows={1: sure, 2: unsure, 3: -sure}, tokens=(0, 1, 2))
    assert watched.compare(said, plain, bits=False).fault == ""
    assert "token 2" in watched.compare(said, plain, bits=True).fault
    assert "token 1" in watched.compare(dataclasses.replace(said, tokens=(1,)), plain, bits=False).fault


def test_no_row_no_number_and_no_bit_go_unseen():
    row = torch.tensor([1.0, 0.0])
    plain = watched.Said("", (5,), {0: row}, (0,))
    longer = dataclasses.replace(plain, tokens=(0, 1))
    assert "1 tokens were said, and 2 plainly" in watched.compare(plain, longer, bits=True).fault
    assert "2 tokens were said, and 1 plainly" in watched.compare(longer, plain, bits=True).fault
    assert watched.compare(plain, plain, bits=True) == watched.Compared(1, 0, 0.0, "")
    assert "no logits" in watched.compare(dataclasses.replace(plain, rows={}), plain, bits=True).fault
    nan = torch.tensor([1.0, float("nan")])
    broken = dataclasses.replace(plain, rows={0: nan})
    assert "no number" in watched.compare(broken, broken, bits=True).fault
    next_to = dataclasses.replace(plain, rows={0: torch.nextafter(row, row + 1)})
    assert watched.compare(next_to, plain, bits=True).differing == 1
    assert watched.compare(next_to, plain, bits=False).fault == ""


def test_a_model_that_does_not_fit_is_left_out_in_bytes(monkeypatch):
    monkeypatch.setattr(subject, "free_memory", lambda: 1000)
    (only,) = routes.check(NANO)
    assert only.ok is None and only.figures["free_bytes"] == 1000 and only.figures["needed_bytes"] > 3_400_000
    assert "GiB" in only.detail and "bytes of weights" in only.detail


def test_what_cannot_be_loaded_is_a_finding_and_nonsense_is_refused(tmp_path):
    (only,) = routes.check(Wanted(str(tmp_path)))
    assert only.ok is False and "config.json" in only.detail
    with pytest.raises(RequestError, match="numerics 'fp3'"):
        list(routes.check(Wanted("builtin:nano", numerics="fp3")))


def test_one_model_is_held_at_a_time_and_loaded_once():
    first = subject.subject(NANO)
    assert subject.subject(dataclasses.replace(NANO, seed=4)) is first
    other = subject.subject(dataclasses.replace(NANO, numerics="exact"))
    assert other is not first and len(subject._held) == 1
    subject.release()
    assert not subject._held


def test_free_memory_is_the_least_of_what_limits(tmp_path):
    told, group = tmp_path / "proc/meminfo", tmp_path / "sys/fs/cgroup/memory.max"
    told.parent.mkdir()
    group.parent.mkdir(parents=True)
    told.write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    group.write_text("max\n")
    assert subject.free_memory(tmp_path) == 5000 * 1024
    group.write_text("1024\n")
    assert subject.free_memory(tmp_path) == 1024


def test_no_room_is_an_error_with_its_bytes(monkeypatch):
    index = subject.open_checkpoint("builtin:nano")
    subject.check_fits(index)
    assert subject.weight_bytes(index) == index.nbytes or not native.available()
    monkeypatch.setattr(subject, "free_memory", lambda: 1 << 20)
    with pytest.raises(DoesNotFit, match="one layer at a time"):
        subject.check_fits(index)
