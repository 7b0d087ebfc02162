"""`Session`, as users have it: turns, forks, files, and a process that is killed while it saves."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyrosome import LLM, SamplingParams
from pyrosome.errors import CheckpointError, RequestError

PROMPT = "Once upon a time there were two pages. " * 6
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
OPTIONS = {"numerics": "exact", "cache_bytes": 8 << 20}


@pytest.fixture(scope="module")
def llm():
    with LLM("builtin:nano", **OPTIONS) as one:
        yield one


@pytest.fixture(scope="module")
def fresh():
    """Another engine, where nothing is known of what the first was told."""
    with LLM("builtin:nano", **OPTIONS, drafter="off") as one:
        yield one


def after(fresh, ids, params=GREEDY):
    return fresh.generate([ids], params)[0].token_ids


def needed(llm) -> int:
    """Tokens computed so far, less those that were drafted in vain."""
    stats = llm.stats()
    return stats.computed_tokens - (sum(stats.drafted) - sum(stats.accepted))


def test_a_session_goes_on_from_all_that_was_said(llm, fresh):
    with llm.session(PROMPT) as s:
        ids = llm.encode(PROMPT)
        one = s.generate(GREEDY)
        assert one.token_ids == after(fresh, ids) and s.ids == [*ids, *one.token_ids]
        assert s.extend(" And then") == len(s.ids) == len(ids) + 6 + len(llm.tokenizer.encode(" And then"))
        assert s.extend([5, 6]) == len(s.ids)
        ids = s.ids
        two = s.generate(GREEDY)
        assert two.token_ids == after(fresh, ids) and s.text == llm.tokenizer.decode(s.ids)
        assert s.generate(SamplingParams(max_tokens=4, seed=3)).token_ids == after(
            fresh, [*ids, *two.token_ids], SamplingParams(max_tokens=4, seed=3)
        )
    with pytest.raises(RequestError, match="there is no session"):
        s.generate(GREEDY)


def test_forks_and_rewinds_are_told_apart(llm, fresh):
    s = llm.session(PROMPT)
    s.generate(GREEDY)
    ids, twin = s.ids, s.fork()
    assert twin.ids == ids and twin.id != s.id
    twin.extend([7])
    assert 1 <= s.rewind(4) <= len(ids) - 4
    assert s.ids == ids[:-4]
    assert s.generate(GREEDY).token_ids == after(fresh, ids[:-4])
    assert twin.generate(GREEDY).token_ids == after(fresh, [*ids, 7])
    with pytest.raises(RequestError, match="taken back"):
        s.rewind(10_000)
    with pytest.raises(RequestError, match="n is 2"):
        s.generate(SamplingParams(n=2))
    s.close()
    twin.close()


def test_a_stream_says_piece_by_piece_what_generate_says(llm):
    with llm.session(PROMPT) as s, s.fork() as twin:
        pieces = list(s.stream(GREEDY))
        whole = twin.generate(GREEDY)
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text and s.ids == twin.ids


def test_a_stream_that_is_closed_stops_and_what_was_said_stays(llm, fresh):
    with llm.session(PROMPT) as s:
        before = s.ids
        stream = s.stream(SamplingParams(max_tokens=500, temperature=0, ignore_eos=True))
        said = [token for piece in itertools.islice(stream, 3) for token in piece.token_ids]
        stream.close()
        for _ in range(1000):
            try:
                ids = s.ids
                break
            except RequestError:  # it ends before the next step
                time.sleep(0.01)
        assert ids[: len(before) + 3] == [*before, *said] and len(ids) < len(before) + 500
        assert s.generate(GREEDY).token_ids == after(fresh, ids)


def test_a_conversation_computes_what_is_new(llm, fresh):
    params = SamplingParams(max_tokens=12, temperature=0)
    with llm.session() as s:
        messages = [{"role": "system", "content": PROMPT * 5}, {"role": "user", "content": "hello"}]
        whole_blocks = llm.chat_template.stable(llm.chat_template.conversation(messages, "off")) // 128 * 128
        assert whole_blocks >= 512
        first = s.chat(messages, "off", params=params)
        assert [m["role"] for m in s.messages] == ["system", "user", "assistant"]
        computed = needed(llm)
        second = s.chat([{"role": "user", "content": "go on"}], "off", params=params)
        # An answer may be rendered otherwise than it was said, and then the turn goes on from the block before it.
        assert needed(llm) - computed <= len(s.ids) - whole_blocks
        everything = [*messages, first.to_dict(), {"role": "user", "content": "go on"}]
        assert second == fresh.chat(everything, "off", params=params)
        s.extend([{"role": "user", "content": "once more"}])
        twin = s.fork()
        assert twin.chat(thinking="off", params=params) == s.chat(thinking="off", params=params)


# Files


def test_a_conversation_is_found_again_with_its_messages(llm, fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = SamplingParams(max_tokens=12, temperature=0)
    ask = [{"role": "user", "content": "and then?"}]
    with llm.session() as s:
        s.chat([{"role": "system", "content": PROMPT}, {"role": "user", "content": "hello"}], "off", params=params)
        size = s.save("tale.session")
        messages, ids = list(s.messages), s.ids
        expected = s.chat(ask, "off", params=params)
    assert os.listdir(tmp_path) == ["tale.session"] and size == os.path.getsize("tale.session")
    with fresh.restore(Path("tale.session")) as s:
        assert (s.messages, s.ids) == (messages, ids)
        computed = fresh.stats().computed_tokens
        assert s.chat(ask, "off", params=params) == expected
        assert fresh.stats().computed_tokens - computed <= len(s.ids) - 128
    with LLM("builtin:nano", numerics="trained") as other, pytest.raises(CheckpointError, match="another model"):
        other.restore("tale.session")


SAVING = """
import sys
from pyrosome import LLM, SamplingParams

