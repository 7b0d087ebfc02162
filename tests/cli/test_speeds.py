"""Speeds: that something is measured, in bounded time, of a drive and not of memory; never how fast it is."""

from __future__ import annotations

import os

import pytest

from pyrosome.cli import speeds

MIB = 1 << 20


@pytest.fixture
def drive(tmp_path):
    """A folder on what this system takes for a drive."""
    if speeds.file_system(tmp_path) in speeds.IN_MEMORY or not hasattr(os, "posix_fadvise"):
        pytest.skip("the folder of tests lies in memory here, or its pages cannot be dropped")
    return tmp_path


def test_a_file_is_read_for_as_long_as_is_allowed_and_to_its_end_at_most(drive, monkeypatch):
    file = drive / "shard"
    file.write_bytes(os.urandom(MIB) * 40)
    with open(file) as there:
        os.fsync(there.fileno())
    whole = speeds.drive_read(file, seconds=30.0)
    assert whole["read"] > 0 and whole["num_bytes"] == 40 * MIB and not whole["why_not"]
    part = speeds.drive_read(file, seconds=30.0, most=33 * MIB)
    assert 33 * MIB <= part["num_bytes"] <= 36 * MIB  # whole parts of it
    ticks = iter(range(1000))
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: next(ticks))
    assert speeds.drive_read(file, seconds=3.0)["num_bytes"] == 2 * speeds.PART


def test_a_file_that_cannot_be_told_about_says_why(tmp_path, monkeypatch):
    assert "cannot be read" in speeds.drive_read(tmp_path / "none")["why_not"]
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    monkeypatch.setattr(speeds, "file_system", lambda _: "ext4")
    assert "1,000 bytes are too few" in speeds.drive_read(small)["why_not"]
    monkeypatch.setattr(speeds, "file_system", lambda _: "tmpfs")
    assert "lies in memory" in speeds.drive_read(small)["why_not"]
    monkeypatch.delattr(speeds.os, "posix_fadvise", raising=False)
    assert "forget" in speeds.drive_read(small)["why_not"]


def test_a_file_that_memory_keeps_is_not_taken_for_its_drive(drive, monkeypatch):
    file = drive / "shard"
    file.write_bytes(bytes(40 * MIB))  # not written to the drive yet, so that its pages cannot be dropped
    monkeypatch.setattr(speeds.os, "posix_fadvise", lambda *_: None)
    found = speeds.drive_read(file)
    assert found["read"] == 0 and "memory holds the file" in found["why_not"]


def test_a_folder_is_written_and_read_and_left_as_it_was(drive):
    found = speeds.folder_speed(drive / "not" / "there", seconds=30.0, most=32 * MIB)
    assert found["path"] == str(drive) and found["num_bytes"] == 32 * MIB and found["write"] > 0 and found["read"] > 0
    assert list(drive.iterdir()) == []


def test_a_slow_drive_is_written_for_as_long_as_is_allowed(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: next(ticks))
    assert speeds.folder_speed(tmp_path, seconds=3.0)["num_bytes"] == 2 * speeds.PART


def test_a_folder_that_cannot_be_written_or_is_full_says_why(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(speeds.tempfile, "NamedTemporaryFile", refused)
        found = speeds.folder_speed(tmp_path)
        assert found["write"] == 0 and "cannot be written: Permission denied" in found["why_not"]
    monkeypatch.setattr(speeds, "free_bytes", lambda _: 100 * MIB)
    assert "0.10 GiB are free there" in speeds.folder_speed(tmp_path)["why_not"]


def test_memory_is_measured_where_there_is_enough_of_it(monkeypatch):
    asked = []
    monkeypatch.setattr("pyrosome.measure.ceilings.read_rate", lambda threads: asked.append(threads) or 1e9 * threads)
    assert speeds.memory_speed(4, 0) == {"cores": 4, "one_core": 1e9, "all_cores": 4e9, "why_not": ""}
    assert speeds.memory_speed(1, 8 << 30)["all_cores"] == 1e9 and asked == [1, 4, 1]
    little = speeds.memory_speed(4, 1 << 30)
    assert little["one_core"] == 0 and "1.00 GiB are available" in little["why_not"] and len(asked) == 3


@pytest.mark.parametrize(
    ("path", "sort"),
    [
        ("/home/me/x", "ext4"),
        ("/dev/shm/x", "tmpfs"),
        ("/", "overlay"),
        ("/homestead", "overlay"),
        ("/home/b c/d", "xfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, path, sort):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "22 21 8:1 / /home rw shared:2 - ext4 /dev/sda1 rw\n"
        "23 21 0:22 / /dev/shm rw - tmpfs tmpfs rw\n"
        "24 22 8:2 / /home/b\\040c rw - xfs /dev/sdb rw\nnonsense\n"
        "21 1 0:20 / / rw,relatime master:1 - overlay overlay rw\n"
    )
    assert speeds.file_system(speeds.Path(path), tmp_path) == sort
    assert speeds.file_system(speeds.Path(path), tmp_path / "none") == ""
