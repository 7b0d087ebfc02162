"""What passes between an engine's process and its owner: messages, as msgpack, through a private socket."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NoReturn, TypeVar

import msgspec
import zmq

from pyrosome.engine.request import (
    Ended,
    Event,
    News,
    Progress,
    PromptLogprobs,
    Request,
    Reuse,
    Timeline,
    TokenEvent,
)
from pyrosome.engine.stats import Stats
from pyrosome.errors import EngineError, PyrosomeError, RequestError

LATE_MS = 50  # what a process sent before its death may take so long to be seen
WATCH_S = 1.0
CLOSE_MS = 5000
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from pyrosome.engine.aio import serve; serve(sys.argv[2])"
)


class Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    """A message travels as a list, its name first."""


class Start(Message):
    """The first command: make the engine."""

    factory: str  # "module:function"
    arguments: dict[str, Any]
    has_log: bool  # log lines go to standard error


class Add(Message):
    """Take a request; answered by `Done` or `Failed` of that number."""

    number: int
    request: msgspec.Raw  # read by itself, so that a bad one is its sender's fault and ends nothing else


class Abort(Message):
    """End a request; not answered."""

    request: str


class Call(Message):
    """Carry out an operation; answered by `Done` or `Failed` of that number."""

    number: int
    name: str
    arguments: dict[str, Any]


class Close(Message):
    """The last command."""


Command = Add | Abort | Call | Close


class Failure(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An exception as plain data."""

    classes: list[str]  # its own and those it inherits from, of this package's tree
    arguments: list[Any]
    text: str


class Hello(Message):
    """The first report: there is a process."""


class Ready(Message):
    """The engine is made."""


class Broken(Message):
    """There is no engine, or no longer; the process ends once it is told to."""

    failure: Failure


class Done(Message):
    """A command's result: plain data, or a dataclass named by `kind`."""

    number: int
    result: Any
    kind: str = ""


class Failed(Message):
    """What a command raised."""

    number: int
    failure: Failure


class Events(Message):
    """A step's events, in order: news of prompts, then runs of tokens, each followed by a run of ends."""

    runs: list[tuple[list[TokenEvent], list[Ended]]]
    progress: list[Progress] = []
    prompt_logprobs: list[PromptLogprobs] = []


Report = Hello | Ready | Broken | Done | Failed | Events

_KINDS = {kind.__name__: kind for kind in (Stats, Reuse, Timeline)}
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_starts = msgspec.msgpack.Decoder(Start)
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Message) -> bytes:
    """A message's bytes.

    Raises:
        RequestError: it holds something that is no plain data.
    """
    try:
        return _encoder.encode(message)
    except Exception as error:  # a type that cannot travel, an integer of more than 64 bits, text that is no text
        raise RequestError(f"{type(message).__name__} holds what cannot go to another process: {error}") from None


def encode_add(number: int, request: Request) -> bytes:
    """The bytes of `Add`.

    Raises:
        RequestError: the request holds something that is no plain data.
    """
    try:
        return _encoder.encode(Add(number, msgspec.Raw(_encoder.encode(request))))
    except Exception as error:
        raise RequestError(f"request {request.id!r} holds what cannot go to another process: {error}") from None


def request_of(message: Add) -> Request:
    """The request in an `Add`.

    Raises:
        RequestError: a field is of a wrong type or outside its range; the message names it.
    """
    try:
        return _requests.decode(message.request)
    except msgspec.MsgspecError as error:
        raise RequestError(f"a request has a field that cannot be read: {error}") from None


def done(number: int, result: Any) -> Done:
    """`Done`, with the name of the result's class if it is one that travels."""
    kind = type(result).__name__
    return Done(number, result, kind if type(result) is _KINDS.get(kind) else "")


def result_of(message: Done) -> Any:
    """The result in a `Done`.

    Raises:
        EngineError: it is not of the class it is said to be.
    """
    if not message.kind:
        return message.result
    try:
        return msgspec.convert(message.result, _KINDS[message.kind])
    except Exception as error:
        raise _unreadable("a result", error) from None


