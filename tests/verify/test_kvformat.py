"""What stored rows cost: figures of known distributions, the built-in model's bounds, and formats that are worse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pyrosome.cache import pool
from pyrosome.model.deepseek_v4 import Attention, Indexer
from pyrosome.ops.seam import OPS, use
from pyrosome.quant.rows import FP4IndexRows, FP8KVRows
from pyrosome.testing.checkpoints import random_checkpoint
from pyrosome.testing.shapes import tiny
from pyrosome.verify import kvformat, subject
from pyrosome.verify.finding import Wanted
from pyrosome.verify.kvformat import PLAIN, ROUNDED, STORED, Apart, compared, held

NANO = Wanted("builtin:nano", quick=True)


@pytest.fixture(autouse=True)
def _nothing_is_held():
    yield
    subject.release()


def short(count=1):
    one = subject.subject(NANO)
    return one.model, [ids[:300] for ids in kvformat.texts_for(one, NANO)[:count]]


def test_the_built_in_model_keeps_within_its_bounds():
    found = list(kvformat.check(NANO))
    assert [f.ok for f in found] == [True] * 5, [f.detail for f in found]
    same, *forms = found
    assert same.what == "FP8 rows and FP4 keys, against the same in bfloat16"
    assert same.figures["mean"] == 0 and same.figures["top1"] == 1
    by_name = {f.what: f.figures for f in forms}
    assert list(by_name) == [form.name for form in kvformat.FORMS]
    assert 0 < by_name["bfloat16 rows"]["mean"] < by_name["FP8 rows, keys not rounded"]["mean"]
    assert by_name["FP8 rows, keys not rounded"]["mean"] != by_name["FP8 rows and FP4 keys"]["mean"]
    for figures in by_name.values():
        assert sum(b["positions"] for b in figures["by_position"]) == figures["positions"] > 2500
        assert figures["sure_positions"] > 500
    (plot,) = forms[-1].figures["plots"]
    assert list(plot["series"]) == list(by_name) and plot["x"][:3] == ["0-63", "64-127", "128-255"]
    assert all(len(values) == len(plot["x"]) for values in plot["series"].values())


def test_without_other_roundings_each_form_costs_its_own_alone():
    _, texts = short()
    exact = subject.subject(dataclasses.replace(NANO, numerics="exact")).model
    pairs = [(ROUNDED, STORED), *((PLAIN, form) for form in kvformat.FORMS)]
    same, bf16, keys_whole, _, stored = (a.figures()["mean"] for a in compared(exact, texts, pairs))
    assert same == 0 < bf16 < 1e-3 < keys_whole and stored > 1e-3


def test_the_network_is_as_it_was_afterwards():
    model, texts = short()
    marked = [m for m in model.network.modules() if isinstance(m, Attention | Indexer)]
    before = [(m.numerics, getattr(getattr(m, "compressor", None), "round_nope", None)) for m in marked]
    pieces = kvformat._predicted(model, texts[0], PLAIN)
    next(pieces)
    assert [(m.numerics, getattr(getattr(m, "compressor", None), "round_nope", None)) for m in marked] == before
    compared(model, texts, [(PLAIN, STORED)])
    assert [(m.numerics, getattr(getattr(m, "compressor", None), "round_nope", None)) for m in marked] == before


def test_plain_rows_are_the_models_own_where_it_rounds_nothing():
    exact = subject.subject(dataclasses.replace(NANO, numerics="exact")).model
    _, texts = short()
    rows = torch.cat(list(kvformat._predicted(exact, texts[0], PLAIN)))
    assert torch.equal(rows, exact.logits(texts[0]))


@dataclasses.dataclass(frozen=True)
class FewerBits(FP8KVRows):
    """As FP8 with one bit of mantissa."""

    def encode(self, rows):
        data, scale = super().encode(rows)
        data[..., : self.nope] &= 0xFC
        return data, scale


@dataclasses.dataclass(frozen=True)
class HalfAKey(FP4IndexRows):
    """Keys of which every second channel is lost."""

    def encode(self, rows):
        data, scale = super().encode(rows)
        return data & 0x0F, scale


@pytest.mark.parametrize(
    ("made_by", "worse"),
    [("kv_rows", lambda _, head, rope: FewerBits(head - rope, rope)), ("index_rows", lambda _, width: HalfAKey(width))],
)
def test_a_worse_format_of_rows_fails(monkeypatch, made_by, worse):
    model, texts = short(2)
    original = getattr(pool, made_by)

    def make(kv_format, *shape):
        return (worse if kv_format == "fp8" else original)(kv_format, *shape)

    monkeypatch.setattr(pool, made_by, make)
    with use(OPS["store_rows"], "torch"), use(OPS["as_stored"], "torch"):
        finding = held(compared(model, texts, [(ROUNDED, STORED)])[0], "stored", kvformat.SAME)
    assert finding.ok is False and finding.figures["mean"] > 1e-3, finding.detail
    assert "1e-06 are allowed" in finding.detail


def test_rows_far_from_what_was_trained_fail_the_built_in_bounds():
    model, texts = short(2)
    coarse = dataclasses.replace(ROUNDED, kv=lambda x: torch.round(x))
    finding = held(compared(model, texts, [(PLAIN, coarse)])[0], "coarse", kvformat.BUILTIN_BOUNDS)
    assert finding.ok is False and finding.figures["mean"] > 0.05, finding.detail


def test_figures_are_of_the_distributions():
    p, q = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    nats, same, sure = kvformat._apart(p, q)
    assert nats[0] == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) and nats[1] == 0
    assert same.tolist() == [False, True] and sure.tolist() == [False, True]
    apart = Apart(torch.tensor([0, 63, 64, 130]), torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([1, 0, 1, 1]) > 0,
                  torch.tensor([0, 1, 1, 1]) > 0)  # fmt: skip
    figures = apart.figures()
    assert (figures["mean"], figures["max"], figures["top1"]) == (4, 7, 0.75)
    assert figures["sure_top1"] == pytest.approx(2 / 3) and figures["sure_positions"] == 3
    assert [(b["from"], b["to"], b["positions"], b["mean"]) for b in figures["by_position"]] == [
        (0, 63, 2, 2), (64, 127, 1, 5), (128, 255, 1, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("mean", "p99", "sure"), [(4.1, 7, 0.6), (3.9, 7, 0.6), (4.1, 6, 0.6), (4.1, 7, 0.7)])
def test_each_bound_counts(mean, p99, sure):
    apart = Apart(torch.arange(4), torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([1, 0, 1, 1]) > 0,
                  torch.tensor([0, 1, 1, 1]) > 0)  # fmt: skip
    ok = (mean, p99, sure) == (4.1, 7, 0.6)
    assert held(apart, "x", kvformat.Bounds(mean, p99, sure, "given")).ok is ok


def test_beyond_assumed_bounds_nothing_is_said_of_weights_of_unknown_training():
    yes = torch.ones(2) > 0
    within, beyond = (Apart(torch.arange(2), torch.tensor([x, x]), yes, yes) for x in (0.01, 0.2))
    assert held(within, "x", kvformat.BOUNDS, is_known=False).ok is True
    finding = held(beyond, "x", kvformat.BOUNDS, is_known=False)
    assert finding.ok is None and "not known" in finding.detail and finding.figures["mean"] == pytest.approx(0.2)
    assert held(beyond, "x", kvformat.BOUNDS).ok is False


def test_what_is_no_number_fails_and_says_where():
    yes = torch.ones(2) > 0
    finding = held(Apart(torch.arange(2), torch.tensor([0.0, float("nan")]), yes, yes), "x", kvformat.BOUNDS)
    assert finding.ok is False and "1 of 2 positions" in finding.detail


def test_a_shape_that_fp8_rows_cannot_hold_is_left_out(tmp_path):
    path = random_checkpoint(tmp_path / "odd", tiny((0, 4), head_dim=48), 0, "bf16")
    (only,) = kvformat.check(Wanted(str(path), quick=True, numerics="exact"))
    assert only.ok is None and "left out" in only.detail and "groups of 64" in only.detail


def test_without_a_tokenizer_ids_are_drawn_and_with_one_sentences(tmp_path):
    bare = subject.subject(Wanted(str(random_checkpoint(tmp_path / "tiny", tiny((0, 4)), 0, "bf16")), quick=True))
    texts = kvformat.texts_for(bare, NANO)
    assert [len(t) for t in texts] == [700, 700] and max(map(max, texts)) < bare.model.config.vocab_size
    named = subject.Subject(bare.model, tokenizer_dir=subject.subject(NANO).model.path)
    first, second = kvformat.texts_for(named, NANO)
    assert "What is the access code of the" in named.tokenizer.decode(first) and first != second
