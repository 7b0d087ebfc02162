"""The loop: batches in, a checkpoint out; resumable to the bit.

    python: train(Recipe.load("nano"), Path("run"))        shell: pyrosome train nano --out run

One step: draw samples, pack them, run the network, differentiate, step the masters, copy them to the network.  What a
run is at any moment is in `TrainState`; nothing random happens outside of the samples, and those are functions of
their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrosome.errors import RequestError, TrainError
from pyrosome.model.build import Network
from pyrosome.model.deepseek_v4 import Indexer
from pyrosome.train.batch import Batch, pack
from pyrosome.train.curves import Curves, plot
from pyrosome.train.data import Samples, in_steps, tokenizer_for
from pyrosome.train.loss import Losses, first_bad, losses, rebalance
from pyrosome.train.muon import Tuner
from pyrosome.train.network import (
    Masters,
    export,
    initial_tensors,
    load_masters,
    parameters_of,
    refresh,
    trainable_network,
)
from pyrosome.train.recipe import Recipe, Stage
from pyrosome.train.state import TrainState, load_state, save_state
from pyrosome.train.threads import probe

log = logging.getLogger(__name__)
ALL_ROWS = 1 << 30  # an indexer's top-k that leaves nothing out


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run stands: finished, or stopped by its time limit."""

    directory: Path
    step: int
    tokens: int
    finished: bool
    accuracy: dict[str, float]


