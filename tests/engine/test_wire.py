"""What passes between an engine's process and its owner: it arrives whole, or is refused."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import pytest

from pyrosome.chat import InvalidRequest
from pyrosome.engine import wire
from pyrosome.engine.request import Ended, Progress, PromptLogprobs, Request, Reuse, Timeline, TokenEvent
from pyrosome.engine.stats import Stats
from pyrosome.errors import ContextTooLong, EngineError, RequestError
from pyrosome.options import Constraint, SamplingParams

WHOLE = Request(
    "r-1",
    (0, 1, 127, 128, 129279),
    SamplingParams(
        max_tokens=7, temperature=0.25, top_p=0.5, top_k=3, min_p=0.125, presence_penalty=-1.0, frequency_penalty=2.0,
        repetition_penalty=1.5, seed=2**64 - 1, stop_token_ids=(1, 2), stop=("\n", "é"), logprobs=5, ignore_eos=True,
        n=3, max_thinking_tokens=9, max_repeats=4, prompt_logprobs=2, min_tokens=2,
    ),
    priority=-2,
    salt="tenant",
    stable=4,
    think_end=128799,
    constraint=Constraint("json", '{"type": "object"}', True, False, '{"type": "string"}'),
    never_empty=True,
    session="s",
    progress=True,
)  # fmt: skip
EVENTS = [
    TokenEvent("a", 0, 5, {5: -0.125, 7: -float("inf")}, reuse=Reuse(300, 256, 256, 0, "all", "", "known")),
    TokenEvent("b", 2, 1, {}, True),
    Ended(
        "b", 2, "stop", 9, Reuse(9, 8, 7, 1, "evicted", "csa_kv", "why"), Timeline(0.1, 0.2, 0.3, 0.4, 1, 2, (3,), (1,))
    ),
    Ended("c", 0, "error", error="request c: no", error_type="EngineError"),
    TokenEvent("a", 0, 6, {6: 0.0}),
    Ended("a", 0, "length", 2),
]
NEWS = [
    Progress("a", 128, 300),
    Progress("d", 5, 9),
    PromptLogprobs("d", 1, [{7: -0.5, 3: -float("inf")}, {2: -1.25}]),
    PromptLogprobs("d", 3, []),
]
STATS = Stats(
    requests=3, ended_by_reason={"stop": 2}, drafted=(4, 2), free_pages={128: 7}, pool_bytes={"csa_kv": (5, 9)}
)
FRAMES = [
    wire.encode_add(7, WHOLE),
    *(wire.encode(m) for m in (wire.Start("a:b", {"x": 1}, True), wire.Call(3, "echo", {"x": [1]}), wire.Abort("é"))),
    *(
        wire.encode(m)
        for m in (
            wire.Close(),
            wire.Hello(),
            wire.Ready(),
            wire.done(1, STATS),
            wire.events_message([*NEWS, *EVENTS]),
        )
    ),
    wire.encode(wire.Failed(2, wire.failure_of(ContextTooLong(12, 10, "shorten it")))),
]


@pytest.mark.parametrize("request_", [WHOLE, Request("", ())])
def test_a_request_travels_whole(request_):
    message = wire.decode_command(wire.encode_add(7, request_))
    assert message.number == 7 and wire.request_of(message) == request_


def test_the_request_that_travels_here_has_every_field_set():
    for value in (WHOLE, WHOLE.params, WHOLE.constraint):
        for f in dataclasses.fields(value):
            assert getattr(value, f.name) != f.default, f.name


@pytest.mark.parametrize(
    "events", [[], EVENTS, EVENTS[::-1], EVENTS[2:3], EVENTS[:1], EVENTS[2:], NEWS, [*NEWS, *EVENTS], NEWS[2:]]
)
def test_events_travel_whole_and_in_order(events):
    assert wire.events_of(wire.decode_report(wire.encode(wire.events_message(events)))) == events


def test_news_of_prompts_come_before_what_others_say_and_stay_in_order():
    mixed = [NEWS[2], EVENTS[1], NEWS[0], *EVENTS[2:4], NEWS[3], NEWS[1], *EVENTS[4:]]
    again = wire.events_of(wire.decode_report(wire.encode(wire.events_message(mixed))))
    assert again == [*NEWS, *EVENTS[1:]]


@pytest.mark.parametrize("before", [[], EVENTS[:1]])
def test_an_end_whose_error_names_a_file_that_is_no_text_travels(before):
    end = Ended("a", 0, "error", error="no file \udcff", error_type="EngineError")
    (again,) = wire.events_of(wire.decode_report(wire.encode(wire.events_message([*before, end]))))[len(before) :]
    assert again == Ended("a", 0, "error", error="no file ?", error_type="EngineError")


@pytest.mark.parametrize("result", [None, 3, [1, [2.5]], {"a": {1: 2}}, STATS, EVENTS[2].reuse, EVENTS[2].timeline])
def test_results_travel_whole(result):
    message = wire.decode_report(wire.encode(wire.done(1, result)))
    assert wire.result_of(message) == result and type(wire.result_of(message)) is type(result)


def test_bytes_are_what_they_were():
    assert wire.encode(wire.Abort("a")) == b"\x92\xa5Abort\xa1a"
    assert wire.encode(wire.events_message([TokenEvent("a", 1, 5, {5: -0.5}), Ended("a", 1, "stop")])).hex() == (
        "94a64576656e747391929186a772657175657374a161a5696e64657801a5746f6b656e05a86c6f6770726f62738105cbbfe0000000000000"
        "ac69735f656e645f746f6b656ec2a57265757365c09188a772657175657374a161a5696e64657801a6726561736f6ea473746f70ad6f75747075745f746f6b"
        "656e7300a5726575736588ad70726f6d70745f746f6b656e7300ae6d6174636865645f746f6b656e7300ad7265757365645f746f6b656e73"
        "00af7265706c617965645f746f6b656e7300a56c696d6974a0a673747265616da0a6726561736f6ea0a87761697465645f73cb0000000000000000"
        "a874696d656c696e6588a761727269"
        "766564cb0000000000000000a861646d6974746564cb0000000000000000ab66697273745f746f6b656ecb0000000000000000a5656e6465"
        "64cb0000000000000000a96e756d5f7061726b7300a96e756d5f737465707300a76472616674656490a8616363657074656490a56572726f"
        "72a0aa6572726f725f74797065a09090"
    )


@pytest.mark.parametrize("decode", [wire.decode_command, wire.decode_report])
def test_bytes_that_are_no_message_are_an_engine_error(decode):
    choose, num_refused = random.Random(1), 0
    for frame in FRAMES:
        broken = [frame[:n] for n in range(len(frame))] + [frame + b"\0"]
        for _ in range(200):
            at = choose.randrange(len(frame))
            broken.append(frame[:at] + bytes([choose.randrange(256)]) + frame[at + 1 :])
        for each in [*broken, b"\x92\xa7Unknown\x01", b"\x93\xa5Abort\xa1a\xa1b", b"\x91" * 5000, b"\xc0"]:
            try:
                decode(each)
            except EngineError as error:
                num_refused += 1
                assert "cannot be read" in str(error)  # noqa: PT017
    assert num_refused > 2000


def test_a_result_of_a_class_that_does_not_travel_is_an_engine_error():
    for message in (wire.Done(1, {}, "Thread"), wire.Done(1, {"requests": "many"}, "Stats")):
        with pytest.raises(EngineError, match="cannot be read"):
            wire.result_of(message)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RequestError("n is 0"), RequestError, "n is 0"),
        (EngineError(), EngineError, ""),
        (InvalidRequest("a body"), InvalidRequest, "a body"),
        (RequestError("two", object()), RequestError, "('two', <object"),
        (ValueError("bad"), EngineError, "ValueError: bad"),
        (KeyboardInterrupt(), EngineError, "KeyboardInterrupt: "),
        (RequestError("no file \udcff"), RequestError, "no file ?"),
        (FileNotFoundError("\udcff"), EngineError, "FileNotFoundError: ?"),
    ],
)
def test_exceptions_travel(error, kind, text):
    failed = wire.decode_report(wire.encode(wire.Failed(1, wire.failure_of(error))))
    again = wire.error_of(failed.failure)
    assert type(again) is kind and str(again).startswith(text)


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        (["elsewhere.Strange", "pyrosome.errors.RequestError", "pyrosome.errors.PyrosomeError"], RequestError),
        (["elsewhere.Longer", "pyrosome.errors.ContextTooLong", "pyrosome.errors.RequestError"], RequestError),
        (["builtins.SystemExit"], EngineError),
        ([], EngineError),
    ],
)
def test_an_exception_of_an_unknown_class_is_the_nearest_one_known(classes, kind):
    error = wire.error_of(wire.Failure(classes, [1, 2], "what it said"))
    assert type(error) is kind and str(error) == "what it said"


def test_drivers_need_no_torch_and_a_thread_needs_no_wire():
    check = (
        "import sys\n"
        "import pyrosome.engine.worker, pyrosome.engine.stats, pyrosome.engine.trace\n"
        "assert not {'torch', 'numpy', 'zmq', 'msgspec', 'asyncio'} & set(sys.modules)\n"
        "import pyrosome.engine.aio, pyrosome.engine.wire\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", check], check=True, env=env, timeout=50)