def events_message(events: Sequence[Event | News]) -> Events:
    """`Events`, in the same order but for news, which come before a request's first token and so may come first."""
    runs: list[tuple[list[TokenEvent], list[Ended]]] = []
    progress = [e for e in events if isinstance(e, Progress)]
    logprobs = [e for e in events if isinstance(e, PromptLogprobs)]
    for kind, group in groupby((e for e in events if not isinstance(e, News)), type):
        if kind is TokenEvent:
            runs.append((list(group), []))  # type: ignore[arg-type]
        elif runs:
            runs[-1][1].extend(map(_sendable, group))  # type: ignore[arg-type]
        else:
            runs.append(([], list(map(_sendable, group))))  # type: ignore[arg-type]
    return Events(runs, progress, logprobs)


def _sendable(end: Ended) -> Ended:
    return dataclasses.replace(end, error=_as_text(end.error)) if end.error else end


def events_of(message: Events) -> list[Event | News]:
    """The events in an `Events`."""
    said = [event for run in message.runs for part in run for event in part]
    return [*message.progress, *message.prompt_logprobs, *said]


def decode_command(frame: bytes) -> Command:
    """What the owner sent.

    Raises:
        EngineError: the bytes are no command.
    """
    return _decode(_commands, frame)


def decode_report(frame: bytes) -> Report:
    """What the process sent.

    Raises:
        EngineError: the bytes are no report.
    """
    return _decode(_reports, frame)


T = TypeVar("T")


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    try:
        return decoder.decode(frame)
    except Exception as error:  # whatever is wrong with them, these are not bytes that were sent
        raise _unreadable(f"a message of {len(frame)} bytes", error) from None


def _unreadable(what: str, error: Exception) -> EngineError:
    return EngineError(f"{what} between the engine's process and its owner cannot be read ({error}); report this")


def failure_of(error: BaseException) -> Failure:
    """An exception as plain data; one that is not of this package's tree becomes an `EngineError` that names it."""
    text = _as_text(str(error))
    if not isinstance(error, PyrosomeError):
        text = f"{type(error).__name__}: {text}"
        return Failure([_name(EngineError)], [text], text)
    arguments = list(error.__reduce__()[1])
    try:
        _encoder.encode(arguments)
    except Exception:
        arguments = [text]
    return Failure([_name(c) for c in type(error).__mro__ if issubclass(c, PyrosomeError)], arguments, text)


def _as_text(text: str) -> str:
    """What can travel of a text that may hold a file's name, which need not be text."""
    return text.encode("utf-8", "replace").decode()


