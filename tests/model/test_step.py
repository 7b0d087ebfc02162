"""`Step`: every index it derives, against loops over positions that say what it means."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from pyrosome.model.step import Span, Step
from pyrosome.ops.rows import UnitedRows

RATIOS = [1, 2, 4, 8, 128]


@dataclasses.dataclass
class Token:
    """What one place of a step holds; position -1 is padding."""

    id: int
    position: int
    span: int


def random_spans(draw: random.Random) -> list[Span]:
    """Spans of every sort: at the beginning or far along, single tokens, long ones, empty ones."""
    spans = []
    for slot in range(1, 2 + draw.randrange(5)):
        start = draw.choice([0, 0, 1, 3, 4, 7, 126, 127, 128, 129, draw.randrange(400)])
        length = draw.choice([0, 1, 1, 1, 2, 3, 4, 5, 8, draw.randrange(1, 40), draw.randrange(1, 300)])
        spans.append(Span(slot, start, [draw.randrange(1, 1000) for _ in range(length)]))
    draw.shuffle(spans)
    return spans


CASES = []
for seed in range(40):
    draw = random.Random(seed)
    spans = random_spans(draw)
    padding = {}
    if seed % 2:
        padding = {"pad_spans_to": draw.randrange(8), "pad_lengths_to": draw.choice([0, 1, 3, 50])}
        padding["context"] = draw.choice([0, 5, 700])
    CASES.append(pytest.param(spans, padding, id=f"{seed}{'-padded' if padding else ''}"))
each_case = pytest.mark.parametrize(("spans", "padding"), CASES)


def written_out(
    spans: list[Span], pad_spans_to: int = 0, pad_lengths_to: int = 0, context: int = 0
) -> list[list[Token]]:
    """Span by span, token by token, padding included."""
    out = []
    for b in range(max(len(spans), pad_spans_to)):
        span = spans[b] if b < len(spans) else Span(0, 0, [])
        room = max(len(span.ids), pad_lengths_to, 1 if b >= len(spans) else 0)
        tokens = [Token(t, span.start + i, b) for i, t in enumerate(span.ids)]
        out.append(tokens + [Token(0, -1, b)] * (room - len(tokens)))
    return out


def flat(spans, padding) -> list[Token]:
    return [t for tokens in written_out(spans, **padding) for t in tokens]


def start_of(spans: list[Span], b: int) -> int:
    return spans[b].start if b < len(spans) else 0


def slot_of(spans: list[Span], b: int) -> int:
    return spans[b].slot if b < len(spans) else 0


def stop_of(spans: list[Span], b: int) -> int:
    return spans[b].start + len(spans[b].ids) if b < len(spans) else 0


# What a step holds.


@each_case
def test_tokens_positions_and_layout(spans, padding):
    step, rooms = Step.of(spans, **padding), written_out(spans, **padding)
    tokens = flat(spans, padding)
    assert step.ids_T.tolist() == [t.id for t in tokens]
    assert step.position_T.tolist() == [t.position for t in tokens]
    assert step.span_T.tolist() == [t.span for t in tokens]
    B = range(len(rooms))
    assert step.slot_B.tolist() == [slot_of(spans, b) for b in B]
    assert step.start_B.tolist() == [start_of(spans, b) for b in B]
    assert step.stop_B.tolist() == [stop_of(spans, b) for b in B]
    first = 0
    for (a, b), room in zip(step.layout, rooms, strict=True):
        assert (a, b) == (first, first + len(room))
        first = b
    assert step.context == max([padding.get("context", 0)] + [stop_of(spans, b) for b in B])
    assert all(t.dtype == torch.int64 for t in (step.ids_T, step.position_T, step.span_T, step.slot_B, step.start_B))


@each_case
def test_the_host_s_copy_is_there_exactly_where_there_is_no_padding(spans, padding):
    step = Step.of(spans, **padding)
    exact = all(t.position >= 0 for t in flat(spans, padding))
    assert step.mirror == (tuple((s.start, s.start + len(s.ids)) for s in spans) if exact else None)


@each_case
def test_the_last_token_of_each_span(spans, padding):
    step, at = Step.of(spans, **padding), 0
    for b, room in enumerate(written_out(spans, **padding)):
        real = sum(t.position >= 0 for t in room)
        assert int(step.last_token_B()[b]) == at + max(real - 1, 0)
        at += len(room)


def test_padding_adds_no_more_than_was_asked():
    spans = [Span(1, 5, [7, 8]), Span(2, 0, [9])]
    assert Step.of(spans).layout == ((0, 2), (2, 3))
    assert Step.of(spans, pad_spans_to=2, pad_lengths_to=1, context=7).mirror == ((5, 7), (0, 1))
    assert Step.of(spans, pad_spans_to=4).layout == ((0, 2), (2, 3), (3, 4), (4, 5))
    assert Step.of(spans, pad_spans_to=3, pad_lengths_to=4).layout == ((0, 4), (4, 8), (8, 12))


# What it derives.


@each_case
def test_emitted_rows(spans, padding):
    step, tokens = Step.of(spans, **padding), flat(spans, padding)
    for ratio in RATIOS:
        ends = [i for i, t in enumerate(tokens) if t.position >= 0 and (t.position + 1) % ratio == 0]
        emit, real = step.emit(ratio), len(ends)
        assert emit.token[:real].tolist() == ends
        assert emit.end[:real].tolist() == [tokens[i].position for i in ends]
        assert emit.start[:real].tolist() == [start_of(spans, tokens[i].span) for i in ends]
        assert emit.slot[:real].tolist() == [slot_of(spans, tokens[i].span) for i in ends]
        assert (emit.end[real:] == -1).all() and len({len(x) for x in emit}) == 1
        assert ((emit.token >= 0) & (emit.token < max(len(tokens), 1))).all(), "padding must point at some token"
        if step.mirror is not None:
            assert len(emit.end) == real, "without padding the bound is exact"


@pytest.mark.parametrize("ratio", [4, 8])
def test_the_bound_on_emitted_rows_is_the_layout_s_alone(ratio):
    """A captured step is replayed at other positions: its shapes must not follow them."""
    shapes = set()
    for start in range(2 * ratio):
        for length in range(1, 12):
            step = Step.of([Span(1, start, [5] * length), Span(2, 3, [5])], pad_lengths_to=12, context=100)
            shapes.add((len(step.emit(ratio).end), step.all_rows(ratio).shape, step.window_index(6, 8).shape))
    assert len(shapes) == 1


@each_case
def test_visible_rows(spans, padding):
    step, tokens = Step.of(spans, **padding), flat(spans, padding)
    for ratio in RATIOS:
        bound = step.num_rows(ratio)
        assert bound == step.context // ratio
        for t, visible, rows in zip(tokens, step.visible_T(ratio).tolist(), step.all_rows(ratio).tolist(), strict=True):
            # Row b pools positions b * ratio to b * ratio + ratio - 1: it is seen once its last one is not ahead.
            seen = [b for b in range(bound) if t.position >= 0 and b * ratio + ratio - 1 <= t.position]
            assert visible == len(seen)
            assert rows == seen + [-1] * (bound - len(seen))


@pytest.mark.parametrize(("width", "ring_rows"), [(24, 24), (24, 27), (1, 1), (128, 131)])
@each_case
def test_the_window_reads_each_position_s_own_row(spans, padding, width, ring_rows):
    """Rows are labelled by slot and position, and read back through `UnitedRows` as attention does."""
    step, tokens = Step.of(spans, **padding), flat(spans, padding)
    rings = torch.full((len(step.layout), ring_rows, 2), -7.0)
    for b, span in enumerate(spans):
        for p in range(max(0, span.start - ring_rows), span.start):
            rings[b, p % ring_rows] = torch.tensor([span.slot, p], dtype=torch.float32)
    fresh = torch.tensor([[slot_of(spans, t.span), t.position] for t in tokens], dtype=torch.float32).view(-1, 2)
    index = step.window_index(width, ring_rows)
    assert index.shape == (len(tokens), width)
    rows, at = UnitedRows(rings, fresh).read(index)
    found = rows[at]
    for i, t in enumerate(tokens):
        wanted = range(t.position - width + 1, t.position + 1)
        assert [n >= 0 for n in index[i].tolist()] == [t.position >= 0 and p >= 0 for p in wanted]
        for w, p in enumerate(wanted):
            if t.position >= 0 and p >= 0:
                assert found[i, w].tolist() == [slot_of(spans, t.span), p]


@each_case
def test_without_a_ring_the_window_reads_the_step_alone(spans, padding):
    """Training: whole sequences from position 0, and no ring."""
    spans = [s._replace(start=0) for s in spans]
    step, tokens = Step.of(spans, **padding), flat(spans, padding)
    for i, row in enumerate(step.window_index(5, 0).tolist()):
        reach = min(tokens[i].position + 1, 5)
        assert row == [-1] * (5 - reach) + list(range(1 + i - reach + 1, 1 + i + 1))


@each_case
def test_ring_places_keep_the_newest_rows_and_no_other(spans, padding):
    step, tokens = Step.of(spans, **padding), flat(spans, padding)
    for ring_rows in (1, 3, 8, 24, 131):
        places = list(zip(*(x.tolist() for x in step.ring_place(ring_rows)), strict=True))
        assert all(0 <= row < ring_rows for _, row in places)
        kept = {}
        for t, (slot, row) in zip(tokens, places, strict=True):
            newest = t.position >= 0 and t.position >= stop_of(spans, t.span) - ring_rows
            assert slot == (slot_of(spans, t.span) if newest else 0)
            if newest:
                assert row == t.position % ring_rows
                assert (slot, row) not in kept, "two tokens on one row: the order of writing would decide"
                kept[slot, row] = t.position
        for s in spans:
            stop = s.start + len(s.ids)
            wanted = set(range(max(s.start, stop - ring_rows), stop))
            assert {p for (slot, _), p in kept.items() if slot == s.slot} == wanted


def test_what_is_derived_is_derived_once():
    step = Step.of([Span(1, 0, [5] * 9)])
    for derive in (
        lambda: step.emit(4).token,
        lambda: step.visible_T(4),
        lambda: step.all_rows(4),
        lambda: step.window_index(3, 5),
        lambda: step.ring_place(5)[0],
    ):
        assert derive() is derive()
    assert step.emit(4) is not step.emit(8) and step.window_index(3, 5) is not step.window_index(3, 6)
    assert step.window_index(3, 5) is not step.window_index(4, 5)


def test_a_step_is_frozen():
    step = Step.of([Span(1, 0, [5])])
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.context = 3
    assert step.device.type == "cpu"


@pytest.mark.parametrize("lengths", [[1], [2], [3], [1, 1, 1], [5, 2]])
def test_on_a_gpu_each_field_begins_at_sixteen_bytes(lengths):
    """Or a kernel that reads it would be compiled anew in the middle of a request."""
    spans = [Span(slot, 7 * slot, range(n)) for slot, n in enumerate(lengths)]
    names = ("ids_T", "position_T", "span_T", "slot_B", "start_B", "stop_B", "floor_B")
    elsewhere, here = Step.of(spans, "meta"), Step.of(spans)
    for name in names:
        found, wanted = getattr(elsewhere, name), getattr(here, name)
        assert found.shape == wanted.shape and found.storage_offset() % 2 == 0
    assert here.packed.numel() == 3 * sum(lengths) + 4 * len(lengths)  # as captured steps of the CPU find them
