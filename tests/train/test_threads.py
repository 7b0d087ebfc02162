"""The number of threads is what was fastest, and no larger one is tried after one that did not pay."""

import pytest
import torch

from pyrosome.train import threads


@pytest.mark.parametrize(
    ("took", "cores", "expected", "tried"),
    [
        ({1: 1.0, 2: 0.5, 4: 0.3, 8: 0.2}, 8, 8, [1, 2, 4, 8]),
        ({1: 1.0, 2: 27.0}, 2, 1, [1, 2]),  # spinning on a core that is busy
        ({1: 1.0, 2: 0.95, 4: 0.1}, 4, 1, [1, 2]),
        ({1: 1.0, 2: 0.5, 4: 0.49}, 4, 2, [1, 2, 4]),
        ({1: 1.0}, 1, 1, [1]),
        ({1: 1.0, 2: 0.6}, 3, 2, [1, 2]),
    ],
)
def test_the_fastest_number_is_taken(monkeypatch, took, cores, expected, tried):
    seen = []

    def timed(run):
        run()
        return took[torch.get_num_threads()]

    monkeypatch.setattr(threads, "_timed", timed)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    before = torch.get_num_threads()
    assert threads.probe(lambda: seen.append(torch.get_num_threads())) == expected
    assert list(dict.fromkeys(seen)) == tried
    assert torch.get_num_threads() == before


def test_threads_are_given_back_where_a_step_fails(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        threads.probe(lambda: 1 / 0)
    assert torch.get_num_threads() == before