def error_of(failure: Failure) -> PyrosomeError:
    """The exception again: of its own class if that is known here, else of the nearest one it inherits from."""
    known = {_name(c): c for c in _tree(PyrosomeError)}
    for name in failure.classes:
        if name in known:
            with contextlib.suppress(TypeError):  # made from numbers, and only its text is there
                return known[name](*(failure.arguments if name == failure.classes[0] else [failure.text]))
    return EngineError(failure.text)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tree(kind: type[PyrosomeError]) -> Iterator[type[PyrosomeError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


class Child:
    """An engine's process, as its owner sees it.  Used by one thread.

    It is a fresh interpreter that knows the owner's `sys.path` and nothing else of it.  The socket lies in a folder
    that only this user may enter, and the folder goes as soon as the two are connected.

    Raises:
        EngineError: no process or socket could be made.
    """

    def __init__(self, start: bytes) -> None:
        self.is_ready = False
        self.last_words: PyrosomeError | None = None
        self._unsent: list[bytes] | None = [start]  # None: connected
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup, self._folder = contextlib.ExitStack(), ""
        try:
            self._folder = tempfile.mkdtemp(prefix="pyrosome-")
            self._cleanup.callback(shutil.rmtree, self._folder, ignore_errors=True)
            context = zmq.Context()
            self._cleanup.callback(context.term)
            self.socket = _open(context)
            self._cleanup.callback(self.socket.close, 0)
            self.lifeline, theirs = socket.socketpair()  # either side sees its end when the other is gone
            self._cleanup.callback(self.lifeline.close)
            with theirs:
                endpoint = f"ipc://{self._folder}/engine"
                self.socket.bind(endpoint)
                # Of another session, so that Ctrl-C in the owner's terminal is the owner's alone.
                path = json.dumps([str(p) for p in sys.path])
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, path, endpoint], stdin=theirs.fileno(), start_new_session=True
                )
        except (OSError, zmq.ZMQError) as error:
            self.close()
            raise EngineError(
                f"the engine's process could not be started with a socket in {self._folder or 'a new folder'} "
                f"({error}); set TMPDIR to a folder with a short name that can be written to, and see `ulimit -n -u`"
            ) from None

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None
        return self._process.pid

    def send(self, frame: bytes) -> None:
        """Send a command, or keep it until there is someone to take it; lost if there no longer is."""
        if self._unsent is not None:
            self._unsent.append(frame)
            return
        with contextlib.suppress(zmq.Again):
            self.socket.send(frame, zmq.NOBLOCK)

    def receive(self, late_ms: int = 0) -> Iterator[Report]:
        """What has arrived, or still arrives within so many milliseconds of each other.

        Raises:
            EngineError: a report that cannot be read.
        """
        while self.socket.poll(late_ms):
            report = decode_report(self.socket.recv())
            if isinstance(report, Hello):
                self._connected()
                continue
            self.is_ready = self.is_ready or isinstance(report, Ready)
            yield report

    def _connected(self) -> None:
        frames, self._unsent = self._unsent or [], None
        shutil.rmtree(self._folder, ignore_errors=True)
        for frame in frames:
            self.send(frame)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        assert self._process is not None
        try:
            is_cut = not self.lifeline.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            is_cut = False
        except OSError:
            is_cut = True
        return is_cut or self._process.poll() is not None  # what it forked may hold the line

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()

    def wait(self, seconds: float) -> str:
        """How the process ended; after so many seconds it is made to."""
        assert self._process is not None
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"{how}; {self.last_words}" if self.last_words else how

    def close(self) -> None:
        """End the process and remove all traces of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._cleanup.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Owner:
    """The owner, as the engine's process sees it: the process ends with it, whatever it is doing."""

    def __init__(self, endpoint: str) -> None:
        lifeline = os.dup(0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)  # what is printed here is no output of the owner's
        folder = os.path.dirname(endpoint.removeprefix("ipc://"))
        threading.Thread(target=_end_with, args=(lifeline, os.getppid(), folder), daemon=True).start()
        self._context = zmq.Context()
        self._socket = _open(self._context)
        self._socket.setsockopt(zmq.LINGER, CLOSE_MS)
        self._socket.connect(endpoint)
        self.send(Hello())

    def leave(self, status: int) -> NoReturn:
        """Send what is not sent yet, and end the process: nothing of it may hold its end up."""
        self._socket.close()
        self._context.term()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)

    def start(self) -> Start:
        """The first command.

        Raises:
            EngineError: it cannot be read.
        """
        return _decode(_starts, self._socket.recv())

    def send(self, message: Message) -> None:
        """Send a report.

        Raises:
            RequestError: it holds something that is no plain data.
        """
        self._socket.send(encode(message))

    def receive(self, *, wait: bool = True) -> Command | None:
        """The next command; None if there is none and none is waited for.

        Raises:
            EngineError: a command that cannot be read.
        """
        try:
            return decode_command(self._socket.recv(0 if wait else zmq.NOBLOCK))
        except zmq.Again:
            return None


def _open(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    made = context.socket(zmq.PAIR)
    made.set_hwm(0)  # events are bounded by what the requests asked for
    return made


def _end_with(lifeline: int, owner: int, folder: str) -> None:
    # A fork of the owner may hold its end of the line open.
    while not select.select([lifeline], [], [], WATCH_S)[0] and os.getppid() == owner:
        pass
    shutil.rmtree(folder, ignore_errors=True)  # still there if the owner went before the two were connected
    os._exit(1)
