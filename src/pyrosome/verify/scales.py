"""`verify`'s check of the values: scales, codes and numbers, tensor by tensor, never more than one at a time.

What is damaged fails: NaN, codes that carry no information, scales and values that no training gives, one tensor in
another's place.  What is only unlike its own kind is told: a tensor whose values are far smaller or larger than its
siblings' in other layers.
Shape letters: N output rows, K inputs.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyrosome.checkpoint.headers import TensorInfo
from pyrosome.checkpoint.index import CheckpointIndex, open_checkpoint
from pyrosome.checkpoint.load import read_tensors
from pyrosome.checkpoint.names import IGNORED, Kind, TensorSpec, scale_name
from pyrosome.errors import CheckpointError
from pyrosome.quant import QuantTensor
from pyrosome.quant.codes import FP4_VALUES
from pyrosome.quant.e8m0 import E8M0_NAN
from pyrosome.verify.finding import Finding, Wanted

# A block's scale is its largest value over the format's, so scales of one trained matrix lie within a few binades.
# One that is 2^12 above the median would make its block's values thousands of times those of all others.
MAX_ABOVE = 12  # binades above the tensor's median
MAX_BELOW = 24  # binades below it, of blocks that are not zero
# Codes of trained weights are bell-shaped: the share of each of e2m1's 15 values is far from even, as it is in noise.
LEAST_FROM_EVEN = 0.02  # total variation distance from an even histogram
MOST_OF_ONE = 0.999  # share of the commonest code
MIN_CODES = 4096  # fewer say nothing about a histogram, and may be the same in two tensors by chance
# Weights, biases and sinks are within some hundreds; a bit that fell over in an exponent gives 2^64 times a value.
MAX_VALUE = 2.0**24
# A matrix's RMS against those of its kind: log RMS, by median and median absolute deviation.  Vectors and the small
# matrices of hyper-connections differ by layer as they were trained to.
MAX_Z, MIN_RATIO, MIN_ALIKE = 8.0, 2.0, 8
_COMPARED: tuple[Kind, ...] = ("matrix", "expert", "plain", "router")
PIECE_VALUES = 1 << 22  # values held as float32 at once
QUICK_ROWS = 128  # of a matrix, three times
QUICK_EXPERTS = 4  # of a layer
NAMED = 20  # failing tensors that get a finding of their own
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.")
_MAY_BE_ZERO: tuple[Kind, ...] = ("f32", "table")  # biases and sinks may be


def check(wanted: Wanted) -> Iterator[Finding]:
    """Findings of every tensor that is damaged, then one of each sort of storage, and of values unlike their kind's."""
    index = open_checkpoint(wanted.model)
    survey = _Survey(index, wanted)
    named = 0
    for finding in survey.run():
        named += 1
        if named <= NAMED:
            yield finding
    if named > NAMED:
        yield Finding("scales", "more tensors", False, f"{named - NAMED} more findings like those above")
    yield from survey.summaries()


