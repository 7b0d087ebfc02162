"""Salts that clients choose: as many as they like, and memory for those alone that something was computed under."""

from __future__ import annotations

from tests.cache.serving import IDS, Serving


def test_a_salt_that_nothing_is_computed_under_takes_no_memory():
    served = Serving()
    served.serve(IDS[:300], salt="kept")
    for n in range(1000):
        assert served.tree.match(IDS[:300], f"salt {n}", 299).length == 0
        served.tree.cursor(f"salt {n}")
    assert list(served.tree._roots) == ["kept"]
    assert served.serve(IDS[:300], salt="kept").match.length == 256


def test_a_salt_is_forgotten_with_the_last_of_its_blocks():
    served = Serving()
    served.tree._max_shadows = 2
    for n in range(20):
        served.serve(IDS[:300], salt=f"salt {n}")
        served.evict()
    assert len(served.tree._grown) == 1
    served.tree._heap.clear()  # it remembers a bounded number of leaves that have left
    assert len(served.tree._roots) == 1
    served.serve(IDS[:300], salt="salt 0")
    assert served.serve(IDS[:300], salt="salt 0").match.length == 256
    served.tree.forget("salt 0")
    assert "salt 0" not in served.tree._roots and served.tree.match(IDS[:300], "salt 0", 299).length == 0
    served.assert_nothing_is_held()