llm = LLM("builtin:nano", numerics="exact", cache_bytes=8 << 20)
s = llm.restore(sys.argv[1]) if sys.argv[2] == "again" else llm.session({prompt!r})
while True:
    s.generate(SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    ids = s.ids
    print(*ids, flush=True)  # told before it is saved
    s.save(sys.argv[1])
"""


def test_what_a_save_left_that_was_killed_hinders_no_other(llm, tmp_path):
    """Half of a file under a temporary name, as a process that is no more leaves it."""
    path, left = tmp_path / "tale.session", tmp_path / ".tale.session.abc"
    with llm.session(PROMPT) as s:
        s.generate(GREEDY)
        size = s.save(path)
        left.write_bytes(path.read_bytes()[: size // 2])
        assert s.save(path) == size
        assert sorted(os.listdir(tmp_path)) == [left.name, path.name]
        with llm.restore(path) as other:
            assert other.ids == s.ids
        with pytest.raises(CheckpointError, match="promises"):
            llm.restore(left)


def test_killed_at_any_moment_the_file_is_that_of_some_turn(fresh, tmp_path):
    """Each process goes on from what the one before it left, and is killed while it generates or saves."""
    chance, path = random.Random(4), tmp_path / "tale.session"
    kept: list[list[int]] = []  # after each round
    for _ in range(6):
        mode = "again" if path.exists() else "new"
        command = [sys.executable, "-c", SAVING.format(prompt=PROMPT), str(path), mode]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
            told = [child.stdout.readline() for _ in range(chance.randrange(1, 6) + (not kept))]
            time.sleep(chance.random() * 0.02)
            child.send_signal(signal.SIGKILL)
            told += child.stdout.readlines()
        turns = [list(map(int, line.split())) for line in told if line.endswith("\n")]
        assert turns, "the process worked"
        if path.exists():
            with fresh.restore(path) as s:
                ids = s.ids
                assert ids in [*turns, *kept[-1:]], "what was saved is a turn that was told"
                assert len(ids) >= len(turns[-1]) - 3, "at most the turn that was not saved is lost"
                assert s.generate(GREEDY).token_ids == after(fresh, ids)
            kept.append(ids)
    # The first round tells two turns or more, so that one of them was saved.
    assert len(kept) == 6 and all(len(a) <= len(b) for a, b in itertools.pairwise(kept))
    left = [name for name in os.listdir(tmp_path) if name != "tale.session"]
    assert all(name.startswith(".tale.session.") for name in left)
