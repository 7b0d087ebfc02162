"""Training states: exact, and never half there."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import signal
import time
from collections import namedtuple

import pytest
import torch

from pyrosome.errors import CheckpointError, DoesNotFit, RequestError
from pyrosome.train import state as module
from pyrosome.train.recipe import Recipe
from pyrosome.train.state import TrainState, load_state, save_state

FIELDS = [f for f in TrainState.__dataclass_fields__ if f not in ("tensors", "torch_rng")]


def state_of(step: int, **changes) -> TrainState:
    """Tensors that tell which step they are of."""
    tensors = {"a": torch.full((257, 3), float(step)), "b": torch.full((5000,), step, dtype=torch.int64)}
    return TrainState(**{"step": step, "tokens": 10 * step, "tensors": tensors, **changes})


def whole(state: TrainState) -> bool:
    return state.tokens == 10 * state.step and all(bool((t == state.step).all()) for t in state.tensors.values())


def files(directory) -> list[str]:
    return sorted(os.listdir(directory))


def names(*steps: int) -> list[str]:
    return ["latest", *(f"state-{s:08d}.safetensors" for s in steps)]


def step_of(directory) -> int:
    state = load_state(directory)
    assert state is not None and whole(state)
    return state.step


def damage(path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_everything_comes_back_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(5)
    torch.rand(7, generator=g)
    rng = random.Random(6)
    rng.gauss(0, 1)  # leaves a second value behind, which is part of the state
    recipe = Recipe.load("smoke")
    tensors = {
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(3, 5, generator=g).bfloat16(),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "counts": torch.tensor([2**62, -1]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    before = TrainState(
        step=12, tokens=345, stage=1, stage_tokens=67, samples=89, curves_offset=1011, lr_position=1 / 3,
        fingerprint=recipe.fingerprint(), recipe=recipe.to_dict(), extra={"best": 0.1 + 0.2, "hits": [1, None, "é"]},
        torch_rng=g.get_state(), python_rng=rng.getstate(), tensors=tensors,
    )  # fmt: skip
    path = save_state(tmp_path / "deep" / "run", before)
    assert path.name == "state-00000012.safetensors"
    after = load_state(tmp_path / "deep" / "run", recipe)
    assert after is not None
    for name in FIELDS:
        assert getattr(after, name) == getattr(before, name), name
    assert after.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = after.tensors[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and not found.requires_grad
        assert (
            found.contiguous().view(-1).view(torch.uint8).equal(tensor.detach().contiguous().view(-1).view(torch.uint8))
        )
    other, again = torch.Generator(), random.Random()
    other.set_state(after.torch_rng)
    again.setstate(after.python_rng)
    assert torch.rand(3, generator=other).equal(torch.rand(3, generator=g))
    assert [again.gauss(0, 1) for _ in range(3)] == [rng.gauss(0, 1) for _ in range(3)]


def test_the_container_is_one_others_read(tmp_path):
    from safetensors import safe_open

    path = save_state(tmp_path, state_of(3))
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == {"a", "b"} and bool((f.get_tensor("a") == 3).all())
        assert '"step":3' in f.metadata()["state"]


def test_nothing_there_is_nothing(tmp_path):
    assert load_state(tmp_path) is None and load_state(tmp_path / "missing") is None


def test_two_saves_are_kept(tmp_path):
    kept = []
    for step in (1, 2, 3, 4):
        save_state(tmp_path, state_of(step))
        kept.append(files(tmp_path))
    assert kept == [names(1), names(1, 2), names(2, 3), names(3, 4)]
    assert step_of(tmp_path) == 4


def test_the_pointer_tells_and_not_the_number(tmp_path):
    save_state(tmp_path, state_of(1))
    save_state(tmp_path, state_of(2))
    (tmp_path / "latest").write_text("state-00000001.safetensors\n")
    assert step_of(tmp_path) == 1


@pytest.mark.parametrize("pointer", [None, "", "state-00000099.safetensors\n", "\0\xff"])
def test_without_a_sound_pointer_the_newest_is_used(tmp_path, pointer):
    save_state(tmp_path, state_of(1))
    save_state(tmp_path, state_of(2))
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert step_of(tmp_path) == 2


@pytest.mark.parametrize("how", ["tail", "tensor", "metadata", "name", "cut", "empty", "length", "gone"])
def test_a_damaged_latest_gives_way_to_the_one_before(tmp_path, caplog, how):
    save_state(tmp_path, state_of(1))
    latest = save_state(tmp_path, state_of(2))
    raw = latest.read_bytes()
    if how == "cut":
        latest.write_bytes(raw[:-1])
    elif how == "empty":
        latest.write_bytes(b"")
    elif how == "gone":
        latest.unlink()
    elif how == "metadata":
        latest.write_bytes(raw.replace(b'"tokens\\":20', b'"tokens\\":21'.replace(b"21", b"30")))
        assert latest.read_bytes() != raw
    elif how == "name":
        latest.write_bytes(raw.replace(b'"a":{', b'"c":{'))
        assert latest.read_bytes() != raw
    else:
        damage(latest, {"tail": -1, "tensor": -60_000 // 2, "length": 2}[how])
    with caplog.at_level(logging.WARNING):
        assert step_of(tmp_path) == 1
    assert "state-00000002" in caplog.text and "download" not in caplog.text


def test_going_on_after_damage_drops_the_damaged(tmp_path):
    save_state(tmp_path, state_of(10))
    damage(save_state(tmp_path, state_of(20)))
    assert step_of(tmp_path) == 10
    save_state(tmp_path, state_of(15))
    assert files(tmp_path) == names(10, 15) and step_of(tmp_path) == 15


def test_nothing_whole_is_said(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, state_of(step))
    for path in tmp_path.glob("state-*"):
        damage(path)
    with pytest.raises(CheckpointError, match=r"no training state that is whole.*00000002.*00000001"):
        load_state(tmp_path)


def test_every_single_flipped_bit_of_a_small_state_is_found(tmp_path):
    path = save_state(tmp_path, TrainState(step=1, tokens=2, tensors={"x": torch.arange(4.0)}))
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            found = load_state(tmp_path)
        except CheckpointError:
            continue
        assert found and found.step == 1 and found.tokens == 2 and found.tensors["x"].equal(torch.arange(4.0))
        assert raw[at : at + 1] == b" " or at - raw.index(b'"format":"pt"') in range(13)  # which nobody reads


def test_another_recipes_state_is_refused(tmp_path):
    recipe = Recipe.load("smoke")
    save_state(tmp_path, state_of(1, fingerprint=recipe.fingerprint(), recipe=recipe.to_dict()))
    renamed = Recipe.load("smoke", ["name=x", "run.checkpoint_seconds=9"])
    assert load_state(tmp_path, renamed).step == 1
    other = Recipe.load("smoke", ["optimizer.muon_lr=0.01", "stages.0.gate.accuracy=0.5"])
    with pytest.raises(RequestError) as caught:
        load_state(tmp_path, other)
    assert "optimizer.muon_lr: 0.02 -> 0.01" in str(caught.value)
    assert "stages.0.gate.accuracy: 0.9 -> 0.5" in str(caught.value) and "seed" not in str(caught.value)


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    save_state(tmp_path, state_of(1))
    with pytest.raises(CheckpointError, match=r"mask has dtype torch\.bool"):
        save_state(tmp_path, state_of(2, tensors={"mask": torch.ones(2, dtype=torch.bool)}))
    assert files(tmp_path) == names(1)


def test_a_full_disk_is_said_before_writing(tmp_path, monkeypatch):
    save_state(tmp_path, state_of(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1500, 1500))
    monkeypatch.setattr(module.os, "open", lambda *_: pytest.fail("it was written all the same"))
    with pytest.raises(
        DoesNotFit, match=r"state-00000002.*0\.0 MB needed, 0\.0 MB free.*states already there"
    ) as caught:
        save_state(tmp_path, state_of(2))
    monkeypatch.undo()
    assert 43_000 < caught.value.needed_bytes < 50_000 and caught.value.free_bytes == 1500
    assert files(tmp_path) == names(1) and step_of(tmp_path) == 1


@pytest.mark.parametrize(  # the second fsync is the directory's, which is no reason to stop
    ("call", "which"), [("write", 1), ("write", 2), ("fsync", 1), ("fsync", 3), ("replace", 1), ("replace", 2)]
)
def test_a_disk_that_fills_while_writing_leaves_the_last_state(tmp_path, monkeypatch, call, which):
    save_state(tmp_path, state_of(1))
    real, count = getattr(os, call), 0

    def fails(*args):
        nonlocal count
        count += 1
        if count >= which:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(module.os, call, fails)
    with pytest.raises(DoesNotFit, match="MB needed"):
        save_state(tmp_path, state_of(2))
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*")) and step_of(tmp_path) == 1
    save_state(tmp_path, state_of(3))
    assert step_of(tmp_path) == 3


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda handle, data: real(handle, data[: max(1, len(data) // 2)]))
    save_state(tmp_path, state_of(1))
    assert step_of(tmp_path) == 1


def test_a_write_that_takes_nothing_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "write", lambda *_: 0)
    with pytest.raises(DoesNotFit):
        save_state(tmp_path, state_of(1))
    assert files(tmp_path) == []


def test_a_limit_of_the_system_is_met(tmp_path):
    """A real short write: the file may not grow beyond 20,000 bytes."""
    save_state(tmp_path, state_of(1, tensors={"a": torch.ones(3)}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DoesNotFit, match="MB needed"):
            save_state(tmp_path, state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == names(1)


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_state(tmp_path / "file", state_of(1))


def child(work) -> int:
    """Run `work` in a copy of this process; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_killed_at_every_call_of_the_system(tmp_path):
    """The second save is cut off before its n-th call; a write is cut off in its middle."""
    calls = ("open", "write", "fsync", "close", "replace")
    steps = []
    for at in range(100):
        directory = tmp_path / str(at)
        save_state(directory, state_of(1))

        def dies(at=at, directory=directory):
            count = 0

            def counted(name):
                real = getattr(os, name)

                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count > at:
                        if name == "write":
                            real(args[0], args[1][: len(args[1]) // 2])
                        os._exit(9)
                    return real(*args, **kwargs)

                return call

            for name in calls:
                setattr(module.os, name, counted(name))
            save_state(directory, state_of(2))

        _, status = os.waitpid(child(dies), 0)
        steps.append(step_of(directory))
        save_state(directory, state_of(3))
        assert step_of(directory) == 3 and not list(directory.glob(".state-*"))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert len(steps) > 12 and set(steps) == {1, 2} and steps == sorted(steps)


def test_killed_at_any_moment(tmp_path):
    rng = random.Random(1)
    step = 0
    for _ in range(25):
        read, write = os.pipe()

        def saves(first=step + 1, write=write):
            for n in range(first, first + 10_000):
                save_state(tmp_path, state_of(n))
                os.write(write, b".")

        pid = child(saves)
        os.close(write)
        with open(read, "rb", buffering=0) as f:
            acknowledged = step + len(f.read(1))  # so that each round gets somewhere, however busy the machine is
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged += len(f.readall())
        step = step_of(tmp_path)
        assert acknowledged <= step <= acknowledged + 1
    assert step >= 25
