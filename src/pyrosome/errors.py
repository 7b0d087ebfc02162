"""Everything this package raises on purpose.

PyrosomeError
├── CheckpointError          the files are not what they claim to be
│   ├── MissingTensor        a tensor, shard or scale that should be there is not
│   ├── TruncatedFile        a file ends before its header says it does
│   ├── WrongShape           a tensor's shape is not the one the configuration implies
│   └── UnsupportedFormat    a dtype, layout or architecture this package does not read
├── PlanError                the request cannot be met on this machine
│   ├── DoesNotFit
│   └── KernelUnavailable    a version of an operation was asked for by name and cannot run there
├── RequestError             the caller can fix it; a server answers 400
│   ├── ContextTooLong
│   ├── UnknownSession       an id that the engine has no session of
│   ├── SessionBusy          a session in which a request is generating
│   └── chat.InvalidRequest  a body the official API refuses; has its status and body
├── FetchError               a hub or mirror did not give what was asked; what it gave is kept
├── TrainError               a training run cannot go on as it is; its last good state is kept
└── EngineError              we must fix it; a server answers 500
    └── CacheInvariantBroken

A message says what was asked, what was found, and what to do next, with units.
"""

from __future__ import annotations


class PyrosomeError(Exception):
    """Base class: `except PyrosomeError` catches all of the above and nothing else."""


class CheckpointError(PyrosomeError):
    """The files are not what they claim to be."""


class MissingTensor(CheckpointError):
    """A tensor, shard or scale that the configuration or the index names is not in the files."""


class TruncatedFile(CheckpointError):
    """A file ends before its header says it does."""


class WrongShape(CheckpointError):
    """A tensor's shape is not the one the configuration implies."""


class UnsupportedFormat(CheckpointError):
    """A dtype, quantisation layout or architecture this package does not read."""


class PlanError(PyrosomeError):
    """The plan asked for cannot be met on this machine."""


class DoesNotFit(PlanError):
    """A part needs more bytes than a device has free."""

    def __init__(self, part: str, needed_bytes: int, free_bytes: int, device: str, hint: str) -> None:
        self.part, self.needed_bytes, self.free_bytes, self.device = part, needed_bytes, free_bytes, device
        super().__init__(
            f"{part} needs {needed_bytes / 2**30:.3f} GiB on {device}, which has {free_bytes / 2**30:.3f} GiB free; "
            f"{hint}"
        )
        self.hint = hint

    def __reduce__(self) -> tuple[type[DoesNotFit], tuple[object, ...]]:
        return type(self), (self.part, self.needed_bytes, self.free_bytes, self.device, self.hint)


class KernelUnavailable(PlanError):
    """A version of an operation was asked for by name and cannot run at that place."""


class RequestError(PyrosomeError):
    """The caller asked for something that cannot be done; the message names the field."""


class ContextTooLong(RequestError):
    """The prompt, or the prompt with the tokens asked for, is longer than the context."""

    def __init__(self, asked_tokens: int, max_tokens: int, hint: str) -> None:
        self.asked_tokens, self.max_tokens, self.hint = asked_tokens, max_tokens, hint
        super().__init__(f"{asked_tokens} tokens were asked for and the context holds {max_tokens}; {hint}")

    def __reduce__(self) -> tuple[type[ContextTooLong], tuple[object, ...]]:
        return type(self), (self.asked_tokens, self.max_tokens, self.hint)


class UnknownSession(RequestError):
    """There is no session of that id in the engine: it was closed, or the engine is another one since."""


class SessionBusy(RequestError):
    """A request is generating in the session, which can do nothing else meanwhile."""


class FetchError(PyrosomeError):
    """A hub or mirror cannot be reached, refuses, or gives other bytes than it lists; what is sound is kept."""


class TrainError(PyrosomeError):
    """A training run cannot go on as it is; its last good state is kept."""


class EngineError(PyrosomeError):
    """A fault of this package, never of the caller."""


class CacheInvariantBroken(EngineError):
    """Cache bookkeeping contradicts itself; the sequence concerned must not go on."""
