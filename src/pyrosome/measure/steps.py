"""Steps of networks with seeded weights, timed: decoding over filled caches and parts of prompts.

Row shapes are V4-Flash's (heads of 512 channels, index keys of 128, windows of 128, 512 rows chosen), as are formats
and arithmetic; widths and numbers of layers, heads and experts vary, so that each kind of work weighs differently.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from pyrosome.config import ModelConfig
from pyrosome.engine.runner import Runner
from pyrosome.model.build import Network
from pyrosome.model.build import fill as fill_weights
from pyrosome.model.numerics import TRAINED
from pyrosome.plan.inventory import Model
from pyrosome.plan.work import Load
from pyrosome.testing.checkpoints import random_tensors
from pyrosome.testing.filled import RandomRows, fill

KV_FORMAT = "fp8"
WEIGHTS_SEED, ROWS_SEED = 5, 7
WARM = 12  # decode steps before any is timed: those that finish a row of four tokens are captured by then too
LEAST_ROUNDS, MOST_ROUNDS = 4, 32  # the first round is not counted
GROUP = 4  # decode steps that are timed together: one of them finishes a row of the CSA layers


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network to time, and at which loads."""

    name: str
    hidden: int
    width: int  # of an expert
    heads: int
    latent: int  # of the query
    groups: int  # of the output's projection, each of `out` channels
    out: int
    index_heads: int
    experts: int
    chosen: int
    ratios: tuple[int, ...]
    vocab: int = 4096
    loads: tuple[Load, ...] = ()

    @property
    def config(self) -> ModelConfig:
        """As a checkpoint would say it."""
        return ModelConfig.preset(
            "flash", hidden_size=self.hidden, moe_intermediate_size=self.width, num_attention_heads=self.heads,
            q_lora_rank=self.latent, o_groups=self.groups, o_lora_rank=self.out, index_n_heads=self.index_heads,
            n_routed_experts=self.experts, num_experts_per_tok=self.chosen, num_hidden_layers=len(self.ratios),
            compress_ratios=self.ratios, vocab_size=self.vocab, num_hash_layers=1, num_nextn_predict_layers=0,
        )  # fmt: skip

    @property
    def model(self) -> Model:
        """As the planner sees it."""
        return Model.of(self.config, 0, name=self.name)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One load of one shape, and how long a step of it took: the median, in seconds."""

    shape: Shape
    load: Load
    seconds: float
    spread: float  # (largest - smallest) / median


def seeded(config: ModelConfig) -> Network:
    """A network with seeded weights as a checkpoint has them: FP8 matrices, FP4 experts."""
    network = Network(config, TRAINED, drafts=False)
    fill_weights(network, random_tensors(config, WEIGHTS_SEED, "fp8fp4", num_stages=0), unpack=False)
    return network.eval()


def clock(threads: int) -> Callable[[], float]:
    """What times steps: one thread by its own CPU time, which others cannot take from; several by the clock."""
    return time.thread_time if threads == 1 else time.perf_counter


class Run(NamedTuple):
    """What is timed."""

    run: Callable[[], None]
    again: Callable[[], object]  # what makes it possible once more
    steps: int


class Timed:
    """A network, ready to be timed at several loads."""

    def __init__(
        self, network: Network, loads: Sequence[Load], now: Callable[[], float], kv_format: str = KV_FORMAT
    ) -> None:
        self._network, self._now, self._kv_format = network, now, kv_format
        self._runs = [self._decoding(load) if load.tokens == 1 else self._prompt(load) for load in loads]
        self._seconds: list[list[float]] = [[] for _ in loads]

    def take(self, at: int) -> None:
        """Time steps at the load of number `at` once more.

        Others go before them untimed, as in a long answer or prompt: they find memory and caches as they go on.
        """
        run, again, steps = self._runs[at]
        again()
        run()
        again()
        began = self._now()
        run()
        self._seconds[at].append((self._now() - began) / steps)

    def medians(self) -> list[float]:
        """Seconds of a step at each load."""
        return [statistics.median(times) for times in self._counted()]

    def spreads(self) -> list[float]:
        """(largest - smallest) / median at each load."""
        return [(max(times) - min(times)) / statistics.median(times) for times in self._counted()]

    def _counted(self) -> list[list[float]]:
        """The first time of several is left out: kernels were chosen then, and memory was asked for."""
        return [times[1:] or times for times in self._seconds]

    def _decoding(self, load: Load) -> Run:
        """Sequences that go on greedily over filled caches."""
        room = load.context + WARM + 2 * GROUP * MOST_ROUNDS
        runner = Runner(self._network, self._kv_format, load.sequences, room)
        sequences = [runner.open() for _ in range(load.sequences)]
        for i, sequence in enumerate(sequences):
            fill(runner, sequence, load.context, RandomRows(ROWS_SEED + i))
        tokens = [1 + i for i in range(load.sequences)]

        def run(steps: int = GROUP) -> None:
            for _ in range(steps):
                rows = runner.step([(s, [t]) for s, t in zip(sequences, tokens, strict=True)])
                tokens[:] = [int(row.argmax()) for row in rows]

        run(WARM)
        return Run(run, lambda: None, GROUP)

    def _prompt(self, load: Load) -> Run:
        """A part of a prompt, over a filled cache or from the start."""
        runner = Runner(self._network, self._kv_format, 1, load.context + load.tokens)
        ids = list(_ids(load.tokens, self._network.config.vocab_size))
        sequence = runner.open()
        if load.context:
            fill(runner, sequence, load.context, RandomRows(ROWS_SEED))
        start = runner.snapshot(sequence)

        def run() -> None:
            runner.step([(sequence, ids)])

        return Run(run, lambda: runner.restore(sequence, start), 1)


def _ids(count: int, vocab: int) -> Iterator[int]:
    g = torch.Generator().manual_seed(1)
    yield from torch.randint(vocab, (count,), generator=g).tolist()


def measured(
    shapes: Sequence[Shape], threads: int, until: float, say: Callable[[str], None] = lambda _: None
) -> list[Sample]:
    """Times of all shapes at all their loads, in rounds over all of them, so that noise falls on none alone.

    Args:
        until: as `time.monotonic`; no round is begun that would end later, but for the first LEAST_ROUNDS.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timed = []
        for shape in shapes:
            began = time.monotonic()
            timed.append(Timed(seeded(shape.config), shape.loads, clock(threads)))
            say(f"a network {shape.name} was made in {time.monotonic() - began:.0f} s")
        rounds, longest = 0, 0.0
        while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.monotonic() + longest < until):
            began = time.monotonic()
            for shape, one in zip(shapes, timed, strict=True):
                for at in range(len(shape.loads)):
                    one.take(at)
            rounds, longest = rounds + 1, max(longest, time.monotonic() - began)
        say(f"{sum(len(shape.loads) for shape in shapes)} steps were timed {rounds} times each")
    finally:
        torch.set_num_threads(before)
    return [
        Sample(shape, load, seconds, spread)
        for shape, one in zip(shapes, timed, strict=True)
        for load, seconds, spread in zip(shape.loads, one.medians(), one.spreads(), strict=True)
    ]
