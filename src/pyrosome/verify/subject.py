"""The model under check, held in memory for the checks that run it: one at a time, loaded once.

Shape letters: T tokens, R rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyrosome.cgroups import ROOT, available_memory
from pyrosome.chat import Chat, Tokenizer
from pyrosome.chat.tokenizer import FILE_NAME
from pyrosome.checkpoint.index import BUILTIN, CheckpointIndex, open_checkpoint
from pyrosome.engine.loaded import LoadedModel, load_model
from pyrosome.errors import CheckpointError, DoesNotFit, EngineError, PlanError
from pyrosome.evals.subject import Subject as Evaluated
from pyrosome.model.build import UNPACK_BYTES
from pyrosome.model.numerics import numerics_named
from pyrosome.ops import native
from pyrosome.ops.seam import OPS
from pyrosome.options import EngineOptions
from pyrosome.verify.finding import Finding, Wanted

OFFICIAL_VOCABULARY = 129_280  # ids of every official release
STEP_TOKENS = 256  # of a text, computed at once while its rows are read
# Beside the weights: what a step works in, and per id of the vocabulary the logits that are kept for comparison.
STEP_BYTES, LOGIT_BYTES = 256 << 20, 16 << 10


@dataclasses.dataclass(frozen=True)
class _Key:
    model: str
    numerics: str
    tokenizer: Path | None
    device: str


_held: dict[_Key, Subject] = {}  # one at most


class Subject(Evaluated):
    """A loaded model, with its tokenizer where it has one, that can be asked as an evaluation asks.

    Attributes:
        is_builtin: whether it ships with this package, so that what it can do is known.
    """

    def __init__(self, model: LoadedModel, *, is_builtin: bool = False, tokenizer_dir: Path | None = None) -> None:
        # Not by the base's own: the model is loaded already, and may have no tokenizer.
        self.model, self.is_builtin = model, is_builtin
        self.options, self._numbers = EngineOptions(), itertools.count()
        self._tokenizer_dir = tokenizer_dir or model.path

    @property
    def is_official(self) -> bool:
        """Whether it has an official release's vocabulary: then what it was trained for is known."""
        return self.model.config.vocab_size == OFFICIAL_VOCABULARY

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be read: some checks need no more than ids."""
        return (self._tokenizer_dir / FILE_NAME).exists()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """The tokenizer beside the weights, or the one that was named.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return Tokenizer.from_dir(self._tokenizer_dir)

    @functools.cached_property
    def chat_template(self) -> Chat:
        """How conversations are written for this checkpoint."""
        return Chat(self._tokenizer_dir, tokenizer=self.tokenizer)


def subject(wanted: Wanted) -> Subject:
    """The model that is wanted, loaded at the first call and held until another is wanted, or `release` is called.

    Raises:
        RequestError: no such numerics, or no such device.
        CheckpointError: the checkpoint is not what it claims to be.
        DoesNotFit: its weights need more memory than is free.
    """
    key = _Key(wanted.model, wanted.numerics, wanted.tokenizer, wanted.device)
    if key not in _held:
        release()
        arithmetic = numerics_named(wanted.numerics)
        index = open_checkpoint(wanted.model)
        check_fits(index, wanted.device)
        model = load_model(wanted.model, wanted.device, arithmetic.name)
        is_builtin = str(wanted.model).startswith(BUILTIN)
        _held[key] = Subject(model, is_builtin=is_builtin, tokenizer_dir=wanted.tokenizer)
    return _held[key]


def release() -> None:
    """Let go of the model that is held, if there is one."""
    while _held:
        _held.popitem()[1].close()


def asked(wanted: Wanted, check: str, ask: Callable[[Subject], Iterator[Finding]]) -> Iterator[Finding]:
    """What `ask` finds of the model that is wanted; what is wrong with the model is a finding too, and the last.

    Raises:
        RequestError: what is wanted makes no sense.
    """
    try:
        yield from ask(subject(wanted))
    except PlanError as error:  # it does not fit, or a version of an op that was asked for does not run here
        yield Finding(check, "the model in memory", None, f"left out: {error}", _sizes(error))
    except (CheckpointError, EngineError) as error:
        yield Finding(check, "the model in memory", False, f"{type(error).__name__}: {error}")


def _sizes(error: PlanError) -> dict[str, int]:
    if not isinstance(error, DoesNotFit):
        return {}
    return {"needed_bytes": error.needed_bytes, "free_bytes": error.free_bytes}


def weight_bytes(index: CheckpointIndex, device: str = "cpu") -> int:
    """Bytes the weights take on a device once loaded: as they are stored, or a small model in float32 where no native
    kernels run.

    Draft stages that this version does not run are left out, as the loader leaves them out.
    """
    is_native = device == "cpu" and native.available()
    if 4 * index.num_weights <= UNPACK_BYTES and not is_native:
        return 4 * index.num_weights
    drafts = index.config.dspark is None
    return sum(t.nbytes for name, t in index.tensors.items() if drafts or not name.startswith("mtp."))


def check_fits(index: CheckpointIndex, device: str = "cpu") -> None:
    """Refuse weights that would not leave a device room to run them.

    Raises:
        DoesNotFit
    """
    weights = weight_bytes(index, device)
    needed = weights + STEP_BYTES + LOGIT_BYTES * index.config.vocab_size
    free = free_memory() if device == "cpu" else _free_on(device)
    if free and needed > free:
        raise DoesNotFit(
            f"{index.path.name} in memory ({weights:,} bytes of weights)", needed, free,
            "this machine" if device == "cpu" else device,
            "the checks that take one layer at a time still run; run these where the whole model fits",
        )  # fmt: skip


def _free_on(device: str) -> int:
    """Bytes free on a GPU; 0 where that cannot be told, and then loading says why."""
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except (RuntimeError, AssertionError, ValueError):
        return 0


def free_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take, or the machine's where that is all it tells; 0 where it does not say."""
    if found := available_memory(root):
        return found
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def why_no_bits(device: str) -> str:
    """Why routes need not agree to the last bit; "" where they do: the native kernels compute everything."""
    if device != "cpu":
        return f"on {device} operations run by their definitions"
    if not native.available():
        return "the native kernels do not run here"
    other = sorted(name for name, op in OPS.items() if op.kernels and op.choice not in ("auto", "cpu"))
    return f"{', '.join(other)} run by their definitions" if other else ""


def forced(model: LoadedModel, ids: Sequence[int], first: int, kv_format: str | None = None) -> Iterator[Tensor]:
    """Logits [R, V] after the tokens from position `first` to the last, in pieces of at most STEP_TOKENS rows.

    Args:
        kv_format: how the cache stores rows; None: as the model was loaded.
    """
    used = dataclasses.replace(model, kv_format=kv_format or model.kv_format)
    runner = used.runner(1, len(ids))
    sequence = runner.open()
    for start in range(0, len(ids), STEP_TOKENS):
        piece = list(ids[start : start + STEP_TOKENS])
        rows = min(len(piece), start + len(piece) - first)
        (logits_RV,), _, _ = runner.forward([(sequence, piece)], [max(0, rows)])
        if rows > 0:
            yield logits_RV.float()
