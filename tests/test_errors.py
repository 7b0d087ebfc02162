"""The exception tree: as it is drawn, and with numbers where numbers were promised."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from pyrosome import errors
from pyrosome.chat import InvalidRequest
from pyrosome.errors import ContextTooLong, DoesNotFit, PyrosomeError, RequestError

CLASSES = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, BaseException)}


def drawn() -> dict[str, str]:
    """Child -> parent, as the module's docstring draws them."""
    parents, path = {}, ["PyrosomeError"]
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│ ]*)[├└]── ([\w.]+)", line):
            depth, name = 1 + len(found[1]) // 4, found[2]
            path[depth:] = [name]
            parents[name] = path[depth - 1]
    return parents


def test_the_drawing_is_the_tree():
    tree = {name: c.__bases__[0].__name__ for name, c in CLASSES.items() if name != "PyrosomeError"}
    assert drawn() == tree | {"chat.InvalidRequest": InvalidRequest.__bases__[0].__name__}
    assert PyrosomeError.__bases__ == (Exception,)


def test_every_error_is_caught_by_the_one_and_has_one_parent():
    for error in (*CLASSES.values(), InvalidRequest):
        assert issubclass(error, PyrosomeError) and len(error.__bases__) == 1
        assert error.__doc__


def test_mistakes_of_python_are_not_caught_by_it():
    for error in (ValueError, KeyError, RuntimeError, OSError, KeyboardInterrupt):
        assert not issubclass(error, PyrosomeError)


def test_what_does_not_fit_says_how_much_where_and_what_to_do():
    error = DoesNotFit("the cache", 3 << 30, 1 << 29, "cuda:0", "ask for a shorter context")
    assert (error.part, error.needed_bytes, error.free_bytes, error.device) == ("the cache", 3 << 30, 1 << 29, "cuda:0")
    assert str(error) == ("the cache needs 3.000 GiB on cuda:0, which has 0.500 GiB free; ask for a shorter context")


def test_a_context_too_long_says_both_lengths_and_what_to_do():
    error = ContextTooLong(5000, 4096, "shorten the prompt")
    assert (error.asked_tokens, error.max_tokens) == (5000, 4096)
    assert str(error) == "5000 tokens were asked for and the context holds 4096; shorten the prompt"


@pytest.mark.parametrize(
    ("kind", "parent"), [(errors.MissingTensor, "CheckpointError"), (ContextTooLong, "RequestError")]
)
def test_a_kind_is_caught_by_its_family(kind, parent):
    assert issubclass(kind, CLASSES[parent]) and not issubclass(CLASSES[parent], kind)


@pytest.mark.parametrize(
    "error",
    [DoesNotFit("a part", 3 << 30, 1 << 30, "cpu", "buy more"), ContextTooLong(9, 8, "say less"), RequestError("no")],
)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
