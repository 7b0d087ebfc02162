"""Memory of a large request goes back to the system."""

from __future__ import annotations

import threading

from pyrosome.server.memory import GROWN_BYTES, REST_S, Tidy, resident_bytes

MIB = 1 << 20


def test_it_is_due_while_the_process_is_larger_than_it_was_and_not_too_often():
    now, size = [0.0], [100 * MIB]
    tidy = Tidy(lambda: now[0], lambda: size[0])
    assert not tidy.is_due
    size[0] += GROWN_BYTES + MIB
    assert not tidy.is_due, "it was asked a moment ago"
    now[0] += REST_S
    assert tidy.is_due
    tidy()
    now[0] += REST_S
    assert tidy.is_due, "it is as large as before, and some of it may have been freed since"
    size[0] = 90 * MIB
    tidy()
    size[0] = 100 * MIB
    now[0] += REST_S
    assert not tidy.is_due


def test_what_threads_have_freed_goes_back():
    """Small blocks in the arenas of several threads, each below one that stays."""
    tidy, before, stay = Tidy(), resident_bytes(), []

    def fill():
        held = [bytearray(5000) for _ in range(8000)]
        stay.append(held.pop())

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tidy()
    assert resident_bytes() - before < 40 * MIB
