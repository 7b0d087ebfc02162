"""Measured choices of variants: by device, checked when read, taken before defaults and behind what is forced."""

from __future__ import annotations

import json
import re

import pytest
import torch

from pyrosome.errors import KernelUnavailable
from pyrosome.ops import gpu, tuned
from pyrosome.ops.gpu import Target, Variant

VARIANTS = {name: Variant(name, {}) for name in ("narrow", "wide")}
H200 = "NVIDIA H200"
HERE = Target(90, device=H200)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.choices.cache_clear()
    yield tmp_path
    tuned.choices.cache_clear()


def write(folder, choices, device=H200, **changes):
    record = {"device": device, "capability": 90, "versions": {}, "command": "", "date": "", "choices": choices}
    (folder / "nvidia-h200.json").write_text(json.dumps(record | changes))


def chosen(key="M<=16", target=HERE) -> str:
    return gpu.chosen("twice", key, VARIANTS, "narrow", target).name


def test_without_a_file_the_default_is_taken(folder):
    assert chosen() == chosen(target=Target(90)) == "narrow"
    assert tuned.devices(90) == []


def test_what_was_measured_is_taken_for_its_class_on_its_device(folder):
    write(folder, {"twice": {"M<=16": "wide"}, "thrice": {"M<=16": "narrow"}})
    assert chosen() == "wide"
    assert chosen("M<=64") == chosen(target=Target(90)) == chosen(target=Target(90, device="NVIDIA H100")) == "narrow"
    assert tuned.devices(90) == [H200] and tuned.devices(80) == []


def test_what_is_forced_comes_first_and_choices_are_told(folder):
    write(folder, {"twice": {"M<=16": "wide"}})
    with gpu.telling() as told:
        with gpu.forced(twice="narrow", thrice="wide"):
            assert chosen() == "narrow"
        assert chosen() == "wide"
    assert chosen() == "wide"  # and is not told
    both = ("narrow", "wide")
    assert told == [("twice", "M<=16", both, "narrow", name) for name in ("narrow", "wide")]


def test_an_unknown_variant_is_an_error_that_says_what_to_do(folder):
    write(folder, {"twice": {"M<=16": "huge"}})
    with pytest.raises(KernelUnavailable, match=r"twice: variant 'huge'.*nvidia-h200.json has for M<=16.*narrow, wide"):
        chosen()
    assert chosen("M<=64") == "narrow"
    with gpu.forced(twice="tiny"), pytest.raises(KernelUnavailable, match="'tiny' is asked for, and there are narrow"):
        chosen()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no proper device, capability, choices"),
        ('{"device": "NVIDIA H200", "capability": 90, "choices": {"twice": "wide"}}', "has no proper choices"),
        ('{"device": "NVIDIA H200", "capability": 90, "choices": {"twice": {"k": 1}}}', "has no proper choices"),
        ('{"device": "NVIDIA H200", "capability": "9.0", "choices": {}}', "has no proper capability"),
        ('{"device": "NVIDIA A100", "capability": 80, "choices": {}}', "has the choices of 'NVIDIA A100'"),
    ],
)
def test_a_malformed_file_is_an_error_that_says_what_to_do(folder, text, said):
    (folder / "nvidia-h200.json").write_text(text)
    with pytest.raises(KernelUnavailable, match=f"nvidia-h200.json {re.escape(said)}.*bench.tune"):
        chosen()


def test_what_kernels_are_made_for_has_the_device_s_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {0: (8, 0), 1: (9, 0)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", {0: "NVIDIA A100", 1: H200}.__getitem__)
    gpu._target_of.cache_clear()
    assert gpu.target(torch.device("cuda", 1)) == HERE
    assert gpu.target(torch.device("cuda")) == Target(80, device="NVIDIA A100")
    gpu._target_of.cache_clear()


def test_files_are_named_for_devices():
    assert tuned.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert tuned.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_what_is_shipped_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.choices(json.loads(path.read_text())["device"])
