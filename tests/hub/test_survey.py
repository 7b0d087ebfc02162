"""What is there of a repository, told without a connection; and a record that nobody can read."""

from __future__ import annotations

import pytest

from pyrosome.errors import CheckpointError, RequestError
from pyrosome.hub.pull import survey
from pyrosome.hub.record import Record
from tests.hub.files import NEEDED, REPO, pulled, shards
from tests.hub.server import COMMIT


def test_a_survey_says_what_is_there_without_asking_anybody(hub, source, tmp_path):
    pulled(hub, tmp_path)
    one, two, three = shards(source)
    (tmp_path / one).rename(tmp_path / f"{one}.partial")
    (tmp_path / two).unlink()
    raw = bytearray((tmp_path / three).read_bytes())
    raw[99] ^= 1
    (tmp_path / three).write_bytes(raw)
    hub.asked.clear()
    record, states = survey(tmp_path, REPO)
    assert (record.commit, hub.asked) == (COMMIT, [])
    assert states == dict.fromkeys(NEEDED, "right") | {one: "partial", two: "missing", three: "wrong"}


def test_a_survey_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(RequestError, match=r"nothing was pulled there.*pyrosome pull tests/tiny"):
        survey(tmp_path, REPO)


def test_a_survey_of_another_repository_is_refused(hub, tmp_path):
    pulled(hub, tmp_path)
    with pytest.raises(RequestError, match=f"holds {REPO}"):
        survey(tmp_path, "tests/other")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "files": [1]}', "\xff", "[" * 10_000,
             *(f'{{"version": 1, "repo": "a/b", "revision": "m", "commit": "c", "files": [{{"name": {name}, '
               f'"num_bytes": {size}, "sha256": "{"0" * 64}", "blob": null}}]}}'
               for name, size in (('"x"', "null"), ("1", "1"), ('"../x"', "1"), ('"/etc/passwd"', "1")))],
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / ".pull.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"\.pull\.json cannot be understood"):
        Record.read(tmp_path)