class _Survey:
    """Counts over all tensors, gathered while they pass."""

    def __init__(self, index: CheckpointIndex, wanted: Wanted) -> None:
        self.index, self.wanted = index, wanted
        self.kinds = {n: s.kind for n, s in _expected(index).items()}
        self.tensors: dict[str, int] = defaultdict(int)  # of each sort of storage
        self.failed: dict[str, int] = defaultdict(int)
        self.rms: dict[str, dict[str, float]] = defaultdict(dict)  # kind of tensor -> tensor -> RMS
        self.alike: dict[tuple[object, ...], str] = {}  # kind, shape and what was counted -> the first such tensor
        self.fp4_counts = torch.zeros(16, dtype=torch.int64)
        self.scale_counts = torch.zeros(256, dtype=torch.int64)

    def run(self) -> Iterator[Finding]:
        """Every tensor that is damaged."""
        names = self._names()
        files = sorted({self.index.tensors[n].file for n in names})
        for at, file in enumerate(files):
            here = [n for n in names if self.index.tensors[n].file == file]
            yield from self._shard(here)
            self.wanted.tell(at + 1, len(files), file.name)

    def _names(self) -> list[str]:
        """What is looked at: everything, or (quick) all but most of the experts."""
        names = [n for n in self.index.tensors if n not in IGNORED]
        if not self.wanted.quick:
            return names
        rng, layers = random.Random(self.wanted.seed), defaultdict(set)
        for name in names:
            if found := _EXPERT.match(name):
                layers[found[1]].add(int(found[2]))
        kept = {layer: set(rng.sample(sorted(e), min(QUICK_EXPERTS, len(e)))) for layer, e in sorted(layers.items())}
        return [n for n in names if not (found := _EXPERT.match(n)) or int(found[2]) in kept[found[1]]]

    def _shard(self, names: list[str]) -> Iterator[Finding]:
        scales = {s for n in names if n.endswith(".weight") and (s := scale_name(n)) in self.index.tensors}
        damaged = set()
        if scales:
            for name, scale in read_tensors(self.index, sorted(scales)):
                assert isinstance(scale, Tensor)
                for finding in self._scale(name, scale):
                    damaged.add(name)
                    yield finding
        # A scale with a NaN makes its weight unreadable; it has been named already.
        wanted = [n for n in names if n not in scales and not (n.endswith(".weight") and scale_name(n) in damaged)]
        remaining = list(wanted)
        while remaining:
            try:
                for name, value in read_tensors(self.index, remaining):
                    remaining.remove(name)
                    yield from self._tensor(name, value)
            except CheckpointError as error:
                name = _next(self.index, remaining)
                remaining.remove(name)
                yield self._fail("files", name, str(error))

    def _scale(self, name: str, scale: Tensor) -> Iterator[Finding]:
        self.tensors["E8M0 scales"] += 1
        byte = scale.view(torch.uint8).flatten()
        counts = torch.bincount(byte.int(), minlength=256)
        self.scale_counts += counts
        if num_nan := int(counts[E8M0_NAN]):
            yield self._fail("E8M0 scales", name, f"{num_nan:,} of {len(byte):,} scales are NaN (byte 255)")
            return
        median = int(byte.median())
        if (above := int(byte.max()) - median) > MAX_ABOVE:
            yield self._fail(
                "E8M0 scales", name,
                f"a scale is 2^{above} times the median scale 2^{median - 127}; 2^{MAX_ABOVE} is the bound",
            )  # fmt: skip
        elif problem := self._twin(name, _digest(counts)):
            yield self._fail("E8M0 scales", name, problem)

    def _tensor(self, name: str, value: Tensor | QuantTensor) -> Iterator[Finding]:
        kind = self.kinds.get(name)
        if isinstance(value, QuantTensor):
            sort = "FP4 codes" if value.format == "fp4" else "FP8 codes"
            self.tensors[sort] += 1
            problem = self._quantised(name, value)
        elif not value.is_floating_point():
            sort = "tables"
            self.tensors[sort] += 1
            problem = self._table(name, value)
        else:
            sort = "floats"
            self.tensors[sort] += 1
            problem = self._floats(name, value, kind)
        if problem:
            yield self._fail(sort, name, problem)

    def _quantised(self, name: str, value: QuantTensor) -> str:
        counts = torch.zeros(256, dtype=torch.int64)
        squares, num, largest = 0.0, 0, 0.0
        lowest = int(value.scale.view(torch.uint8).float().median()) - MAX_BELOW
        for rows in self._row_pieces(value.shape):
            part = _rows(value, rows)
            counts += torch.bincount(part.data.view(torch.uint8).flatten().int(), minlength=256)
            values = part.dequantize()
            squares += float(values.double().square().sum())
            num += values.numel()
            largest = max(largest, float(values.abs().max()))
        if value.format == "fp8" and (num_nan := int(counts[0x7F] + counts[0xFF])):
            return f"{num_nan:,} of {num:,} codes are NaN (bytes 127 and 255)"
        codes = _nibbles(counts) if value.format == "fp4" else counts
        if value.format == "fp4":
            self.fp4_counts += codes
        if problem := _histogram(codes):
            return problem
        if problem := _too_low(value, lowest) or _too_large(largest) or self._twin(name, _digest(counts)):
            return problem
        self._keep_rms(name, squares, num)
        return ""

    def _floats(self, name: str, value: Tensor, kind: Kind | None) -> str:
        bad, squares, num, largest = 0, 0.0, 0, 0.0
        flat = value.reshape(-1, value.shape[-1]) if value.dim() > 1 else value.reshape(1, -1)
        for rows in self._row_pieces(tuple(flat.shape)):
            part = flat[rows].float()
            bad += int((~part.isfinite()).sum())
            squares += float(part.double().square().sum())
            num += part.numel()
            largest = max(largest, float(part.abs().max()))
        if bad:
            return f"{bad:,} of {num:,} values are NaN or infinite"
        if problem := _too_large(largest):
            return problem
        if squares == 0 and kind not in _MAY_BE_ZERO:
            return f"all {num:,} values looked at are zero"
        if squares:
            self._keep_rms(name, squares, num)
        return self._twin(name, squares) if squares and kind in _COMPARED else ""

    def _table(self, name: str, value: Tensor) -> str:
        low, high, experts = int(value.min()), int(value.max()), self.index.config.n_routed_experts
        if low < 0 or high >= experts:
            return f"names experts {low} to {high}, and there are experts 0 to {experts - 1}"
        ordered = value.sort(dim=-1).values
        twice = int((ordered[..., 1:] == ordered[..., :-1]).any(dim=-1).sum())
        return f"{twice:,} of {len(value):,} token ids name an expert twice" if twice else ""

    def _row_pieces(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Runs of whole scale blocks' rows that hold no more than a piece; (quick) three of them."""
        N, K = shape[-2:]
        if self.wanted.quick and N > 3 * QUICK_ROWS:
            for first in (0, N // 2 // QUICK_ROWS * QUICK_ROWS, (N - 1) // QUICK_ROWS * QUICK_ROWS):
                yield slice(first, min(first + QUICK_ROWS, N))
            return
        rows = max(1, PIECE_VALUES // K // QUICK_ROWS) * QUICK_ROWS
        for first in range(0, N, rows):
            yield slice(first, min(first + rows, N))

    def _keep_rms(self, name: str, squares: float, num: int) -> None:
        if self.kinds.get(name) in _COMPARED:
            self.rms[_NUMBER.sub("*", name)][name] = math.sqrt(squares / max(1, num))

    def _twin(self, name: str, counted: object) -> str:
        """Which tensor of its kind has the same bytes; "" where none has.  Only those that count alike are read."""
        info = self.index.tensors[name]
        if math.prod(info.shape) < MIN_CODES:
            return ""
        first = self.alike.setdefault((_NUMBER.sub("*", name), info.shape, counted), name)
        if first == name or not _same_bytes(self.index.tensors[first], info):
            return ""
        return f"holds the same bytes as {first}: one of them was written in the other's place"

    def _fail(self, sort: str, name: str, detail: str) -> Finding:
        self.failed[sort] += 1
        return Finding("scales", name, False, detail, {"sort": sort})

    def summaries(self) -> Iterator[Finding]:
        """One finding of each sort of storage, then what is unlike its kind."""
        bounds = {
            "E8M0 scales": f"no NaN, none above 2^{MAX_ABOVE} times its tensor's median",
            "FP8 codes": "no NaN, more than one code, none the same in two",
            "FP4 codes": "neither one code alone nor noise, none the same in two",
            "floats": f"no NaN, none above 2^{math.log2(MAX_VALUE):g}, no matrix of zeros, none the same in two",
            "tables": "experts there are, none twice",
        }
        plots = {"FP4 codes": self._fp4_plot, "E8M0 scales": self._scale_plot}
        for sort, bound in bounds.items():
            if not self.tensors[sort]:
                continue
            bad, num = self.failed[sort], self.tensors[sort]
            figures: dict[str, Any] = {"tensors": num, "damaged": bad}
            if sort in plots:
                figures |= {"plots": [plots[sort]()]}
            sample = " of a sample" if self.wanted.quick else ""
            yield Finding("scales", sort, not bad, f"{num - bad:,} of {num:,} tensors{sample}: {bound}", figures)
        yield self._unlike()

    def _fp4_plot(self) -> dict[str, object]:
        total = max(1, int(self.fp4_counts.sum()))
        labels = [f"{v:g}" for v in FP4_VALUES] + [f"-{v:g}" for v in FP4_VALUES]
        order = [*range(15, 7, -1), *range(8)]
        share = [float(self.fp4_counts[i]) / total for i in order]
        return {
            "title": "FP4 codes of the experts", "kind": "bars", "x": [labels[i] for i in order],
            "series": {"share": share}, "x_title": "value of the code", "y_title": "share of codes",
        }  # fmt: skip

    def _scale_plot(self) -> dict[str, object]:
        used = self.scale_counts.nonzero().flatten().tolist()
        x = list(range(min(used), max(used) + 1)) if used else []
        return {
            "title": "E8M0 scales", "kind": "bars", "x": [f"2^{b - 127}" for b in x],
            "series": {"scales": [int(self.scale_counts[b]) for b in x]}, "x_title": "scale",
            "y_title": "number of scales", "log": True,
        }  # fmt: skip

    def _unlike(self) -> Finding:
        """Tensors whose RMS is far from their kind's: told, since a layer may be unlike the others."""
        odd = [
            (kind, name, rms, median)
            for kind, by_name in sorted(self.rms.items())
            for name, rms, median in outliers(by_name)
        ]
        figures = {
            "kinds": {
                k: {"tensors": len(v), "median_rms": _median(list(v.values()))} for k, v in sorted(self.rms.items())
            },
            "unlike": [{"tensor": n, "rms": r, "median_rms": m} for _, n, r, m in odd[:200]],
        }
        said = f"RMS of {sum(map(len, self.rms.values())):,} tensors in {len(self.rms)} kinds, by layer and expert"
        if not odd:
            return Finding("scales", "value RMS", True, f"{said}: none is apart from its kind", figures)
        some = ", ".join(f"{n} ({r:.3g}, its kind {m:.3g})" for _, n, r, m in odd[:6])
        more = f" and {len(odd) - 6} more" if len(odd) > 6 else ""
        detail = f"{said}: {len(odd)} apart by more than {MAX_Z:g} deviations and {MIN_RATIO:g} times: {some}{more}"
        return Finding("scales", "value RMS", True, detail, figures, warns=True)


def outliers(by_name: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """(tensor, RMS, its kind's median) of those far from the median, by a robust z of log RMS."""
    values = {n: math.log(v) for n, v in by_name.items() if v > 0}
    if len(values) < MIN_ALIKE:
        return
    middle = _median(list(values.values()))
    spread = 1.4826 * _median([abs(v - middle) for v in values.values()])  # of a normal distribution: its deviation
    for name, v in values.items():
        if abs(v - middle) > max(MAX_Z * spread, math.log(MIN_RATIO)):
            yield name, by_name[name], math.exp(middle)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _histogram(codes: Tensor) -> str:
    """What is wrong with how often each code occurs; "" where nothing is."""
    total = int(codes.sum())
    if total < MIN_CODES:
        return ""
    share = codes.double() / total
    zero = share[0] + share[len(codes) // 2]  # of either sign
    if zero > MOST_OF_ONE:
        return f"{float(zero):.2%} of {total:,} codes are zero"
    if (most := float(share.max())) > MOST_OF_ONE:
        return f"{most:.2%} of {total:,} codes are the same one (code {int(share.argmax())})"
    if (apart := float((share - 1 / len(codes)).abs().sum() / 2)) < LEAST_FROM_EVEN:
        return f"all {len(codes)} codes are equally frequent (within {apart:.4f}), as in noise: these are not weights"
    return ""


def _too_large(largest: float) -> str:
    if largest <= MAX_VALUE:
        return ""
    return f"a value is {largest:.2g} in size; no weight is above 2^{math.log2(MAX_VALUE):g}"


def _digest(counts: Tensor) -> bytes:
    return hashlib.blake2b(counts.numpy().tobytes(), digest_size=16).digest()


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    with open(one.file, "rb") as f, open(other.file, "rb") as g:
        f.seek(one.begin)
        g.seek(other.begin)
        for at in range(0, one.nbytes, PIECE_VALUES):
            size = min(PIECE_VALUES, one.nbytes - at)
            if f.read(size) != g.read(size):
                return False
    return one.nbytes == other.nbytes


def _nibbles(bytes_256: Tensor) -> Tensor:
    """How often each 4-bit code occurs, int64 [16], of how often each byte does."""
    square = bytes_256.view(16, 16)
    return square.sum(0) + square.sum(1)


def _too_low(value: QuantTensor, lowest: int) -> str:
    """Blocks that are not zero under a scale far below the others."""
    low = (value.scale.view(torch.uint8).int() < lowest).nonzero()
    for n, k in low[:1024].tolist():
        R, C = (128, 128) if value.format == "fp8" else (1, 16)  # two FP4 codes to a byte
        block = value.data[n * R : (n + 1) * R, k * C : (k + 1) * C].contiguous().view(torch.uint8)
        if bool((block & (0x7F if value.format == "fp8" else 0x77)).any()):
            return f"the block at {(n, k)} is not zero under a scale 2^{MAX_BELOW} below the median"
    return ""


def _rows(value: QuantTensor, rows: slice) -> QuantTensor:
    R = 128 if value.format == "fp8" else 1
    scale = value.scale[rows.start // R : -(-rows.stop // R)]
    return QuantTensor(value.format, value.data[rows], scale)


def _next(index: CheckpointIndex, names: list[str]) -> str:
    """Which of several tensors `read_tensors` gives first."""
    return min(names, key=lambda n: (index.tensors[n].file.name, index.tensors[n].begin))


def _expected(index: CheckpointIndex) -> dict[str, TensorSpec]:
    try:
        return index.expected
    except CheckpointError:  # draft stages that fit no release: told by the check of the files
        return {}