def train(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    seconds: float | None = None,
    progress: Any = None,
    start_from: str | Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train by a recipe, in a directory of its own; go on there with `resume`.

    Args:
        threads: None: as many as a few steps run fastest with.
        seconds: stop after so long, in a state that can be resumed.
        start_from: a checkpoint whose weights are the first ones.
        stop: asked after every step; where it says so, the run is saved and ends.

    Raises:
        RequestError: there is a run in the directory already, or it is of another recipe.
        CheckpointError: `start_from` is of another shape.
        TrainError: the loss is not finite; the last good state is kept.
    """
    run = Run(recipe, directory, resume=resume, threads=threads, device=device, start_from=start_from)
    with progress or contextlib.nullcontext():
        return run.go(seconds, progress, stop)


class Run:
    """One training run: everything that lasts from step to step."""

    def __init__(
        self, recipe: Recipe, directory: Path, *, resume: bool, threads: int | None, device: str, start_from: Any = None
    ) -> None:
        self.recipe, self.directory, self.device = recipe, directory, device
        recipe.check_samples()
        state = load_state(directory, recipe) if directory.exists() else None
        if state is not None and not resume:
            raise TrainError(
                f"{directory} holds a run of {state.tokens:,} tokens already; go on with it (--resume), or name "
                "another directory (--out)"
            )
        directory.mkdir(parents=True, exist_ok=True)
        if state is None:
            (directory / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        self.tokenizer = tokenizer_for(recipe, directory, Path(start_from) if start_from else None)
        self.samples = Samples(recipe, self.tokenizer)
        config = recipe.config
        if state is None:
            if start_from:
                self.masters = load_masters(start_from, config)
            else:
                self.masters = Masters(config, dict(initial_tensors(config, recipe.seed)))
        else:
            self.masters = _restored(config, state)
        to = torch.device(device)
        self.masters.weights = {n: w.to(to) for n, w in self.masters.weights.items()}
        self.masters.fixed = {n: w.to(to) for n, w in self.masters.fixed.items()}
        o = recipe.optimizer
        self.tuner = Tuner(
            self.masters.weights, self.masters.adamw, self.masters.parts, momentum=o.momentum, betas=(o.beta1, o.beta2),
            weight_decay=o.weight_decay, update_rms=o.update_rms,
            dtype=torch.bfloat16 if recipe.run.dtype == "bfloat16" else torch.float32,
        )  # fmt: skip
        self.state = state or TrainState(step=0, tokens=0, fingerprint=recipe.fingerprint(), recipe=recipe.to_dict())
        if state is not None:
            for name in self.tuner.first:
                self.tuner.first[name].copy_(state.tensors[f"first/{name}"])
            for name in self.tuner.second:
                self.tuner.second[name].copy_(state.tensors[f"second/{name}"])
            self.tuner.num_steps = state.extra["optimizer_steps"]
        self.curves = Curves(directory / "curves.jsonl", self.state.step)
        self.model, self.parameters = self._network()
        self.accuracy: dict[str, float] = dict(self.state.extra.get("accuracy", {}))
        self.threads = threads or (probe(self._one_step) if to.type == "cpu" else 1)
        torch.set_num_threads(self.threads)

    # ------------------------------------------------------------- where the run stands

    @property
    def stage(self) -> Stage:
        """The stage the run is in; the last one, when all are done."""
        return self.recipe.stages[min(self.state.stage, len(self.recipe.stages) - 1)]

    @property
    def quantized(self) -> bool:
        """Whether the weights are being brought to the values they will be stored with."""
        run = self.recipe.run
        return self.state.tokens >= run.max_tokens - run.quantize_tokens

    @property
    def learning(self) -> float:
        """Share of the full learning rate: a linear rise, a level part, a linear fall to zero."""
        run = self.recipe.run
        rise = min(1.0, (self.state.step + 1) / max(1, self.recipe.optimizer.warmup_steps))
        left = run.max_tokens - self.state.tokens
        return rise * min(1.0, max(0.0, left / run.decay_tokens) if run.decay_tokens else 1.0)

    @property
    def mtp_weight(self) -> float:
        """0.3 as long as the learning rate holds, 0.1 from where it falls (report, section 4.2.2)."""
        falls = self.state.tokens >= self.recipe.run.max_tokens - self.recipe.run.decay_tokens
        return self.recipe.loss.mtp_final if falls and self.recipe.run.decay_tokens else self.recipe.loss.mtp

    def _network(self) -> tuple[Network, dict[str, Tensor]]:
        model = trainable_network(self.masters, quantized=self.quantized, device=self.device)
        self.is_quantized = self.quantized
        select(model, self.stage.selection, self.recipe.config.index_topk)
        return model, parameters_of(model, self.masters)

    # ------------------------------------------------------------- the loop

    def go(self, seconds: float | None, progress: Any, stop: Callable[[], bool] = lambda: False) -> Result:
        """Steps until the recipe's tokens are done, `seconds` are over, or `stop` says so."""
        began = saved = time.monotonic()
        state, run = self.state, self.recipe.run
        source = self.samples.source(self.stage)
        while state.tokens < run.max_tokens and state.stage < len(self.recipe.stages):
            if self.is_quantized != self.quantized:
                _tell(progress, "weights are rounded to FP8 and FP4 from here on")
                self.model, self.parameters = self._network()
            samples, following = source.batch(state.samples, run.step_tokens)
            batch = pack(samples, self.device)
            at = time.monotonic()
            row = self.step(batch)
            state.samples = following
            state.step, state.tokens = state.step + 1, state.tokens + batch.num_tokens
            state.stage_tokens += batch.num_tokens
            took = time.monotonic() - at
            row |= {"step": state.step, "tokens": state.tokens, "stage": self.stage.name, "seconds": round(took, 4)}
            row["stage_tokens"] = state.stage_tokens
            row["tokens_per_s"] = round(batch.num_tokens / took, 1)
            if state.step % (self.stage.evaluate_steps or run.evaluate_steps) == 0:
                row["accuracy"] = self.accuracy = self.evaluate()
            self.curves.append(row)
            if progress is not None:
                progress.update(row)
            if self._stage_is_done():
                _tell(progress, f"stage {self.stage.name} is done after {state.stage_tokens:,} tokens: {self._why()}")
                state.stage, state.stage_tokens, state.samples = state.stage + 1, 0, 0
                self.accuracy = {}  # of another mix of samples: it opens no gate of this one
                if state.stage == len(self.recipe.stages):
                    break
                source = self.samples.source(self.stage)
                select(self.model, self.stage.selection, self.recipe.config.index_topk)
                self.save()
            now = time.monotonic()
            if now - saved > run.checkpoint_seconds:
                self.save()
                saved = now
                if progress is not None:
                    progress.note(f"saved at {state.tokens:,} tokens", checkpoint=True)
            if stop() or (seconds is not None and now - began > seconds):
                break
        finished = state.tokens >= run.max_tokens or state.stage == len(self.recipe.stages)
        self.save()
        if finished:
            self.export()
        return Result(self.directory, state.step, state.tokens, finished, self.accuracy)

    def step(self, batch: Batch) -> dict[str, Any]:
        """One step of the optimizer.

        Raises:
            TrainError: the loss or a gradient is not finite.
        """
        loss = self._differentiate(batch)
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        if not math.isfinite(norm) or not math.isfinite(float(loss.total.detach())):
            raise self._not_finite(batch, gradients, float(loss.total.detach()))
        if norm > self.recipe.optimizer.clip:
            for g in gradients.values():
                g.mul_(self.recipe.optimizer.clip / norm)
        o, learning = self.recipe.optimizer, self.learning
        frozen = [n for n in gradients if ".indexer." not in n] if self.stage.selection == "warmup" else []
        self.tuner.step(gradients, o.muon_lr * learning, o.adamw_lr * learning, frozen)
        refresh(self.parameters, self.masters, quantized=self.is_quantized)
        if self.stage.selection != "warmup":
            rebalance(self.masters.fixed, self.model, loss.load, self.recipe.loss.bias_speed)
        for p in self.parameters.values():
            p.grad = None
        answers = batch.is_answer
        return {
            "loss": round(float(loss.lm.detach()), 6), "mtp_loss": round(float(loss.mtp.detach()), 6),
            "indexer_loss": round(float(loss.indexer.detach()), 6), "balance": round(float(loss.balance.detach()), 6),
            "grad_norm": round(norm, 6), "lr": learning,
            "right": round(float(loss.hit[answers].float().mean()), 4) if bool(answers.any()) else None,
        }  # fmt: skip

    def _differentiate(self, batch: Batch) -> Losses:
        kind = torch.bfloat16 if self.recipe.run.dtype == "bfloat16" else torch.float32
        with torch.autocast(torch.device(self.device).type, kind, enabled=kind != torch.float32):
            loss = losses(self.model, batch, self.recipe.loss, self.mtp_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return loss

    def _one_step(self) -> None:
        """As much work as a step is, for measuring: nothing is changed."""
        samples, _ = self.samples.source(self.stage).batch(0, self.recipe.run.step_tokens)
        self._differentiate(pack(samples, self.device))
        for p in self.parameters.values():
            p.grad = None

    # ------------------------------------------------------------- judging

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of right answer tokens in held-out samples, for each kind of the stage that has answers."""
        hits: dict[str, list[float]] = {}
        for mix in self.stage.mix:
            samples = self.samples.heldout(mix, self.recipe.run.evaluate_samples)
            for group in in_steps(samples, self.recipe.run.step_tokens):
                batch = pack(group, self.device)
                streams = self.model(batch.step).streams
                hit = self.model.logits(streams[batch.row]).argmax(-1) == batch.target
                hits.setdefault(mix.label, []).extend(hit[batch.is_answer].float().tolist())
        return {kind: round(sum(h) / len(h), 4) for kind, h in hits.items() if h}

    def _stage_is_done(self) -> bool:
        stage, tokens = self.stage, self.state.stage_tokens
        return tokens >= stage.max_tokens or (tokens >= stage.min_tokens and self._gate_is_open())

    def _gate_is_open(self) -> bool:
        gate = self.stage.gate
        return gate is not None and self.accuracy.get(gate.kind, 0.0) >= gate.accuracy

    def _why(self) -> str:
        gate = self.stage.gate
        if gate is None:
            return "that was its length"
        reached = f"held-out {gate.kind} {self.accuracy.get(gate.kind, 0.0):.3f}, and {gate.accuracy} was asked"
        return reached if self._gate_is_open() else f"{reached}: MISSED, it had no more tokens"

    def _not_finite(self, batch: Batch, gradients: dict[str, Tensor], loss: float) -> TrainError:
        return TrainError(
            f"step {self.state.step + 1}: the loss is {loss} and the first value that is not finite is in "
            f"{first_bad(self.model, batch, gradients)}; the state of {self.state.tokens:,} tokens or a little before "
            f"is kept in {self.directory}: resume with a lower optimizer.muon_lr or optimizer.clip"
        )

    # ------------------------------------------------------------- on disk

    def save(self) -> None:
        """Write the state; a run that is killed goes on from here."""
        tensors = {f"weight/{n}": w for n, w in self.masters.weights.items()}
        tensors |= {f"fixed/{n}": w for n, w in self.masters.fixed.items()}
        tensors |= {f"first/{n}": w for n, w in self.tuner.first.items()}
        tensors |= {f"second/{n}": w for n, w in self.tuner.second.items()}
        self.state.extra = {"optimizer_steps": self.tuner.num_steps, "accuracy": self.accuracy}
        self.state.tensors = tensors
        self.curves.sync()
        self.state.curves_offset = self.curves.offset
        save_state(self.directory, self.state)

    def export(self) -> None:
        """The weights as checkpoints: bfloat16, and the official FP8 with FP4 experts."""
        beside = sorted(self.tokenizer.glob("*.json"))
        export(self.directory / "bf16", self.masters, "bf16", beside)
        export(self.directory / "fp8fp4", self.masters, "fp8fp4", beside)
        with contextlib.suppress(RequestError):  # without matplotlib there is no picture; the rows are there
            plot(self.curves.path, self.directory / "curves.png")


def select(model: Network, selection: str, topk: int) -> None:
    """How CSA layers choose rows: by the indexer ("sparse"), or all of them ("dense", "warmup")."""
    for module in model.modules():
        if isinstance(module, Indexer):
            module.topk = topk if selection == "sparse" else ALL_ROWS


def _restored(config: Any, state: TrainState) -> Masters:
    """Masters as a state holds them."""
    masters = Masters.__new__(Masters)
    masters._of(
        config,
        {n.removeprefix("weight/"): t for n, t in state.tensors.items() if n.startswith("weight/")},
        {n.removeprefix("fixed/"): t for n, t in state.tensors.items() if n.startswith("fixed/")},
    )
    return masters


def _tell(progress: Any, text: str) -> None:
    if progress is not None:
        progress.note(text)
    else:
        log.info(text)
